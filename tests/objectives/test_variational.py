import math

import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from pipeline.config.reward import VRMHeadConfig
from pipeline.models.reward_heads import VRMHead
from pipeline.objectives.preference import bradley_terry_loss
from pipeline.objectives.variational import (
    dirichlet_kl,
    expected_log_weights,
    gaussian_kl,
    gaussian_noise,
    kl_penalty,
    log_weights,
    reward_mean_and_variance,
    sample_dirichlet,
    sampled_reward_moments,
    supervision_scores,
    supervision_target,
    weight_supervision,
)


def test_dirichlet_kl_has_the_value_of_the_spec():
    kl = dirichlet_kl(torch.tensor([[10.0, 4.0, 4.0, 2.0]]), torch.ones(4))
    assert kl.item() == pytest.approx(1.8596581, abs=2e-7)


def test_dirichlet_kl_equals_torch_for_small_and_large_concentrations():
    alpha = torch.tensor([[0.05, 0.3, 1.0, 7.0], [1000.0, 2.0, 50.0, 0.05]], dtype=torch.float64)
    prior = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    expected = kl_divergence(Dirichlet(alpha), Dirichlet(prior.expand_as(alpha)))
    torch.testing.assert_close(dirichlet_kl(alpha, prior), expected)


def test_dirichlet_kl_of_large_concentrations_survives_its_cancellation():
    large, near = torch.full((1, 4), 1e4), torch.tensor([[999.0, 1000.0, 1001.0, 1000.0]])
    # Values by mpmath with 40 digits.
    assert dirichlet_kl(large, torch.ones(4)).item() == pytest.approx(12.6190531, rel=1e-6)
    assert dirichlet_kl(near, torch.full((4,), 1e3)).item() == pytest.approx(0.00100050067, rel=1e-5)
    assert 0.0 <= dirichlet_kl(large, torch.full((4,), 1e4 + 1)).item() < 1e-7
    assert dirichlet_kl(large.bfloat16(), torch.ones(4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("logvar", [100.0, -100.0])
def test_gaussian_kl_of_equal_wide_or_narrow_distributions_is_zero(logvar):
    mean, logvar = torch.ones(1, 2), torch.full((1, 2), logvar)
    assert gaussian_kl(mean, logvar, mean[0], logvar[0]).item() == 0.0


def test_gaussian_kl_has_the_value_of_the_spec():
    kl = gaussian_kl(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 4.0]]).log(), torch.zeros(2), torch.zeros(2))
    assert kl.item() == pytest.approx(3.3068528, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 1.0, 30.0, 1000.0])
def test_gradients_through_the_sample_and_the_kl_are_finite(alpha):
    concentrations = torch.full((16, 4), alpha, requires_grad=True)
    weights = sample_dirichlet(concentrations, torch.arange(16))
    (weights[:, 0].sum() + dirichlet_kl(concentrations, torch.ones(4)).sum()).backward()
    assert torch.isfinite(concentrations.grad).all()


def test_samples_lie_on_the_simplex_with_the_dirichlet_mean():
    alpha = torch.tensor([[8.0, 4.0, 2.0, 2.0]]).expand(20_000, 4)
    weights = sample_dirichlet(alpha, torch.arange(20_000))
    torch.testing.assert_close(weights.sum(-1), torch.ones(20_000))
    # sd of a component is at most sqrt(.25 / 17) = .121; four standard errors of 20,000 draws
    torch.testing.assert_close(weights.mean(0), torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.0035, rtol=0)


def test_a_sample_depends_on_its_seed_not_on_its_batch():
    alpha = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.2, 1.0], [1.0, 1.0, 1.0]])
    seeds = torch.tensor([11, 12, 13])
    together = sample_dirichlet(alpha, seeds)
    alone = torch.cat([sample_dirichlet(alpha[i : i + 1], seeds[i : i + 1]) for i in range(3)])
    assert torch.equal(together, alone)
    assert torch.equal(gaussian_noise(seeds, draws=2, dims=3)[1], gaussian_noise(seeds[1:2], draws=2, dims=3)[0])


def test_sampling_stays_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = sample_dirichlet(torch.ones(2, 3), torch.tensor([1, 2]))
    assert weights.dtype == torch.float32


