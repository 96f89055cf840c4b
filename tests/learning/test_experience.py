"""Tokens end to end give the numbers that padding every response to the longest gives."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.experience import summary_of
from pipeline.learning.padded_rows import PaddedRows
from pipeline.learning.response_evaluations import response_evaluations
from pipeline.objectives import advantages as estimators
from pipeline.objectives.policy import truncated_importance_weights
from pipeline.ragged import Ragged
from pipeline.records import Prompt, RewardScore
from tests.learning.test_algorithm import config_of
from tests.support.experience import experience_of_step

BETA = 0.07
LENGTHS = [7, 1, 40, 3, 11, 2, 12, 5]


def numbers(seed):
    values = -np.random.default_rng(seed).random(sum(LENGTHS), dtype=np.float32)
    return Ragged.divided(torch.from_numpy(values), torch.tensor(LENGTHS))


ROLLOUTS = Rollouts(
    prompts=tuple(Prompt(id=f"p{n // 4}", messages=(), token_ids=(1,)) for n in range(8)),
    sample_indices=(0, 1, 2, 3) * 2,
    response_ids=Ragged.divided(torch.arange(sum(LENGTHS), dtype=torch.int32), torch.tensor(LENGTHS)),
    response_texts=("",) * 8,
    logprobs=numbers(0),
    policy_versions=(0,) * 8,
    finish_reasons=("stop",) * 8,
    repetition=(0.0,) * 8,
)
EVALUATIONS = TokenEvaluations(logprobs=numbers(1), reference_logprobs=numbers(2), values=numbers(3))
REWARDS = (1.0, -0.5, 0.25, 0.8, 0.1, -1.2, 0.4, 0.3)


def padded(rows):
    return pad_sequence([*rows], batch_first=True)


def padded_rewards_and_mask():
    mask = padded(torch.ones(length, dtype=torch.bool) for length in LENGTHS)
    rewards = torch.where(mask, -BETA * (padded(EVALUATIONS.logprobs) - padded(EVALUATIONS.reference_logprobs)), 0.0)
    rewards[torch.arange(8), torch.tensor(LENGTHS) - 1] += torch.tensor(REWARDS)
    return rewards, mask


def built(algorithm, **ppo):
    config = config_of(algorithm, reward_transform="none", reward_clip=None, missing_eos_penalty=0.0, **ppo)
    scores = [RewardScore(mean=r, std=0.0, objective_weights=(), objective_scores=()) for r in REWARDS]
    scale = RewardScale(mean=0.0, std=1.0)
    return experience_of_step(ROLLOUTS, scores, EVALUATIONS, config, kl_coefficient=BETA, reward_scale=scale)[0]


def test_advantages_of_a_critic_are_the_same_to_the_bit():
    experience = built("ppo", whiten_advantages=False, gae_lambda=0.9, discount=0.97)
    rewards, mask = padded_rewards_and_mask()
    values = padded(EVALUATIONS.values)
    expected = estimators.generalized_advantages(rewards, values, mask, gamma=0.97, lam=0.9)
    assert torch.equal(experience.advantages, expected[mask])
    assert torch.equal(experience.critic.returns, (expected + values)[mask])
    # The evaluation itself, not a copy of it.
    assert experience.logprobs.data_ptr() == EVALUATIONS.logprobs.values.data_ptr()


def test_rewards_to_go_and_their_whitening():
    rewards, mask = padded_rewards_and_mask()
    expected = estimators.rewards_to_go(rewards, mask, gamma=0.97)[mask]
    assert torch.equal(built("reinforce_plus_plus", whiten_advantages=False, discount=0.97).advantages, expected)
    whitened = built("reinforce_plus_plus", discount=0.97).advantages
    torch.testing.assert_close(whitened, (expected - expected.mean()) / expected.std())


def test_every_token_of_a_response_has_the_advantage_of_its_group():
    rewards, mask = padded_rewards_and_mask()
    expected = estimators.leave_one_out(rewards.sum(-1).view(2, 4)).view(8, 1).expand_as(rewards)[mask]
    torch.testing.assert_close(built("rloo").advantages, expected)


def test_importance_weights_are_the_same_to_the_bit():
    _, mask = padded_rewards_and_mask()
    expected = truncated_importance_weights(padded(EVALUATIONS.logprobs), padded(ROLLOUTS.logprobs), mask, cap=1.2)
    assert torch.equal(built("grpo", tis_cap=1.2).importance_weights, expected[mask])
    assert built("grpo").importance_weights is None


def test_rows_of_a_micro_batch_are_as_wide_as_the_longest_of_the_batch():
    rows = PaddedRows.of(ROLLOUTS.response_ids.offsets, torch.tensor([3, 1]))
    assert rows.mask.shape == (2, 40)
    assert rows.mask.sum(-1).tolist() == [3, 1]
    taken = rows.take(ROLLOUTS.response_ids.values)
    # Responses 0 to 2 have 48 tokens, response 0 has 7.
    assert taken[:, :4].tolist() == [[48, 49, 50, 0], [7, 0, 0, 0]]
    assert taken[:, 4:].count_nonzero() == 0


def test_the_driver_learns_the_mean_advantage_of_every_response():
    experience = built("rloo")
    summary = summary_of(experience, {"kl/per_response": 0.5})
    assert summary.metrics == {"kl/per_response": 0.5}
    assert summary.rows == tuple(range(8))
    firsts = experience.advantages[experience.offsets[:-1]]  # of a group estimator; all of a response are equal
    torch.testing.assert_close(summary.mean_advantages, firsts.double(), atol=1e-7, rtol=1e-6)


def test_what_the_driver_learns_of_an_evaluation_by_hand():
    responses = response_evaluations(ROLLOUTS, EVALUATIONS)
    for row, (engine, evaluation) in enumerate(zip(ROLLOUTS.logprobs, EVALUATIONS, strict=True)):
        gaps = [abs(a - b) for a, b in zip(engine.tolist(), evaluation.logprobs, strict=True)]
        assert responses.engine_gaps[row].item() == pytest.approx(max(gaps), abs=1e-6)
        log_ratio = sum(evaluation.logprobs) - sum(evaluation.reference_logprobs)
        assert responses.log_ratios[row].item() == pytest.approx(log_ratio, abs=1e-9)
