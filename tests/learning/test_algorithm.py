"""The algorithms of the PPO family: one update, the same on any number of shards, a critic only where one is due."""

import math
from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.config.algorithms import PolicyGradientAlgorithm
from pipeline.config.alignment import AlignmentConfig, KLConfig, PPOConfig
from pipeline.config.models import OptimiserConfig
from pipeline.errors import NumericsError, ShapeError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.algorithm import ADVANTAGES, AVERAGES, RATIOS, SURROGATES, SampledTokens, policy_loss
from pipeline.objectives.aggregation import MiniBatchSize
from pipeline.objectives.policy import clipped_policy_loss
from pipeline.records import CriticTargets, Prompt, RewardScore, Rollout, TokenEvaluation
from tests.learning.test_updates import ShardOfMany, assert_same, gradients, samples_of, sharded_gradients
from tests.support.experience import experience_of_step
from tests.support.fakes import FakeScorer
from tests.support.learners import ppo_learner
from tests.support.lockstep import run_ranks

ALGORITHMS = get_args(PolicyGradientAlgorithm)


def config_of(algorithm, **ppo):
    """Three prompts of three samples: one optimiser step, so that a gradient is the gradient of the whole step."""
    rates = {"policy": OptimiserConfig(learning_rate=1e-3), "critic_learning_rate": 1e-3}
    written = {"epochs": 1, "mini_batch_size": 9, "critic": "value_head"} | rates
    return AlignmentConfig(
        algorithm=algorithm,
        num_steps=6,
        prompts_per_step=3,
        samples_per_prompt=3,
        max_response_tokens=12,
        ppo=PPOConfig.model_validate(written | ppo),
        max_tokens_per_micro_batch=64,
    )


def build(samples, scores, evaluations, config):
    """Of lists of records, or of columns."""
    return experience_of_step(
        Rollouts.of(samples),
        scores,
        TokenEvaluations.of(evaluations),
        config,
        kl_coefficient=config.kl.coefficient,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )


# ------------------------------------------------------------------ by hand


def rollout(prompt, index, tokens, *, logprobs=None, finish="stop"):
    return Rollout(
        prompt=Prompt(id=prompt, messages=({"role": "user", "content": "why ?"},), token_ids=(1, 2)),
        sample_index=index,
        response_ids=tuple(tokens),
        response_text="",
        logprobs=tuple(logprobs or [-1.0] * len(tokens)),
        policy_version=0,
        finish_reason=finish,
    )


def score(mean):
    return RewardScore(mean=mean, std=0.0, objective_weights=(), objective_scores=())


def evaluation(logprobs, reference=None):
    return TokenEvaluation(
        logprobs=tuple(logprobs),
        reference_logprobs=tuple(reference or logprobs),
        values=(0.0,) * len(logprobs),
    )


TWO_GROUPS = [rollout("p", 0, (7, 8)), rollout("p", 1, (9,)), rollout("q", 0, (7,)), rollout("q", 1, (8,))]
EVALUATIONS = [evaluation((-1.0, -1.0), (-2.0, -1.5)), evaluation((-1.0,)), evaluation((-1.0,)), evaluation((-1.0,))]


def test_the_reward_of_a_group_holds_the_kl_where_the_recipe_puts_it_there():
    config = config_of("rloo")
    scores = [score(m) for m in (3.0, 1.0, 0.5, 0.5)]
    experience, metrics = build(TWO_GROUPS, scores, EVALUATIONS, config)
    # KL of the first response 1 + .5 nats, beta .05: R = 3 - .075 = 2.925 against 1
    expected = [1.925, 1.925, -1.925, 0.0, 0.0]
    torch.testing.assert_close(experience.advantages, torch.tensor(expected))
    assert experience.kl_loss_coefficient == 0.0
    assert experience.critic is None
    assert metrics["group/uniform"] == 0.5
    assert "value/mean" not in metrics


