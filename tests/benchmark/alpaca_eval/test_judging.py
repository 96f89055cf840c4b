"""AlpacaEval's coin, prompt and preference, as alpaca_eval 0.6.6 has them."""

import hashlib
import json
import math

import pytest

from pipeline.benchmark.alpaca_eval.judging import (
    AlpacaEvalJudging,
    is_switched,
    parse_identifier,
    read_chatml,
    shown_preference,
)
from pipeline.benchmark.alpaca_eval.model_outputs import pair_by_instruction, read_model_outputs
from pipeline.benchmark.judges.judge import Judgment, Unanswered
from pipeline.errors import DataError
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "alpaca_eval"

CHATML = """<|im_start|>system
You pick.
<|im_end|>
<|im_start|>user
{ "instruction": \"\"\"{instruction}\"\"\" }
m: {output_1}
M: {output_2}

<|im_end|>"""

STAYS, SWITCHES = "What is 2+2?", "Tell me a joke."
"""Instructions whose coin, by alpaca_eval's own function, leaves the baseline first, and does not."""


class GPT:
    name, model = "https://somewhere", "gpt-x"


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def outputs(tmp_path, generator, answers):
    rows = [{"instruction": i, "output": o, "generator": generator, "dataset": "koala"} for i, o in answers.items()]
    return read_model_outputs(write(tmp_path / f"{generator}.json", rows))


def judging(tmp_path, ours, theirs, **options):
    template = tmp_path / "clf.txt"
    template.write_text(CHATML)
    answers = outputs(tmp_path, "ours", ours), outputs(tmp_path, "gpt4", theirs)
    return AlpacaEvalJudging(*answers, read_chatml(template), annotator="clf", **options)


def judgment_of(text, **logprobs):
    return Judgment(
        text=text,
        first_token_logprobs=logprobs,
        finish_reason="length",
        prompt_tokens=1,
        completion_tokens=1,
        time=0.0,
    )


@pytest.mark.parametrize(
    ("instruction", "switched"),
    [
        ("What is 2+2?", False),
        ("Why is the sky blue?", True),
        ("Sum 3 and 4.", True),
        ("Wie spät ist es, ö?", False),
        ("line one\nline two?", True),
        ("a\nb", False),
    ],
)
def test_the_coin_falls_as_upstreams(instruction, switched):
    assert is_switched(instruction) is switched


def test_the_coin_falls_as_upstreams_on_all_805_instructions():
    if not SHARED.exists():
        pytest.skip("the public data beside the project is not here")
    lines = (SHARED / "instructions.jsonl").read_text().splitlines()
    falls = "".join(str(int(is_switched(json.loads(line)["instruction"]))) for line in lines)
    assert (len(falls), falls.count("1")) == (805, 406)
    golden = "8b3d93b6cd014bfa8a673db0a9d5d46cfff8efbafa44b8e7e4ba82878468030e"
    assert hashlib.sha256(falls.encode()).hexdigest() == golden


def test_the_prompt_shows_the_two_answers_as_the_coin_fell(tmp_path):
    judged = judging(tmp_path, {STAYS: "4", SWITCHES: "{output_2} ha"}, {STAYS: "four", SWITCHES: "no"})
    stays, switches = judged.requests
    assert stays.messages == (
        {"role": "system", "content": "You pick."},
        {"role": "user", "content": '{ "instruction": """What is 2+2?""" }\nm: four\nM: 4'},
    )
    assert switches.messages[1]["content"].endswith("m: {output_2} ha\nM: no")
    assert (stays.pair.answer_a, switches.pair.answer_a) == ("four", "{output_2} ha")
    assert (stays.sampling.temperature, stays.sampling.max_tokens, stays.sampling.top_logprobs) == (1.0, 1, 5)


@pytest.mark.parametrize(
    ("judgment", "preference"),
    [
        (judgment_of("m", m=math.log(0.6), M=math.log(0.2), Both=math.log(0.1)), 1.25),
        (judgment_of("M", M=-0.3), 2.0),
        (judgment_of("m", m=-0.3, The=-2.0), 1.0),
        (judgment_of("The", The=-0.1), None),
        (judgment_of("m"), 1.0),
        (judgment_of(" M\n"), 2.0),
        (judgment_of("model m"), None),
        (judgment_of(""), None),
    ],
)
def test_the_preference_is_the_share_of_the_second_identifier(judgment, preference):
    expected = preference if preference is None else pytest.approx(preference)
    assert shown_preference(judgment, parse_identifier) == expected


