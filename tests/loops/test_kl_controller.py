"""The coefficient of the KL penalty, step by step in a run: it follows the measured KL, or stays."""

from dataclasses import replace

import pytest

from pipeline.columns import TokenEvaluations
from pipeline.config.alignment import KLConfig
from pipeline.data.prompts import PromptStream
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.alignment import align
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.learners import ALIGNMENT, ppo_learner, prompts_of
from tests.support.rewards import rewards_of

KL_OF_STEPS = (10.0, 2.2, 1.0, 1.9)
"""Nats per response that the policies of the run are away from their reference."""


@pytest.mark.parametrize(
    ("kl", "coefficients"),
    [
        # Eight responses a step, a horizon of 100: beta moves by 8% of KL / 2 - 1, which is cut at 20%.
        (
            KLConfig(coefficient=0.05, target=2.0, horizon=100),
            (0.05, 0.05 * 1.016, 0.05 * 1.016 * 1.008, 0.05 * 1.016 * 1.008 * 0.984),
        ),
        (KLConfig(coefficient=0.05), (0.05, 0.05, 0.05, 0.05)),
    ],
    ids=["adaptive", "fixed"],
)
def test_the_coefficient_of_a_step_follows_the_kl_measured_before_it(
    kl, coefficients, tiny_policy, world, tokenizer, tmp_path
):
    config = ALIGNMENT.model_copy(update={"num_steps": 4, "kl": kl})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path / "published", config=config)
    evaluate = learner.evaluate_tokens

    def evaluate_at_a_distance(rollouts):
        kl = KL_OF_STEPS[rollouts[0].policy_version]
        return TokenEvaluations.of(
            [
                replace(e, reference_logprobs=tuple(logprob - kl / len(e.logprobs) for logprob in e.logprobs))
                for e in evaluate(rollouts)
            ]
        )

    learner.evaluate_tokens = evaluate_at_a_distance
    align(
        FakeRollouts(tokenizer),
        rewards_of(FakeScorer()),
        learner,
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        StageDirectory(str(tmp_path), "align_policy", "0" * 64),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["kl/per_response"] for row in rows] == pytest.approx(KL_OF_STEPS, rel=1e-5)
    assert [row["kl/coefficient"] for row in rows] == pytest.approx(coefficients, rel=1e-5)