@pytest.mark.parametrize(
    ("estimator", "kl"),
    [
        ("k1", (1.0, -0.5)),
        ("k2", (0.5, 0.125)),
        ("k3", (math.exp(-1.0), math.exp(0.5) - 1.5)),  # e^-1 - 1 + 1 and e^.5 - 1 - .5
    ],
)
def test_the_token_rewards_hold_the_estimate_of_the_kl_that_was_asked_for(estimator, kl):
    config = config_of("ppo", discount=0.0, whiten_advantages=False)  # without a future a return is a token's reward
    config = config.model_copy(update={"kl": KLConfig(coefficient=0.1, estimator=estimator)})
    evaluations = [evaluation((-1.0, -1.0), (-2.0, -0.5))]  # log pi - log pi_ref = 1, -.5
    experience, metrics = build([rollout("p", 0, (7, 8))], [score(3.0)], evaluations, config)
    torch.testing.assert_close(experience.critic.returns, torch.tensor([-0.1 * kl[0], 3.0 - 0.1 * kl[1]]))
    assert metrics["kl/per_response"] == 0.5  # of the controller and the stop rule: k1 whatever the penalty


def test_a_kl_in_the_loss_leaves_the_reward_alone():
    experience, _ = build(TWO_GROUPS, [score(m) for m in (3.0, 1.0, 0.5, 0.5)], EVALUATIONS, config_of("grpo"))
    # deviations 1 and -1, Bessel deviation sqrt(2)
    z = 1 / (2**0.5 + 1e-4)
    torch.testing.assert_close(experience.advantages[:3], torch.tensor([z, z, -z]))
    assert experience.kl_loss_coefficient == 0.04
    torch.testing.assert_close(experience.reference_logprobs[:2], torch.tensor([-2.0, -1.5]))


def test_dynamic_sampling_drops_the_prompt_whose_samples_are_all_alike():
    config = config_of("dapo", overlong_buffer=0.0)
    experience, metrics = build(TWO_GROUPS, [score(m) for m in (3.0, 1.0, 0.5, 0.5)], EVALUATIONS, config)
    assert [sequence.response_ids for sequence in experience.sequences] == [((7, 8),), ((9,),)]
    assert experience.num_response_tokens == 3
    assert metrics["group/uniform"] == 0.5
    assert metrics["reward/mean"] == 1.25  # of all four


def test_a_batch_of_nothing_but_uniform_groups_is_kept_and_teaches_nothing():
    config = config_of("dapo", overlong_buffer=0.0)
    experience, _ = build(TWO_GROUPS, [score(1.0)] * 4, EVALUATIONS, config)
    assert len(experience.sequences) == 4
    assert experience.advantages.abs().max() == 0.0


def test_the_overlong_penalty_is_part_of_the_reward():
    config = config_of("dapo", overlong_buffer=0.5).model_copy(update={"max_response_tokens": 4})
    rollouts = [rollout("p", 0, (7,) * 3), rollout("p", 1, (9,))]
    experience, metrics = build(
        rollouts, [score(1.0), score(1.0)], [evaluation((-1.0,) * 3), evaluation((-1.0,))], config
    )
    # buffer of 2 before the limit of 4: 3 tokens cost .5, 1 token nothing
    assert metrics["reward/shaped"] == 0.75
    assert (experience.advantages[:3] < 0).all()
    assert experience.advantages[3] > 0


def test_reinforce_plus_plus_whitens_the_rewards_to_go_of_the_batch():
    config = config_of("reinforce_plus_plus")
    experience, _ = build(
        [rollout("p", 0, (7, 8)), rollout("q", 0, (9,))],
        [score(3.0), score(1.0)],
        [evaluation((-1.0, -1.0), (-2.0, -1.5)), evaluation((-1.0,))],
        config,
    )
    # R = (-.01, 3 - .005), (1): to go (2.985, 2.995), (1)
    to_go = torch.tensor([2.985, 2.995, 1.0])
    expected = (to_go - to_go.mean()) / to_go.std()
    torch.testing.assert_close(experience.advantages, expected)


