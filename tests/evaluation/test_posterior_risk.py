import math
from dataclasses import asdict, replace

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.evaluation.posterior_risk import posterior_risk
from pipeline.models.backbone import load_backbone
from pipeline.models.packing import pack
from pipeline.models.reward_heads import VRMHead, inverse_bounded_softplus, inverse_soft_clamp
from pipeline.models.reward_model import RewardModel
from tests.support.learners import HEAD, collator, reward_trainer, tokenised


@pytest.fixture
def model(tiny_policy):
    """A VRM at its start, whose posterior of the features is its prior N(0, I)."""
    torch.manual_seed(0)
    backbone = load_backbone(tiny_policy, dtype="float32")
    head = VRMHead(backbone.config.hidden_size, 4, HEAD)
    with torch.no_grad():
        head.feature_head.output.weight.zero_()
        head.feature_head.output.bias[HEAD.semantic_dims :] = inverse_soft_clamp(
            0.0, low=HEAD.logvar_min, high=HEAD.logvar_max
        )
    return RewardModel(backbone, head).eval()


def measure(model, pairs, *, samples=8, seed=0, max_tokens=512):
    return posterior_risk(
        model,
        pairs,
        prior=HEAD,
        samples=samples,
        seed=seed,
        max_tokens_per_batch=max_tokens,
        device="cpu",
    )


def that_says_something(model):
    """The same model with features and weights that differ from prompt to prompt."""
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.feature_head.output.weight, std=0.5)
    torch.nn.init.normal_(model.head.weight_head.output.weight, std=0.3)
    return model


def test_at_its_prior_a_model_has_no_divergence_and_errs_as_often_as_a_coin(model, world, tokenizer):
    pairs = tokenised(world, tokenizer)
    risk = measure(model, pairs, samples=100)
    assert risk.num_pairs == len(pairs) == 64
    assert risk.kl == pytest.approx(0.0, abs=1e-4)
    assert risk.gibbs_risk == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(64 * 100))
    assert risk.mean_reward_errors == 64  # every reward is 0: a tie is an error


def test_with_certain_weights_the_gibbs_risk_is_the_normal_tail_of_the_margin(model, world, tokenizer):
    that_says_something(model)
    head = model.head
    with torch.no_grad():  # alpha = 900 throughout: w is uniform up to 0.007
        head.weight_head.output.weight.zero_()
        head.weight_head.output.bias.fill_(inverse_bounded_softplus(900.0, low=HEAD.alpha_min, high=HEAD.alpha_max))
    pairs = tokenised(world, tokenizer)
    tails = []
    for pair in pairs:
        with torch.no_grad():
            posterior = head(*model.encode(pack([pair.tokens])), None)
        direction = head.score_matrix.detach().mean(0)  # w^T S
        mean = float((direction * (posterior.mu[0] - posterior.mu[1])).sum())
        variance = float((direction**2 * posterior.logvar.exp().sum(0)).sum())
        tails.append(0.5 * math.erfc(mean / math.sqrt(2.0 * variance)))
    sure = [i for i, tail in enumerate(tails) if tail < 0.4]  # over all pairs the tails average to the coin's 1/2
    expected = sum(tails[i] for i in sure) / len(sure)
    assert expected < 0.35
    risk = measure(model, [pairs[i] for i in sure], samples=200)
    assert risk.gibbs_risk == pytest.approx(expected, abs=4 * risk.gibbs_risk_standard_error + 1e-3)


def test_divergences_and_errors_are_those_of_the_trainer_s_evaluation(tiny_policy, world, tokenizer):
    trainer = reward_trainer(tiny_policy, world, tokenizer)
    that_says_something(trainer.engine.module)
    pairs = tokenised(world, tokenizer)
    metrics = trainer.evaluate(collator(world, tokenizer)(pairs, 0))
    risk = measure(trainer.engine.module, pairs)
    assert risk.kl_w == pytest.approx(64 * metrics["eval/kl_w"], rel=1e-4)
    assert risk.kl_z_chosen + risk.kl_z_rejected == pytest.approx(64 * metrics["eval/kl_z"], rel=1e-4)
    assert risk.kl == pytest.approx(risk.kl_w + risk.kl_z_chosen + risk.kl_z_rejected)
    assert risk.mean_reward_errors == round(64 * (1.0 - metrics["eval/accuracy"]))
    assert risk.kl_w > 1.0  # totals, and not of nothing


def test_swapping_the_responses_swaps_their_parts_of_the_divergence(model, world, tokenizer):
    that_says_something(model)
    pairs = tokenised(world, tokenizer)
    risk = measure(model, pairs)
    swapped = measure(
        model, [replace(p, tokens=replace(p.tokens, response_ids=p.tokens.response_ids[::-1])) for p in pairs]
    )
    assert (swapped.kl_z_chosen, swapped.kl_z_rejected) == pytest.approx((risk.kl_z_rejected, risk.kl_z_chosen))
    assert abs(risk.kl_z_chosen - risk.kl_z_rejected) > 0.1
    assert swapped.mean_reward_errors == 64 - risk.mean_reward_errors
    assert swapped.fingerprint != risk.fingerprint


def test_micro_batches_change_nothing_and_the_seed_changes_the_draws_alone(model, world, tokenizer):
    that_says_something(model)
    pairs = tokenised(world, tokenizer)
    risk = measure(model, pairs)
    assert asdict(measure(model, pairs, max_tokens=64)) == pytest.approx(asdict(risk))
    other = measure(model, pairs, seed=1)
    assert other.gibbs_risk != risk.gibbs_risk
    assert (other.kl, other.mean_reward_errors) == (risk.kl, risk.mean_reward_errors)


def test_the_standard_error_is_the_spread_over_seeds(model, world, tokenizer):
    that_says_something(model)
    pairs = tokenised(world, tokenizer)[:24]
    risks = [measure(model, pairs, samples=4, seed=seed) for seed in range(40)]
    spread = torch.tensor([risk.gibbs_risk for risk in risks]).std().item()
    # 40 runs know their spread to 1 / sqrt(78) = 11%.
    assert risks[0].gibbs_risk_standard_error == pytest.approx(spread, rel=0.35)


def test_pairs_of_one_prompt_count_once_among_the_prompts(model, world, tokenizer):
    pair = tokenised(world, tokenizer)[0]
    risk = measure(model, [pair, pair, pair])
    assert (risk.num_pairs, risk.num_prompts) == (3, 1)


def test_a_single_draw_has_no_standard_error(model, world, tokenizer):
    with pytest.raises(ConfigError, match=r"samples = 1: .* at least 2 draws per pair"):
        measure(model, tokenised(world, tokenizer), samples=1)
