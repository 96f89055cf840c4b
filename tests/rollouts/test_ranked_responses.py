"""Which of the policy's own responses become a pair, on literal scores."""

from dataclasses import replace

import pytest

from pipeline.errors import DataError, NumericsError, ShapeError
from pipeline.records import Prompt, RewardScore, Rollout
from pipeline.rollouts.ranked_responses import rank_samples


def sample(prompt, index, *, finished=True, tokens=3):
    return Rollout(
        prompt=Prompt(id=prompt, messages=(), token_ids=(1,)),
        sample_index=index,
        response_ids=(2,) * tokens,
        response_text=f"{prompt}{index}",
        logprobs=(0.0,) * tokens,
        policy_version=0,
        finish_reason="stop" if finished else "length",
    )


def score(mean, std=0.0):
    return RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())


def ranked(samples, scores, *, size=3, lcb=0.0, least_margin=0.0):
    return rank_samples(samples, scores, samples_per_prompt=size, lcb_coefficient=lcb, least_margin=least_margin)


def group(prompt="p", **changes):
    return [sample(prompt, i, **changes) for i in range(3)]


def test_the_best_meets_the_worst_of_each_prompt():
    found = ranked([*group("p"), *group("q")], [score(x) for x in (1.0, 3.0, -1.0, 0.5, 0.25, 0.0)])
    texts = [(row.best.response_text, row.worst.response_text, row.margin) for row in found.rows]
    assert texts == [("p1", "p2", 4.0), ("q0", "q2", 0.5)]
    assert found.left_out == {}


def test_a_prompt_whose_responses_score_alike_is_left_out_and_counted():
    found = ranked([*group("p"), *group("q")], [score(x) for x in (1.0, 1.0, 1.0, 0.0, 2.0, 1.0)])
    assert [row.best.response_text for row in found.rows] == ["q1"]
    assert found.left_out == {"all responses score alike": 1}
    assert found.metrics()["pairs/left_out/all_responses_score_alike"] == 1.0


def test_the_lower_bound_ranks_an_uncertain_response_lower():
    scores = [score(2.0, std=3.0), score(1.0, std=0.1), score(0.0, std=0.1)]
    assert ranked(group(), scores).rows[0].best.response_text == "p0"
    by_bound = ranked(group(), scores, lcb=1.0).rows[0]
    assert (by_bound.best.response_text, by_bound.worst.response_text) == ("p1", "p0")
    assert by_bound.margin == pytest.approx(0.9 - (-1.0))


def test_pairs_below_the_margin_are_left_out_and_counted():
    found = ranked([*group("p"), *group("q")], [score(x) for x in (0.1, 0.0, 0.2, 0.0, 2.0, 1.0)], least_margin=0.5)
    assert [row.best.response_text for row in found.rows] == ["q1"]
    assert found.left_out == {"best and worst too close": 1}


def test_a_response_that_was_cut_may_lose_and_never_wins():
    samples = [sample("p", 0, finished=False), sample("p", 1), sample("p", 2, finished=False)]
    row = ranked(samples, [score(5.0), score(1.0), score(0.0)]).rows[0]
    assert (row.best.response_text, row.worst.response_text) == ("p1", "p2")
    only_better_one_is_cut = ranked([*samples, *group("q")], [score(x) for x in (5.0, 0.0, 1.0, 0.0, 1.0, 2.0)])
    assert only_better_one_is_cut.left_out == {"best and worst too close": 1}
    none = [sample("p", i, finished=False) for i in range(3)]
    found = ranked([*none, *group("q")], [score(x) for x in (5.0, 1.0, 0.0, 0.0, 1.0, 2.0)])
    assert found.left_out == {"no response finished": 1}


def test_an_empty_response_may_lose_and_never_wins():
    samples = [replace(sample("p", 0), response_text=" "), sample("p", 1), sample("p", 2)]
    assert ranked(samples, [score(5.0), score(1.0), score(0.0)]).rows[0].best.response_text == "p1"
    assert ranked(samples, [score(-5.0), score(1.0), score(0.0)]).rows[0].worst.response_text == " "


def test_the_metrics_show_the_lengths_of_both_sides():
    samples = [sample("p", 0, tokens=8), sample("p", 1, tokens=2), sample("p", 2)]
    metrics = ranked(samples, [score(2.0), score(0.0), score(1.0)]).metrics()
    assert (metrics["pairs/best_tokens"], metrics["pairs/worst_tokens"], metrics["pairs/margin"]) == (8.0, 2.0, 2.0)


def test_no_pair_at_all_is_said_with_reasons_and_a_cure():
    with pytest.raises(DataError, match=r"none of 1 prompts gives a pair: all responses score alike \(1\)\. Sample"):
        ranked(group(), [score(1.0)] * 3)


def test_scores_that_are_not_finite_rank_nothing():
    with pytest.raises(NumericsError, match="'p' has a reward that is not finite"):
        ranked(group(), [score(1.0), score(float("nan")), score(0.0)])


@pytest.mark.parametrize(
    ("samples", "scores"),
    [
        (group(), [score(1.0)] * 2),
        (group()[:2], [score(1.0)] * 2),
        ([*group("p")[:2], sample("q", 0)], [score(1.0)] * 3),
    ],
)
def test_groups_that_are_not_whole_are_refused(samples, scores):
    with pytest.raises(ShapeError):
        ranked(samples, scores)