def test_the_engines_distribution_is_corrected_for_up_to_the_cap():
    config = config_of("grpo", tis_cap=2.0)
    rollouts = [rollout("p", 0, (7, 8), logprobs=(-3.0, -1.0)), rollout("p", 1, (9,), logprobs=(-0.5,))]
    experience, metrics = build(
        rollouts, [score(1.0), score(2.0)], [evaluation((-1.0, -1.0)), evaluation((-1.0,))], config
    )
    # e^2 -> 2, 1, e^-.5
    torch.testing.assert_close(experience.importance_weights, torch.tensor([2.0, 1.0, 2.718281828**-0.5]))
    assert metrics["importance/capped"] == pytest.approx(1 / 3)


def test_engine_logprobs_that_are_not_finite_are_refused():
    rollouts = [rollout("p", 0, (7,), logprobs=(float("nan"),)), rollout("p", 1, (9,))]
    with pytest.raises(NumericsError, match="sample 0: 1 of 1 engine logprobs are not finite"):
        build(rollouts, [score(1.0)] * 2, [evaluation((-1.0,))] * 2, config_of("grpo"))


def test_a_group_with_a_sample_missing_is_refused_by_name():
    with pytest.raises(ShapeError, match=r"3 rollouts are not whole groups of samples 0 to 1.*'p' has 2, 'q' has 1"):
        build(TWO_GROUPS[:3], [score(1.0)] * 3, EVALUATIONS[:3], config_of("grpo"))


def test_every_choice_of_a_recipe_has_its_mathematics():
    for field, table in {
        "advantages": ADVANTAGES,
        "ratio": RATIOS,
        "surrogate": SURROGATES,
        "aggregation": AVERAGES,
    }.items():
        assert set(get_args(PPOConfig.model_fields[field].annotation)) == set(table)


# ------------------------------------------------------------------ the loss


def random_tokens(seed=0, rows=4, columns=5):
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, reference, advantages = (torch.randn(rows, columns, generator=generator) * 0.5 for _ in range(4))
    mask = torch.arange(columns) < torch.tensor([[5], [2], [1], [4]])
    zero = torch.zeros_like(logprobs)
    logprobs, old, reference = (torch.where(mask, x - 1.0, zero) for x in (logprobs, old, reference))
    size = MiniBatchSize(num_tokens=int(mask.sum()), num_responses=rows, max_response_tokens=8)
    return logprobs, old, reference, advantages, mask, size


def loss_of(config, logprobs, old, reference, advantages, mask, size, weights=None):
    weights = torch.ones_like(old) if weights is None else weights
    tokens = SampledTokens(
        logprobs=old, reference_logprobs=reference, advantages=advantages, importance_weights=weights, mask=mask
    )
    return policy_loss(logprobs, tokens, ppo=config.ppo, kl=config.kl, size=size)


def test_the_default_loss_is_the_clipped_policy_loss_to_the_bit():
    logprobs, old, reference, advantages, mask, size = random_tokens()
    expected = clipped_policy_loss(logprobs, old, advantages, mask, clip_range=0.2, num_tokens=size.num_tokens)
    assert torch.equal(loss_of(config_of("ppo"), logprobs, old, reference, advantages, mask, size).surrogate, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_on_policy_every_algorithm_is_reinforce(algorithm):
    """At ratio 1 no bound is in force, and the gradient is that of the average of A log pi."""
    config = config_of(algorithm)
    logprobs, _, reference, advantages, mask, size = random_tokens()
    # An advantage of a response, as all but PPO and REINFORCE++ have it: else a ratio of a response mixes tokens.
    advantages = advantages[:, :1].expand_as(advantages)
    logprobs.requires_grad_()
    terms = loss_of(config, logprobs, logprobs.detach(), reference, advantages, mask, size)
    (gradient,) = torch.autograd.grad(terms.surrogate, logprobs)
    lengths = mask.sum(-1, keepdim=True)
    denominator = {
        "token_mean": torch.full_like(lengths, size.num_tokens),
        "sequence_mean": lengths * size.num_responses,
        "fixed_length": torch.full_like(lengths, size.num_responses * size.max_response_tokens),
    }[config.ppo.aggregation]
    if config.ppo.ratio == "product":  # sum_t log pi, not its mean
        denominator = torch.full_like(lengths, size.num_responses)
    torch.testing.assert_close(gradient, torch.where(mask, -advantages / denominator, torch.zeros_like(gradient)))
    assert terms.num_bounded == 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_losses_of_shards_add_up(algorithm):
    config = config_of(algorithm)
    *tensors, size = random_tokens()
    whole = loss_of(config, *tensors, size)
    parts = [loss_of(config, *(x[rows] for x in tensors), size) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0].surrogate + parts[1].surrogate, whole.surrogate)
    torch.testing.assert_close(parts[0].kl + parts[1].kl, whole.kl)
    assert parts[0].num_bounded + parts[1].num_bounded == whole.num_bounded


