"""Spreads that nobody knows are measured once, before the first update."""

import pytest

from pipeline.columns import Rollouts
from pipeline.config.rewards import RewardSourceConfig
from pipeline.errors import WorkerError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.reward_scales import heldout_rollouts, scale_metrics, scales_in, scales_of_run
from pipeline.rewards.opened import (
    OpenedSource,
    combined_rewards,
    needs_measured_scales,
    rewards_of_single_responses,
)
from pipeline.stages.workspace import StageDirectory
from tests.rewards.rows import rollout
from tests.rewards.test_combined import Saying
from tests.support.fakes import FakeRollouts
from tests.support.learners import ALIGNMENT, ppo_learner, prompts_of

FOUR = Rollouts.of([rollout(name, 0, "a") for name in "abcd"])


def opened(name, *scores, weight=1.0, scale=None):
    config = RewardSourceConfig.model_validate({"name": name, "weight": weight, "length": {"at_most": 1}})
    return OpenedSource(config=config, source=Saying(*scores), scale=scale)


def test_a_scale_is_the_mean_and_the_spread_of_what_was_scored_and_a_resumed_run_reads_it(tmp_path, capsys):
    stage = StageDirectory(str(tmp_path), "align_policy", "0" * 64)
    known = opened("known", 0.0, 0.0, 0.0, 9.0, scale=RewardScale(mean=1.0, std=2.0))
    sources = [opened("new", 0.0, None, 4.0, 2.0), known, opened("flat", 3.0, 3.0, 3.0, 3.0)]
    scales = scales_of_run(stage, sources, lambda: FOUR, {})
    # 0, 4, 2: mean 2, spread (8 / 3)^.5; where all are equal the unit is 1
    assert scales["new"].mean == 2.0
    assert scales["new"].std == pytest.approx((8 / 3) ** 0.5)
    assert scales["flat"] == RewardScale(mean=3.0, std=1.0)
    assert scales.keys() == {"new", "flat"}
    assert "reward new: mean 2, spread 1.633 over 4 held-out responses" in capsys.readouterr().out
    assert scales_of_run(stage, sources, pytest.fail, {}) == scales
    assert scales_in(scale_metrics(scales)) == scales


def test_a_source_that_scores_nothing_is_told_at_once(tmp_path):
    stage = StageDirectory(str(tmp_path), "align_policy", "0" * 64)
    with pytest.raises(WorkerError, match="'dead' scored none of 4 held-out responses"):
        scales_of_run(stage, [opened("dead", None, None, None, None)], lambda: FOUR, {})


def test_only_a_sum_of_several_asks_for_a_scale():
    new, known = opened("new", 1.0), opened("known", 1.0, scale=RewardScale(mean=0.0, std=1.0))
    assert needs_measured_scales([new, known], "sum")
    assert not needs_measured_scales([new], "sum")
    assert not needs_measured_scales([new, known], "gdpo")
    assert not needs_measured_scales([opened("watched", 1.0, weight=0.0), known], "sum")
    assert combined_rewards([new], "sum", measured={}, columns={}).scale == RewardScale(mean=0.0, std=1.0)


def test_single_responses_are_measured_without_sources_that_compare_a_group():
    judge = {"name": "judge", "judge": {"url": "http://x/v1", "model": "m", "form": "pairwise"}}
    pairwise = OpenedSource(config=RewardSourceConfig.model_validate(judge), source=Saying(), scale=None)
    trained = opened("trained", 1.0, 2.0, 3.0, 4.0, weight=0.5)
    watched = opened("watched", 5.0, 6.0, 7.0, 8.0, weight=0.0)

    def means(*sources):
        scored = rewards_of_single_responses(sources, measured={}, columns={}).score(FOUR)
        return [score.mean for score in scored.scores], {*scored.by_source}

    assert means(pairwise, trained, watched) == ([0.5, 1.0, 1.5, 2.0], {"trained", "watched"})
    assert means(pairwise, watched) == ([5.0, 6.0, 7.0, 8.0], {"watched"})


def test_held_out_responses_come_from_the_policy_before_its_first_update(tiny_policy, world, tokenizer, tmp_path):
    rollouts = FakeRollouts(tokenizer)
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path / "published")
    prompts = prompts_of(world, tokenizer)
    samples = heldout_rollouts(rollouts, learner, prompts, ALIGNMENT, seed=0)
    assert rollouts.loaded == [0]
    assert len(samples) == min(len(prompts), 128 // ALIGNMENT.samples_per_prompt) * ALIGNMENT.samples_per_prompt
