"""All sources of a run as one reward: failures answered by the rule, counted and shown."""

import pytest

from pipeline.errors import WorkerError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.records import RewardScore
from pipeline.rewards.combined import CombinedRewards, WeightedSource
from pipeline.rewards.rows import NoScore, plain_score
from tests.rewards.rows import rollout

FOUR = [rollout("p", 0, "a"), rollout("p", 1, "b"), rollout("q", 0, "c"), rollout("q", 1, "d")]


class Saying:
    """A source that says these scores; None stands for a failure."""

    def __init__(self, *scores):
        self.scores = [NoScore(kind="timed_out", reason="slow") if s is None else plain_score(s) for s in scores]

    def score(self, rows):
        self.rows = rows
        return self.scores


def source(name, *scores, weight=1.0, mean=0.0, std=1.0, on_failure="drop"):
    scale = RewardScale(mean=mean, std=std)
    return WeightedSource(name=name, source=Saying(*scores), weight=weight, scale=scale, on_failure=on_failure)


def means(scored):
    return [None if score is None else score.mean for score in scored.scores]


def test_a_reward_model_alone_is_passed_on_as_it_is():
    whole = RewardScore(mean=2.5, std=0.5, objective_weights=(1.0,), objective_scores=(2.5,), deviations=(0.5,))
    scorer = source("model", 1.0, 1.0, 1.0, 1.0, mean=3.0, std=7.0)
    scorer.source.scores[0] = whole
    rewards = CombinedRewards([scorer])
    assert rewards.score(FOUR).scores[0] is whole
    assert (rewards.scale.mean, rewards.scale.std) == (3.0, 7.0)


def test_several_sources_are_summed_in_their_units_and_a_weight_of_0_only_measures():
    good = source("good", 1.0, 0.0, 1.0, 0.0, mean=0.5, std=0.5)
    short = source("short", 0.0, 0.0, -20.0, -20.0, weight=0.5, mean=-10.0, std=10.0)
    watched = source("watched", 9.0, 9.0, None, 9.0, weight=0.0)
    scored = CombinedRewards([good, short, watched], report=lambda _: None).score(FOUR)
    assert means(scored) == [1.5, -0.5, 0.5, -1.5]
    assert scored.metrics["reward/good"] == 0.5
    assert scored.metrics["reward/short"] == -10.0
    assert scored.metrics["reward/watched"] == 9.0
    assert scored.metrics["reward/dropped"] == 0.0
    assert [score and score.mean for score in scored.by_source["watched"]] == [9.0, 9.0, None, 9.0]


def test_gdpo_normalises_in_the_group_of_the_prompt():
    rewards = CombinedRewards([source("a", 0.0, 2.0, 5.0, 5.0), source("b", 9.0, 9.0, 0.0, 100.0)], "gdpo")
    half = 0.5**0.5
    assert means(rewards.score(FOUR)) == pytest.approx([-half, half, -half, half], abs=2e-4)
    assert (rewards.scale.mean, rewards.scale.std) == (0.0, 1.0)


def test_a_failure_is_dropped_or_scored_by_its_rule_counted_and_shown_with_prompt_and_response():
    told = []
    dropping = source("dropping", 1.0, None, 1.0, 1.0)
    fixed = source("fixed", None, 1.0, 1.0, 1.0, on_failure=-3.0)
    scored = CombinedRewards([dropping, fixed], report=told.append).score(FOUR)
    assert means(scored) == [-2.0, None, 2.0, 2.0]
    assert scored.metrics["reward/dropped"] == 1.0
    assert scored.metrics["reward/dropping/failed"] == scored.metrics["reward/dropping/failed/timed_out"] == 1.0
    assert scored.metrics["reward/fixed"] == 1.0  # the fixed score is not what the source said
    first, second = told
    assert "reward dropping: 1 of 4 responses without a score, left out of the step" in first
    assert "timed_out: slow" in first
    assert "prompt    p ?" in first
    assert "response  b" in first
    assert "scored -3" in second


def test_a_step_without_any_reward_ends_with_the_reasons():
    with pytest.raises(WorkerError, match=r"bad: timed_out, slow \(4 times\).*on_failure"):
        CombinedRewards([source("bad", None, None, None, None)], report=lambda _: None).score(FOUR)


def test_columns_reach_the_source_by_the_id_of_the_prompt():
    asked = source("asked", 1.0, 1.0, 1.0, 1.0)
    CombinedRewards([asked], columns={"q": {"answer": 7}}).score(FOUR)
    assert asked.source.rows.columns == [{}, {}, {"answer": 7}, {"answer": 7}]
    assert asked.source.rows.groups == [0, 0, 1, 1]