def test_importance_weights_scale_the_surrogate_and_leave_the_kl():
    *tensors, size = random_tokens()
    plain = loss_of(config_of("grpo"), *tensors, size)
    weighed = loss_of(config_of("grpo"), *tensors, size, weights=torch.full_like(tensors[0], 0.5))
    torch.testing.assert_close(weighed.surrogate, 0.5 * plain.surrogate)
    torch.testing.assert_close(weighed.kl, plain.kl)


@pytest.mark.parametrize(
    ("estimator", "kl", "gradient"),
    [
        ("k2", 0.625 / 2, (1.0 / 2, -0.5 / 2)),  # k^2 / 2, k
        ("k3", (math.exp(-1) + math.exp(0.5) - 1.5) / 2, ((1 - math.exp(-1)) / 2, (1 - math.exp(0.5)) / 2)),
    ],
)
def test_the_kl_of_the_loss_is_the_estimate_that_was_asked_for_and_so_is_its_gradient(estimator, kl, gradient):
    config = config_of("ppo").model_copy(update={"kl": KLConfig(estimator=estimator, place="loss")})
    logprobs, reference = torch.tensor([[-1.0, -1.0]], requires_grad=True), torch.tensor([[-2.0, -0.5]])
    size = MiniBatchSize(num_tokens=2, num_responses=1, max_response_tokens=2)
    mask = torch.ones(1, 2, dtype=torch.bool)
    terms = loss_of(config, logprobs, logprobs.detach(), reference, torch.ones(1, 2), mask, size)
    torch.testing.assert_close(terms.kl, torch.tensor(kl))
    torch.testing.assert_close(torch.autograd.grad(terms.kl, logprobs)[0], torch.tensor([gradient]))


# ------------------------------------------------------------------ the learner


def experience_of(config, learner, world, tokenizer):
    samples = samples_of(learner, world, tokenizer)
    scores = FakeScorer().score([s.prompt.messages for s in samples], [s.response_text for s in samples])
    return build(samples, scores, learner.evaluate_tokens(samples), config)[0]


def moved(experience):
    """As if the policy had been updated before: ratios leave 1, and some bounds are in force."""
    noise = torch.randn(experience.num_response_tokens, generator=torch.Generator().manual_seed(0))
    return replace(experience, logprobs=experience.logprobs + 0.3 * noise, importance_weights=1.0 + 0.1 * noise.abs())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_of_1_2_and_4_shards_agree(algorithm, tiny_policy, world, tokenizer, tmp_path):
    config = config_of(algorithm)

    def learner(max_tokens):
        budget = config.model_copy(update={"max_tokens_per_micro_batch": max_tokens})
        return lambda make_engine: ppo_learner(
            tiny_policy, world, tokenizer, tmp_path, config=budget, make_engine=make_engine
        )

    def run(learner, experience):
        learner.update(experience, 0)

    alone = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    experience = moved(experience_of(config, alone, world, tokenizer))
    whole = sharded_gradients(learner(10_000), experience, 1, run)
    assert any(g.abs().max() > 1e-4 for g in whole.values())
    assert any(name.startswith("value_head") for name in whole) == (algorithm == "ppo")
    for world_size, max_tokens in ((1, 60), (2, 60), (4, 10_000)):
        assert_same(sharded_gradients(learner(max_tokens), experience, world_size, run), whole)