def test_closed_form_reward_matches_samples():
    generator = torch.Generator().manual_seed(0)
    alpha = torch.tensor([2.0, 1.0, 0.5])
    mu, logvar = torch.tensor([0.3, -1.0]), torch.tensor([-0.5, 0.2])
    matrix = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.2]])
    mean, variance = reward_mean_and_variance(alpha[None], mu[None], logvar[None], matrix)
    n = 400_000
    gammas = torch._standard_gamma(alpha.expand(n, 3), generator=generator)
    weights = gammas / gammas.sum(-1, keepdim=True)
    features = mu + (0.5 * logvar).exp() * torch.randn(n, 2, generator=generator)
    rewards = (weights * (features @ matrix.T)).sum(-1)
    assert mean.item() == pytest.approx(rewards.mean().item(), abs=4 * rewards.std().item() / math.sqrt(n))
    assert variance.item() == pytest.approx(rewards.var().item(), rel=0.02)


def test_sampled_moments_agree_with_the_closed_form():
    alpha, matrix = torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.2]])
    mu, logvar = torch.tensor([[0.3, -1.0]]), torch.tensor([[-0.5, 0.2]])
    mean, variance = reward_mean_and_variance(alpha, mu, logvar, matrix)
    sampled_mean, sampled_variance = sampled_reward_moments(
        lambda w, z: (w * (z @ matrix.T)).sum(-1), alpha, mu, logvar, draws=100_000
    )
    assert sampled_mean.item() == pytest.approx(mean.item(), abs=4 * math.sqrt(variance.item() / 100_000))
    assert sampled_variance.item() == pytest.approx(variance.item(), rel=0.03)


def test_sampled_moments_of_a_row_depend_on_that_row_alone():
    alpha = torch.tensor([[0.5, 1.0], [3.0, 0.2], [0.5, 1.0]])
    mu, logvar = torch.tensor([[0.1], [0.2], [0.1]]), torch.tensor([[0.0], [-1.0], [0.0]])

    def moments(rows):
        return sampled_reward_moments(
            lambda w, z: w[..., 0] * z[..., 0].tanh(), alpha[rows], mu[rows], logvar[rows], draws=16
        )

    together = moments([0, 1, 2])
    assert all(torch.equal(t[0], t[2]) for t in together)  # equal rows meet equal noise
    for row in range(3):
        assert all(
            torch.equal(alone[0], all_rows[row]) for alone, all_rows in zip(moments([row]), together, strict=True)
        )


