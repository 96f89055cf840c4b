"""Comparisons as people write them, and as they were published."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from pipeline.data.evaluation_examples import prompt_key, read_examples
from pipeline.data.preferences import LeftOut
from pipeline.errors import DataError
from tests.support.paths import SHARED_DATA

QUESTION = ({"role": "user", "content": "why ?"},)


def file_of(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, *rows, **options):
    return list(read_examples([file_of(tmp_path, *rows)], **options))


def row(**changes):
    return {"prompt": "why ?", "chosen": "because", "rejected": "no", **changes}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_pair_of_texts(tmp_path):
    [pair] = read(tmp_path, row(id=7, subset="hep-go"))
    assert (pair.id, pair.subset, pair.prompt) == ("7", "hep-go", QUESTION)
    assert (pair.chosen, pair.rejected) == (("because",), ("no",))


def test_lists_of_responses(tmp_path):
    [best_of_4] = read(tmp_path, row(chosen=["a"], rejected=["b", "c", "d"]))
    assert (best_of_4.chosen, best_of_4.rejected) == (("a",), ("b", "c", "d"))


def test_conversations_bring_their_own_prompt(tmp_path):
    """UltraFeedback's form: the whole conversation on both sides, and the first turn once more as `prompt`."""
    turns = [*QUESTION, assistant("so"), {"role": "user", "content": "really ?"}]
    rows = read(tmp_path, row(chosen=[*turns, assistant("yes")], rejected=[*turns, assistant("no")]))
    assert rows[0].prompt == tuple(turns)
    assert (rows[0].chosen, rows[0].rejected) == (("yes",), ("no",))


def test_conversations_of_the_response_alone_use_the_prompt(tmp_path):
    [pair] = read(tmp_path, row(prompt=list(QUESTION), chosen=[assistant("yes")], rejected=[assistant("no")]))
    assert (pair.prompt, pair.chosen) == (QUESTION, ("yes",))


def test_a_row_without_name_or_subset_is_named_by_its_place(tmp_path):
    first, second = read(tmp_path, row(), row(id=None, subset=None))
    assert first.id.endswith("rows.jsonl, line 1")
    assert second.id.endswith("rows.jsonl, line 2")
    assert first.subset == second.subset == "all"


def test_equal_annotated_scores_are_a_tie_of_the_annotators(tmp_path):
    ties = [
        c.annotators_tie
        for c in read(
            tmp_path, row(score_chosen=8.0, score_rejected=8.0), row(score_chosen=8.0, score_rejected=7.0), row()
        )
    ]
    assert ties == [True, False, False]


def test_the_content_key_is_of_the_texts_alone(tmp_path):
    keys = [
        c.content_key
        for c in read(
            tmp_path, row(id=1), row(id=2, subset="x"), row(chosen="no", rejected="because"), row(rejected=["no", "no"])
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_the_prompt_key_forgives_unicode_forms():
    composed, decomposed, marked = (
        ({"role": "user", "content": t},) for t in ("\u00e9t\u00e9", "e\u0301te\u0301", "\u00e9\u200bt\u00e9")
    )
    assert prompt_key(composed) == prompt_key(decomposed) == prompt_key(marked) != prompt_key(QUESTION)


def test_the_prompt_key_forgives_case_and_white_space():
    assert prompt_key(QUESTION) == prompt_key([{"role": "user", "content": " Why  ?\n"}])
    assert prompt_key(QUESTION) != prompt_key([{"role": "user", "content": "why not ?"}])


@pytest.mark.parametrize(
    ("changes", "letter"),
    [
        ({"chosen": 3}, "line 2, field 'chosen': 3 is no response; give a text"),
        ({"chosen": []}, "line 2, field 'chosen': [] is no response"),
        ({"rejected": ["a", None]}, "line 2, field 'rejected': ['a', None] is no response"),
        ({"rejected": None}, "line 2, field 'rejected': None is no response"),
        ({"prompt": None}, "line 2, field 'prompt': None is no prompt"),
        ({"prompt": ""}, "line 2, field 'prompt': '' is no prompt"),
        ({"chosen": [{"role": "user", "content": "x"}]}, "field 'chosen': the conversation must end with a turn of"),
        (
            {"chosen": [*QUESTION, assistant("a")], "rejected": [{"role": "user", "content": "x"}, assistant("b")]},
            "line 2: the conversations 'chosen' and 'rejected' differ before their last turn",
        ),
    ],
)
def test_a_bad_row_is_named_with_line_field_and_cure(tmp_path, changes, letter):
    with pytest.raises(DataError) as error:
        read(tmp_path, row(), row(**changes))
    assert letter in str(error.value)
    assert "rows.jsonl" in str(error.value)


def test_a_missing_subset_field_names_those_that_are_there(tmp_path):
    [pair] = read(tmp_path, row(domain="code"), subset_field="domain")
    assert pair.subset == "code"
    with pytest.raises(DataError, match=r"'domian': not there.* has chosen, domain, prompt, rejected; choose another"):
        read(tmp_path, row(domain="code"), subset_field="domian")


def test_rows_are_read_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\nthis is no JSON\n")
    rows = read_examples([str(path)])
    assert next(rows).chosen == ("because",)  # the second line has not been looked at
    with pytest.raises(DataError, match=r"line 2: no JSON"):
        next(rows)


def test_rows_that_cannot_be_compared_are_left_out_and_counted_by_reason(tmp_path):
    path = file_of(
        tmp_path,
        {"prompt": "why ?", "chosen": "because", "rejected": "no"},
        {"prompt": "why ?", "chosen": "because", "rejected": " because\n"},
        {"prompt": "why ?", "chosen": "<think>so</think>", "rejected": "no"},
        {"prompt": "why ?", "chosen": "because", "rejected": ["no", "never", "because"]},
        {"prompt": "why ?", "chosen": "because", "rejected": ["no", "never", ""]},
    )
    left_out = Counter()
    assert [example.rejected for example in read_examples([path], left_out=left_out)] == [("no",)]
    assert left_out == {LeftOut.IDENTICAL: 2, LeftOut.EMPTY: 2}


@pytest.mark.parametrize(
    ("file", "rows", "shape"),
    [  # of LLMBar's 627 rows one has an empty response, one the same response twice
        ("rewardbench_style/rewardbench_style.parquet", 3816, (1, 1)),
        ("llmbar/llmbar.parquet", 625, (1, 1)),
        ("rm_bench/rm_bench.parquet", 558, (3, 3)),
    ],
)
def test_published_files_are_read_as_they_are(file, rows, shape):
    path = SHARED_DATA / file
    if not path.exists():
        pytest.skip(f"{path} is not here: a published benchmark")
    left_out = Counter()
    comparisons = list(read_examples([str(path)], left_out=left_out))
    table = pq.read_table(path, columns=["split_key"])
    assert len(comparisons) == rows == table.num_rows - left_out.total()
    assert {(len(c.chosen), len(c.rejected)) for c in comparisons} == {shape}
    # The data sets name a prompt by the same rule; code rows by their problem number instead.
    keys = {key[:16] for key in table["split_key"].to_pylist()}
    for comparison in comparisons:
        is_code = comparison.subset.startswith(("hep-", "bigcode/"))
        assert is_code or comparison.prompt_key in keys