def test_tokens_of_half_the_importance_pull_half_as_hard(tiny_policy, world, tokenizer, tmp_path):
    config = config_of("rloo").model_copy(update={"kl": KLConfig(coefficient=0.0)})
    make_engine = partial(ShardOfMany, rank=0, world_size=1)  # keeps its gradient
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config, make_engine=make_engine)
    experience = experience_of(config, learner, world, tokenizer)
    ones = torch.ones(experience.num_response_tokens)
    losses, pulls = {}, {}
    for weight in (1.0, 0.5):
        weighed = replace(experience, advantages=ones, importance_weights=weight * ones)
        losses[weight] = learner.update(weighed, 0)["ppo/policy_loss"]
        pulls[weight] = gradients(learner.engine)
        learner.engine.module.zero_grad()
    # The ratio is 1: of every token A = 1 times its weight.
    assert losses == pytest.approx({1.0: -1.0, 0.5: -0.5}, rel=1e-5)
    assert_same(pulls[0.5], {name: 0.5 * gradient for name, gradient in pulls[1.0].items()})
    assert any(gradient.abs().max() > 1e-4 for gradient in pulls[1.0].values())


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_without_a_critic_the_values_stay_zero_and_the_policy_moves(algorithm, tiny_policy, world, tokenizer, tmp_path):
    config = config_of(algorithm)
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    before = dict(learner.engine.stream().tensors)
    before = {name: tensor.clone() for name, tensor in before.items()}
    samples = samples_of(learner, world, tokenizer)
    experience = experience_of(config, learner, world, tokenizer)
    metrics = [learner.update(experience, step) for step in range(2)]
    after = dict(learner.engine.stream().tensors)
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("value_head"))
    assert not torch.equal(after["policy.lm_head.weight"], before["policy.lm_head.weight"])
    assert {value for e in learner.evaluate_tokens(samples) for value in e.values} == {0.0}
    assert "ppo/value_loss" not in metrics[0]
    assert ("ppo/kl_loss" in metrics[0]) == (algorithm == "grpo")


def test_the_kl_loss_pulls_toward_the_reference(tiny_policy, world, tokenizer, tmp_path):
    """With advantages of zero only the KL is left: its gradient vanishes at the reference and shrinks it elsewhere."""
    config = config_of("grpo").model_copy(update={"kl": KLConfig(coefficient=1.0, estimator="k3", place="loss")})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    experience = experience_of(config, learner, world, tokenizer)
    experience = replace(experience, advantages=torch.zeros_like(experience.advantages))
    at_the_reference = learner.update(experience, 0)
    assert at_the_reference["ppo/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for parameter in learner.engine.module.policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    losses = [learner.update(experience, step)["ppo/kl_loss"] for step in range(1, 5)]
    assert losses[0] > 0.01
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("estimator", "kl"), [("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_the_learner_adds_the_estimate_of_the_kl_that_was_asked_for(
    estimator, kl, tiny_policy, world, tokenizer, tmp_path
):
    config = config_of("ppo").model_copy(update={"kl": KLConfig(estimator=estimator, place="loss")})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    experience = experience_of(config, learner, world, tokenizer)
    half_a_nat_away = replace(experience, reference_logprobs=experience.logprobs - 0.5)
    metrics = learner.update(half_a_nat_away, 0)
    assert metrics["ppo/kl_loss"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize(
    ("old_value", "clip_range", "coefficient", "loss", "gradient"),
    [
        # A new critic says 0 and is told 1: half the squared error, pulled up by 1.
        (0.0, 0.2, 0.1, 0.5, -0.1),
        (0.0, 0.2, 0.5, 0.5, -0.5),
        # It said -1 before: the clipped value -.8 (-.5) is further off, and its gradient is none.
        (-1.0, 0.2, 0.1, 1.62, 0.0),
        (-1.0, 0.5, 0.1, 1.125, 0.0),
        (-1.0, None, 0.1, 0.5, -0.1),
    ],
)
def test_the_critic_is_clipped_and_weighed_as_the_recipe_says(
    old_value, clip_range, coefficient, loss, gradient, tiny_policy, world, tokenizer, tmp_path
):
    config = config_of("ppo", value_clip_range=clip_range, value_coefficient=coefficient)
    make_engine = partial(ShardOfMany, rank=0, world_size=1)  # keeps its gradient
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config, make_engine=make_engine)
    experience = experience_of(config, learner, world, tokenizer)
    ones = torch.ones(experience.num_response_tokens)
    metrics = learner.update(replace(experience, critic=CriticTargets(values=old_value * ones, returns=ones)), 0)
    assert metrics["ppo/value_loss"] == pytest.approx(loss, rel=1e-5)
    assert learner.engine.module.value_head.bias.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_the_learner_counts_the_tokens_that_were_clipped(tiny_policy, world, tokenizer, tmp_path):
    config = config_of("ppo")
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    samples = Rollouts.of([rollout("p", i, (7, 8)) for i in range(4)])
    experience, _ = build(samples, [score(1.0)] * 4, learner.evaluate_tokens(samples), config)
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9, 1.5, 0.9])
    up_then_down = torch.tensor([1.0, -1.0]).repeat(4)
    metrics = learner.update(
        replace(experience, logprobs=experience.logprobs - ratio.log(), advantages=up_then_down), 0
    )
    # Beyond 1 +- .2, in the direction of its advantage: the first of row 0, the second of row 1, the first of row 3.
    assert metrics["ppo/clip_fraction"] == 3 / 8
    assert metrics["ppo/ratio_mean"] == pytest.approx(8.4 / 8, rel=1e-4)
    assert metrics["ppo/approximate_kl"] == pytest.approx((8.4 - 8 - ratio.log().sum().item()) / 8, rel=1e-3)