def test_annotations_prefer_the_model_with_2_whichever_was_shown_first(tmp_path):
    judged = judging(tmp_path, {STAYS: "4", SWITCHES: "ha"}, {STAYS: "four", SWITCHES: "no"})
    p = {"m": math.log(0.75), "M": math.log(0.25)}
    stays, switches = judged.rows([judgment_of("m", **p), judgment_of("m", **p)], GPT()).rows
    assert stays == {
        "instruction": STAYS,
        "output_1": "four",
        "generator_1": "gpt4",
        "output_2": "4",
        "generator_2": "ours",
        "dataset": "koala",
        "annotator": "clf/gpt-x",
        "preference": pytest.approx(1.25),
        "preference_raw_completion": "m",
    }
    assert (switches["output_1"], switches["preference"]) == ("no", pytest.approx(1.75))


def test_equal_answers_are_a_draw_that_nobody_is_asked_about(tmp_path):
    judged = judging(tmp_path, {STAYS: "4", SWITCHES: "ha"}, {STAYS: "4", SWITCHES: "no"})
    assert len(judged.requests) == 1
    draw, decided = judged.rows([judgment_of("m")], GPT()).rows
    assert (draw["preference"], decided["preference"]) == (1.5, 2.0)


def test_failures_are_rows_without_a_preference(tmp_path):
    judged = judging(tmp_path, {STAYS: "4", SWITCHES: "ha"}, {STAYS: "four", SWITCHES: "no"})
    result = judged.rows([Unanswered(reason="HTTP 502"), judgment_of("neither")], GPT())
    assert [row["preference"] for row in result.rows] == [None, None]
    assert result.rows[0]["failure"] == "HTTP 502"
    assert result.unparsed == 1


def test_answers_are_paired_by_instruction_whatever_their_order(tmp_path):
    judged = judging(tmp_path, {"a": "1", "b": "2"}, {"b": "20", "a": "10"})
    rows = judged.rows([judgment_of("m"), judgment_of("m")], GPT()).rows
    assert [(row["output_1"], row["output_2"]) for row in rows] == [("10", "1"), ("20", "2")]


def test_an_instruction_that_one_of_the_two_does_not_answer_is_named_with_its_row(tmp_path):
    short, long = tmp_path / "short.json", tmp_path / "long.json"
    for path, generator, instructions in ((short, "brief", "a"), (long, "eager", "abc")):
        rows = [{"instruction": text, "output": "x", "generator": generator} for text in instructions]
        path.write_text(json.dumps(rows, indent=1))
    few, many = read_model_outputs(short), read_model_outputs(long)
    letter = r"long\.json, row 2 \(line 7\): brief has no answer to 'b', nor to 1 others .* end at .*short\.json, row 1"
    for ours, baseline in ((few, many), (many, few)):
        with pytest.raises(DataError, match=letter):
            pair_by_instruction(ours, baseline)


@pytest.mark.parametrize(
    ("rows", "letter"),
    [
        ([], "holds no AlpacaEval answers"),
        ([{"instruction": "a", "output": "b"}], r"a\.json, row 1 \(line 1\), field 'generator'"),
        ({"instruction": "a"}, "must hold a list"),
        (
            [{"instruction": i, "output": "b", "generator": g} for i, g in ("ax", "by")],
            r"a\.json, row 2 \(line 1\): 'y' in a file of 'x'",
        ),
        (
            [{"instruction": "a", "output": o, "generator": "ours"} for o in "12"],
            r"a\.json, row 2 \(line 1\): 'ours' answers 'a' again",
        ),
    ],
)
def test_a_file_of_other_things_is_refused(tmp_path, rows, letter):
    with pytest.raises(DataError, match=letter):
        read_model_outputs(write(tmp_path / "a.json", rows))


@pytest.mark.parametrize("text", ["{instruction} {output_1} {output_2}", CHATML.replace("{output_2}", "")])
def test_a_template_that_is_no_chatml_or_hides_an_answer_is_refused(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DataError, match=r"t\.txt"):
        read_chatml(tmp_path / "t.txt")


def test_one_name_for_two_models_is_refused(tmp_path):
    template = tmp_path / "clf.txt"
    template.write_text(CHATML)
    first, second = (
        read_model_outputs(write(tmp_path / name, [{"instruction": "a", "output": output, "generator": "base"}]))
        for name, output in (("1.json", "1"), ("2.json", "2"))
    )
    with pytest.raises(DataError, match=r"1\.json, row 1 .*'base' gives another answer than in .*2\.json, row 1"):
        AlpacaEvalJudging(first, second, read_chatml(template), annotator="clf")
    assert AlpacaEvalJudging(first, first, read_chatml(template), annotator="clf").requests == []
