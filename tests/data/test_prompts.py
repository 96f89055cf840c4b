"""What stands beside a prompt belongs to it, for every reader of prompts."""

import json

import pytest

from pipeline.data.decontamination import EvaluationPrompts
from pipeline.data.evaluation_examples import read_examples
from pipeline.data.prompts import read_prompts
from pipeline.errors import DataError
from tests.support.sources import read_pairs

ASKED, SYSTEM = {"role": "user", "content": "Name a river"}, {"role": "system", "content": "Answer in German"}
SAID = {"role": "assistant", "content": "The Elbe"}
GREETING = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})


def file_of(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def read(tmp_path, **row):
    [(_, messages)] = read_prompts([file_of(tmp_path, row)])
    return messages


@pytest.mark.parametrize(
    ("beside", "before"),
    [
        ({"system": "Answer in German"}, (SYSTEM,)),
        ({"history": [["hi", "hello"]]}, GREETING),
        ({"history": list(GREETING)}, GREETING),
        ({"history": [["hi", "hello"]], "system": "Answer in German"}, (SYSTEM, *GREETING)),
        ({"history": [], "system": None, "input": ""}, ()),
        ({"input": "a river"}, ()),
    ],
)
def test_columns_beside_the_prompt_are_used_by_every_reader(tmp_path, beside, before):
    row = {"prompt": "Name a river", "chosen": "a", "rejected": "b", **beside}
    path, prompt = file_of(tmp_path, row), (*before, ASKED)
    assert read(tmp_path, **row) == prompt
    assert [example.prompt for example in read_examples([path])] == [prompt]
    assert EvaluationPrompts([path]).holds(prompt)
    for data_format in ("pairs", "ultrafeedback", "pku_saferlhf"):
        [pair] = read_pairs(path, data_format, ())
        assert pair.prompt == prompt
    assert read(tmp_path, **{**row, "prompt": [*before, ASKED], "history": None}) == prompt


def test_alpacas_input_follows_its_instruction(tmp_path):
    row = {"instruction": "Translate the sentence", "input": "Guten Tag", "output": "Good day"}
    [message] = read(tmp_path, **row)
    assert message == {"role": "user", "content": "Translate the sentence\n\nGuten Tag"}
    assert read(tmp_path, **{**row, "prompt": "Translate the sentence\n\nGuten Tag"}) == (message,)
    assert read(tmp_path, **{**row, "input": " "})[0]["content"] == "Translate the sentence"


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"prompt": "Translate", "input": "Guten Tag"}, r"field 'input': it is not part of the field 'prompt'\. Join"),
        ({"prompt": "p", "input": ["x"]}, r"field 'input': \['x'\] is no str"),
        ({"prompt": "p", "system": ["x"]}, r"field 'system': \['x'\] is no str"),
        ({"prompt": [SYSTEM, ASKED], "system": "Be short"}, r"field 'system': the field 'prompt' has another system"),
        ({"prompt": "p", "history": "hi"}, r"field 'history': 'hi' is no history; give turns"),
        ({"prompt": "p", "history": [["hi"]]}, r"field 'history': \[\['hi'\]\] is no history"),
        ({"messages": [ASKED, SAID]}, r"line 1, field 'messages': it ends with the assistant's turn"),
        ({"prompt": [SYSTEM]}, r"line 1, field 'prompt': no turn of the user"),
        (
            {"asked": "why ?"},
            r"none of the fields messages, prompt, instruction, question is there; the fields with a value are asked",
        ),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(tmp_path, row, letter):
    with pytest.raises(DataError, match=letter):
        read(tmp_path, **row)