def test_the_critic_learns_alone_until_its_warm_up_ends(tiny_policy, world, tokenizer, tmp_path):
    decaying = OptimiserConfig(learning_rate=1e-3, weight_decay=0.5, warmup_fraction=0.0)
    config = config_of("ppo", critic="separate", critic_warmup_steps=2, policy=decaying)
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    experience = experience_of(config, learner, world, tokenizer)
    value_losses = []

    def moved_by_step(step):
        before = {name: tensor.clone() for name, tensor in learner.engine.module.state_dict().items()}
        value_losses.append(learner.update(experience, step)["ppo/value_loss"])
        after = learner.engine.module.state_dict()
        return {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}

    # Not even weight decay moves a policy that rests.
    assert moved_by_step(0) == {"value_head", "critic"}
    assert moved_by_step(1) == {"value_head", "critic"}
    assert moved_by_step(2) == {"value_head", "critic", "policy"}
    assert value_losses[2] < value_losses[0]


def test_whitened_token_rewards_are_what_the_critic_learns_from():
    """lambda = gamma = 1 and no values: the return of the first token is the sum of its response's token rewards."""
    config = config_of("ppo", whiten_rewards=True, reward_transform="none", gae_lambda=1.0)
    samples, evaluations = [rollout("p", i, [7 + i]) for i in range(3)], [evaluation((-1.0,))] * 3
    experience, _ = build(samples, [score(m) for m in (1.0, 2.0, 3.0)], evaluations, config)
    # mean 2, standard deviation 1: nothing to do; twice as far apart, it is undone.
    assert experience.critic.returns.tolist() == pytest.approx([1.0, 2.0, 3.0])
    experience, _ = build(samples, [score(m) for m in (0.0, 2.0, 4.0)], evaluations, config)
    assert experience.critic.returns.tolist() == pytest.approx([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("algorithm", "ppo", "letter"),
    [
        ("ppo", {"critic_warmup_steps": 2}, "critic_warmup_steps = 2 trains a critic of its own, but critic = 'value"),
        ("grpo", {"critic_warmup_steps": 2, "critic": "separate"}, "advantages = 'group_zscore'"),
        ("grpo", {"whiten_rewards": True}, "whiten_rewards scales the rewards of tokens"),
    ],
)
def test_a_choice_that_would_do_nothing_is_refused(algorithm, ppo, letter):
    with pytest.raises(ValueError, match=letter):
        config_of(algorithm, **ppo)


STOPPED = {"epochs": 5, "mini_batch_size": 3, "target_kl": 1e-3}


def test_an_update_ends_when_the_policy_has_moved_too_far_on_all_ranks_alike(tiny_policy, world, tokenizer, tmp_path):
    config = config_of("ppo", **STOPPED)
    alone = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    experience = experience_of(config, alone, world, tokenizer)

    def build_learner(make_engine):
        return ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config, make_engine=make_engine)

    def work(learner):
        return learner.update(experience, 0)

    [whole] = run_ranks(1, build_learner, work)
    # The first mini-batch is on policy; five epochs of three would be 15 steps.
    assert 2 <= whole["ppo/optimiser_steps"] < 15
    for metrics in run_ranks(3, build_learner, work):
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_without_a_limit_an_update_takes_all_its_steps(tiny_policy, world, tokenizer, tmp_path):
    config = config_of("ppo", **{**STOPPED, "target_kl": None})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    assert learner.update(experience_of(config, learner, world, tokenizer), 0)["ppo/optimiser_steps"] == 15