@pytest.mark.parametrize("decoder", ["bilinear", "mlp", "film"])
def test_the_elbo_at_kl_weight_one_never_exceeds_ln_half(decoder):
    """docs/method.md section 3: with fixed priors, every encoder and decoder is bounded by ln 1/2."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    n = 50_000
    for _ in range(5):
        alpha = torch.rand(3, generator=generator) * 5 + 0.2
        mus = torch.randn(2, 2, generator=generator)
        logvars = torch.randn(2, 2, generator=generator)
        config = VRMHeadConfig(decoder=decoder, decoder_hidden_size=8, semantic_dims=2, hidden_size=4)
        head = VRMHead(4, 3, config)
        gammas = torch._standard_gamma(alpha.expand(n, 3), generator=generator)
        weights = gammas / gammas.sum(-1, keepdim=True)
        features = mus + (0.5 * logvars).exp() * torch.randn(n, 2, 2, generator=generator)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.mul_(4.0)  # rewards of several units, so that the likelihood has something to lose
            rewards = head.decode(weights.unsqueeze(1).expand(n, 2, 3), features)
        log_likelihood = -bradley_terry_loss(rewards[:, 0] - rewards[:, 1])
        kl = dirichlet_kl(alpha[None], torch.ones(3)) + gaussian_kl(mus, logvars, torch.zeros(2), torch.zeros(2)).sum()
        standard_error = log_likelihood.std().item() / math.sqrt(n)
        assert log_likelihood.mean().item() - kl.item() <= math.log(0.5) + 4 * standard_error


def test_the_elbo_at_the_prior_with_a_constant_reward_is_ln_half():
    """Where the bound is attained, and why the objective collapses."""
    kl = dirichlet_kl(torch.ones(1, 3), torch.ones(3)) + 2 * gaussian_kl(*[torch.zeros(1, 2)] * 4)
    assert (-bradley_terry_loss(torch.zeros(1)) - kl).item() == pytest.approx(math.log(0.5))


def test_supervision_target_is_the_softmax_of_the_annotated_scores():
    scores = torch.tensor([[0.0, math.log(3.0), 9.0], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    target, supervised = supervision_target(scores, mask, temperature=1.0)
    torch.testing.assert_close(target, torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]]))
    assert supervised.tolist() == [[True, True, False], [False, False, False]]  # one score says nothing


def test_weight_supervision_renormalises_over_the_annotated_objectives():
    target = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    log_w = log_weights(torch.tensor([[1.0, 1.0, 8.0], [1.0, 2.0, 3.0]]), mask)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    torch.testing.assert_close(weight_supervision(target, mask, log_w, "kl"), torch.tensor([expected, 0.0]))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        # target (.5, .3, .2), weights (.2, .5, .3)
        ("kl", 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.2 * math.log(0.2 / 0.3)),
        ("mse", 0.09 + 0.04 + 0.01),
        ("mae", 0.3 + 0.2 + 0.1),
        # pairs (1, 2), (1, 3), (2, 3): softplus(-ln(w_k / w_j)) = ln(1 + w_j / w_k)
        ("rank", (math.log(1 + 5 / 2) + math.log(1 + 3 / 2) + math.log(1 + 3 / 5)) / 3),
    ],
)
def test_supervision_by_hand(form, expected):
    target, weights = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert weight_supervision(target, mask, log_weights(weights, mask), form).item() == pytest.approx(expected)
    scaled = log_weights(40.0 * weights, mask)  # concentrations: their sum does not matter
    assert weight_supervision(target, mask, scaled, form).item() == pytest.approx(expected, rel=1e-5)
    # A fourth objective without annotation changes nothing, however large its weight.
    target, weights = (torch.cat([x, torch.tensor([[y]])], dim=1) for x, y in ((target, 0.0), (weights, 7.0)))
    mask = torch.tensor([[True, True, True, False]])
    assert weight_supervision(target, mask, log_weights(weights, mask), form).item() == pytest.approx(expected)


@pytest.mark.parametrize("form", ["kl", "mse", "mae", "rank"])
def test_rows_without_annotation_have_no_loss_and_no_gradient(form):
    alpha = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], requires_grad=True)
    target = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    loss = weight_supervision(target, mask, log_weights(alpha, mask), form)
    loss.sum().backward()
    assert loss[1].item() == 0.0
    assert alpha.grad[1].tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(alpha.grad).all()
    if form == "rank":  # equal targets order nothing
        assert loss[0].item() == 0.0


def test_every_form_has_its_least_value_at_the_target_except_rank_which_goes_on():
    target = torch.tensor([[0.5, 0.3, 0.2]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    for form in ("kl", "mse", "mae"):
        assert weight_supervision(target, mask, target.log(), form).item() == pytest.approx(0.0, abs=1e-7)
    steeper = log_weights(target**8, mask)
    assert weight_supervision(target, mask, steeper, "rank") < weight_supervision(target, mask, target.log(), "rank")


def test_expected_logarithms_are_those_of_the_samples():
    # E[ln w] under Dir(1, 1) is digamma(1) - digamma(2) = -1; a third, masked objective drops out.
    mask = torch.tensor([[True, True, False]])
    alpha = torch.tensor([[1.0, 1.0, 8.0]])
    torch.testing.assert_close(expected_log_weights(alpha, mask)[0, :2], torch.tensor([-1.0, -1.0]))
    target = torch.tensor([[0.25, 0.75, 0.0]])
    exact = weight_supervision(target, mask, expected_log_weights(alpha, mask), "kl").item()
    draws = sample_dirichlet(alpha.expand(20_000, 3), torch.arange(20_000))
    every = mask.expand(20_000, 3)
    sampled = weight_supervision(target.expand(20_000, 3), every, log_weights(draws, every), "kl")
    assert exact == pytest.approx(sampled.mean().item(), abs=4 * sampled.std().item() / math.sqrt(20_000))


def test_the_target_may_come_from_either_response_or_from_their_difference():
    chosen, chosen_mask = torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    rejected, rejected_mask = torch.tensor([[1.0, 0.0, -3.0, 0.0]]), torch.tensor([[True, False, True, False]])

    def scores(target_from):
        values, mask = supervision_scores(chosen, chosen_mask, rejected, rejected_mask, target_from=target_from)
        return [value if known else None for value, known in zip(values[0].tolist(), mask[0].tolist(), strict=True)]

    assert scores("chosen") == [2.0, 1.0, None, None]
    assert scores("diff") == [1.0, None, None, None]
    assert scores("both") == [1.5, 1.0, -3.0, None]


def test_free_bits_neither_cost_nor_pull():
    kl_w = torch.tensor([0.5, 3.0], requires_grad=True)
    kl_z = torch.tensor([1.9, 5.0], requires_grad=True)
    penalty = kl_penalty(kl_w, kl_z, weight_w=0.1, weight_z=0.01, free_bits=1.0)
    torch.testing.assert_close(penalty, torch.tensor([0.1 * 1 + 0.01 * 2, 0.1 * 3 + 0.01 * 5]))
    penalty.sum().backward()
    torch.testing.assert_close(kl_w.grad, torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(kl_z.grad, torch.tensor([0.0, 0.01]))
