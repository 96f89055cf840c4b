"""What holds for every statistic: the order of rows means nothing, and rows of one prompt are no new evidence."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.evaluation.pair_metrics import ScoredPairs, pair_diagnostics
from pipeline.evaluation.reward_evaluation import evaluate
from pipeline.evaluation.scored_rows import RewardedResponse, ScoredComparison, ScoredRows
from pipeline.evaluation.win_rate import win_rate

# Few values: ties are where the order of rows can matter.
REWARDS = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0])


@st.composite
def comparisons(draw):
    chosen, rejected = (RewardedResponse(reward=draw(REWARDS), characters=draw(st.integers(1, 4))) for _ in range(2))
    key = draw(st.integers(0, 2**64 - 1))
    return ScoredComparison(
        id=str(key),
        subset=draw(st.sampled_from(["easy", "hard"])),
        source=draw(st.sampled_from(["mine", "theirs"])),
        content_key=key,
        prompt_key=draw(st.integers(0, 5)),
        cut=draw(st.booleans()),
        annotators_tie=draw(st.booleans()),
        chosen=(chosen,),
        rejected=(rejected,),
        margin_std=draw(st.sampled_from([0.0, 0.5, 1.0])),
        log_odds=0.5 * (chosen.reward - rejected.reward),
    )


def flat(evaluation):
    """Every number of an evaluation under its name."""
    estimates = evaluation.accuracies | {f"diagnostic {name}": e for name, e in evaluation.diagnostics.items()}
    numbers = {
        f"{name} {part}": getattr(estimate, part)
        for name, estimate in estimates.items()
        for part in ("value", "low", "high")
    }
    return numbers | {
        f"{subset} {name}": value for subset, table in evaluation.subsets.items() for name, value in table.items()
    }


@settings(max_examples=6)
@given(rows=st.lists(comparisons(), min_size=1, max_size=40), data=st.data())
def test_the_order_of_rows_changes_no_number_and_no_interval(rows, data):
    in_order = evaluate(ScoredRows.of(rows), "pairs", seed=0, answer_threshold=0.4)
    shuffled = evaluate(ScoredRows.of(data.draw(st.permutations(rows))), "pairs", seed=0, answer_threshold=0.4)
    assert flat(in_order) == pytest.approx(flat(shuffled), nan_ok=True)


@given(margins=st.lists(REWARDS, min_size=20, max_size=60), data=st.data())
def test_diagnostics_of_ties_do_not_depend_on_who_comes_first(margins, data):
    order = np.array(data.draw(st.permutations(range(len(margins)))))
    zeros = np.zeros(len(margins))
    margins = np.array(margins)
    pairs = ScoredPairs(chosen=margins, rejected=zeros, margin_std=zeros, log_odds=0.5 * margins, length_gap=zeros)
    measured, reordered = (pair_diagnostics(p, answer_threshold=0.4) for p in (pairs, pairs.take(order)))
    assert measured == pytest.approx(reordered, nan_ok=True)


@settings(max_examples=25)
@given(values=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=20), times=st.integers(2, 4))
def test_every_row_twice_makes_no_interval_narrower(values, times):
    prompts = [f"prompt {n}" for n in range(len(values))]
    once = bootstrap_intervals(lambda rows: {"mean": float(np.array(values)[rows].mean())}, prompts, seed=0)
    repeated = np.repeat(values, times)
    often = bootstrap_intervals(lambda rows: {"mean": float(repeated[rows].mean())}, np.repeat(prompts, times), seed=0)
    assert often["mean"] == pytest.approx(once["mean"])


@given(scores=st.lists(st.tuples(REWARDS, REWARDS), min_size=1, max_size=30))
def test_a_win_rate_and_its_mirror_image_add_up_to_one(scores):
    ours, theirs = zip(*scores, strict=True)
    won, lost = win_rate(ours, theirs), win_rate(theirs, ours)
    assert won["win_rate"] + lost["win_rate"] == pytest.approx(1.0)
    assert won["low"] == pytest.approx(1.0 - lost["high"])
    assert won["ties"] == lost["ties"]