def test_what_dropped_groups_leave_is_cut_into_equal_mini_batches(tiny_policy, world, tokenizer, tmp_path):
    config = config_of("dapo", mini_batch_size=3)
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    sizes = [[len(rows) for rows in learner._mini_batches(n, 0)] for n in (9, 8, 4, 1)]
    assert sizes == [[3, 3, 3], [3, 3, 2], [4], [1]]
    assert sorted(torch.cat(list(learner._mini_batches(8, 0))).tolist()) == list(range(8))


# ------------------------------------------------------------------ rows without a reward


THREE_AND_TWO = [rollout("p", i, (7, 8)[: 1 + i % 2]) for i in range(3)] + [rollout("q", i, (9,)) for i in range(3)]
ONE_NAT_LESS = [evaluation((-1.0,) * len(r.response_ids)) for r in THREE_AND_TWO]


def test_a_dropped_row_leaves_its_group_and_the_denominator():
    scores = [score(3.0), score(1.0), score(-1.0), score(2.0), None, score(0.0)]
    config = config_of("dr_grpo")
    experience, metrics = build(THREE_AND_TWO, scores, ONE_NAT_LESS, config)
    # p has a mean of 1; of q are left 2 and 0, with a mean of 1.
    assert experience.advantages.tolist() == [2.0, 0.0, 0.0, -2.0, 1.0, -1.0]
    assert experience.num_response_tokens == 1 + 2 + 1 + 1 + 1
    assert len(experience.sequences) == 5
    assert metrics["group/alone"] == 0.0
    # the standard deviations 2 and 2^.5 of the two groups
    assert metrics["group/reward_std"] == pytest.approx((2.0 + 2.0**0.5) / 2)


def test_a_row_whose_group_was_dropped_around_it_teaches_nothing_and_is_counted():
    scores = [score(3.0), score(1.0), score(-1.0), None, score(2.0), None]
    experience, metrics = build(THREE_AND_TWO, scores, ONE_NAT_LESS, config_of("grpo"))
    assert len(experience.sequences) == 3
    assert metrics["group/alone"] == 1.0


def test_without_groups_a_row_alone_is_kept():
    scores = [score(3.0), None, None, None, score(2.0), None]
    experience, metrics = build(THREE_AND_TWO, scores, ONE_NAT_LESS, config_of("reinforce_plus_plus"))
    assert len(experience.sequences) == 2
    assert metrics["reward/mean"] == 2.5


def test_uniform_groups_are_dropped_whatever_their_size():
    scores = [score(1.0), score(1.0), None, score(2.0), score(0.0), score(0.0)]
    experience, metrics = build(THREE_AND_TWO, scores, ONE_NAT_LESS, config_of("dapo", overlong_buffer=0.0))
    assert [s.response_ids for s in experience.sequences] == [((9,),)] * 3
    assert metrics["group/uniform"] == 0.5


def test_a_step_of_which_nothing_is_left_is_refused():
    with pytest.raises(NumericsError, match="of 6 rollouts 2 have a reward, and none of them another response"):
        build(THREE_AND_TWO, [score(1.0), None, None, None, None, score(1.0)], ONE_NAT_LESS, config_of("grpo"))
