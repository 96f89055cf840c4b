"""What holds for every file: no row is lost, and neither the order of rows nor the form of Unicode means anything."""

import json
import unicodedata
from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.data.decontamination import EvaluationPrompts, find_contamination
from pipeline.data.evaluation_examples import read_examples
from pipeline.data.preferences import normalised_prompt, shared_prompts
from pipeline.data.score_statistics import ScoreStatistics
from pipeline.data.sources import HeldoutRule
from pipeline.errors import DataError
from tests.support.sources import source_of

OBJECTIVES = ("helpfulness", "honesty")

with_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

WORDS = st.text("aé ṩ가\u200b\n", max_size=6)
"""Letters that are one character or several, a space, and a character that shows nothing."""

RESPONSES = st.sampled_from(["", " ", "no", "no ", "yes", "<think>hm</think>", "<think>hm</think>yes", "e\u0301"])
SCORES = st.fixed_dictionaries({}, optional=dict.fromkeys(OBJECTIVES, st.sampled_from([0, 1.5, "4", "N/A", None])))
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": WORDS.map("why {}?".format), "chosen": RESPONSES, "rejected": RESPONSES},
        optional={"scores_chosen": SCORES, "scores_rejected": SCORES},
    ),
    min_size=1,
    max_size=12,
)


def written(directory, rows, name="rows.jsonl"):
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def named(rows):
    """The rows with identities of their own, after a row that is whole: a file without any pair is refused."""
    whole = {"prompt": "How ?", "chosen": "so", "rejected": "never"}
    return [{"id": f"row {number}", **row} for number, row in enumerate([whole, *rows])]


def read(path):
    return source_of(path, "pairs", OBJECTIVES)


@with_files
@given(rows=ROWS.map(named))
def test_every_row_becomes_a_pair_or_is_left_out_for_a_named_reason(tmp_path, rows):
    kept = read(written(tmp_path, rows))
    assert len(kept.pairs) + sum(kept.left_out.values()) == len(rows)
    assert len({pair.id for pair in kept.pairs}) == len(kept.pairs)


@with_files
@given(rows=ROWS.map(named))
def test_training_and_evaluation_leave_out_the_same_rows(tmp_path, rows):
    path = written(tmp_path, rows)
    left_out = Counter()
    examples = [example.id for example in read_examples([path], left_out=left_out)]
    kept = read(path)
    assert examples == [pair.id for pair in kept.pairs]
    assert left_out == kept.left_out


@with_files
@given(rows=ROWS.map(named), data=st.data())
def test_the_order_of_rows_changes_no_pair_no_split_and_no_statistic(tmp_path, rows, data):
    kept = read(written(tmp_path, rows)).pairs
    shuffled = read(written(tmp_path, data.draw(st.permutations(rows)))).pairs
    assert sorted(kept, key=lambda pair: pair.id) == sorted(shuffled, key=lambda pair: pair.id)

    statistics, of_shuffled = ScoreStatistics.of(kept, OBJECTIVES), ScoreStatistics.of(shuffled, OBJECTIVES)
    assert statistics.count == of_shuffled.count
    assert statistics.mean == pytest.approx(of_shuffled.mean)
    assert statistics.std == pytest.approx(of_shuffled.std)

    assume(len({normalised_prompt(pair.prompt) for pair in kept}) > 2)
    rule = HeldoutRule.of([], 0.5, 1)
    try:
        heldout = {pair.id for pair in rule.split(kept)[1]}
    except DataError:  # all of these few prompts fall on one side
        return
    assert heldout == {pair.id for pair in rule.split(shuffled)[1]}


@given(text=WORDS, form=st.sampled_from(["NFC", "NFD"]), invisible=st.sampled_from("\u200b\u200d\ufeff\u00ad"))
def test_a_prompt_in_another_unicode_form_is_the_same_prompt(text, form, invisible):
    asked = ({"role": "user", "content": f"Why {text} so ?"},)
    again = ({"role": "user", "content": unicodedata.normalize(form, f"why  {text} s{invisible}o ?").upper()},)
    assert normalised_prompt(asked) == normalised_prompt(again)
    assert shared_prompts([asked], [again]) == 1


@with_files
@given(text=WORDS, form=st.sampled_from(["NFC", "NFD"]))
def test_a_training_prompt_in_another_unicode_form_is_contamination(tmp_path, text, form):
    evaluation = EvaluationPrompts([written(tmp_path, [{"prompt": f"why {text} ?"}])])
    training = ({"role": "user", "content": unicodedata.normalize(form, f"why {text} ?")},)
    found = find_contamination([("mine", "a", training)], evaluation)
    assert found.training_exact == 1
    assert evaluation.holds(training)
