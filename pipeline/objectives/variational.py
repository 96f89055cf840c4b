"""The variational part of VRM: divergences, reparameterised samples, supervision, the closed-form reward.

Source: VRM, arXiv 2603.04974; equation numbers are the paper's. Everything here is float32: a Dirichlet cannot be
sampled in bfloat16, and its lgamma is wrong by 0.4 there.

Shapes: B prompts, K objectives, d semantic dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from pipeline.objectives.masked import require_same_shape

SIMPLEX_FLOOR = 1e-6

INFERENCE_SEED = 0
"""Seed of the noise that estimates a posterior without closed form; one for all rows, so scores repeat."""


def dirichlet_kl(alpha: torch.Tensor, prior_alpha: torch.Tensor) -> torch.Tensor:
    """KL( Dir(alpha) || Dir(alpha0) ), Eq. 8.

    KL = lgamma(A) - sum_k lgamma(alpha_k) - lgamma(A0) + sum_k lgamma(alpha0_k)
         + sum_k (alpha_k - alpha0_k) * (digamma(alpha_k) - digamma(A)),   A = sum_k alpha_k, A0 = sum_k alpha0_k

    The terms grow as A ln A and all but cancel, so they are taken in float64: in float32 the sum is wrong by 0.02 at
    concentrations of 10,000.

    Args:
        alpha: [B, K] concentrations > 0.
        prior_alpha: [K] or [B, K] concentrations of the prior.

    Returns:
        [B] nats, >= 0; float32, or float64 where an input is.
    """
    dtype = _at_least_float32(alpha, prior_alpha)
    alpha, prior_alpha = alpha.double(), prior_alpha.double().expand_as(alpha)
    total, prior_total = alpha.sum(-1), prior_alpha.sum(-1)
    log_normalisers = (
        torch.lgamma(total)
        - torch.lgamma(alpha).sum(-1)
        - torch.lgamma(prior_total)
        + torch.lgamma(prior_alpha).sum(-1)
    )
    expected_log_w = torch.digamma(alpha) - torch.digamma(total).unsqueeze(-1)
    return (log_normalisers + ((alpha - prior_alpha) * expected_log_w).sum(-1)).clamp(min=0.0).to(dtype)


def _at_least_float32(*tensors: torch.Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def gaussian_kl(
    mu: torch.Tensor, logvar: torch.Tensor, prior_mu: torch.Tensor, prior_logvar: torch.Tensor
) -> torch.Tensor:
    """KL( N(mu, diag exp(logvar)) || N(m0, diag exp(logvar0)) ), Eq. 9 with diagonal covariances.

    KL = 1/2 * sum_j [ (exp(lv_j) + (mu_j - m0_j)^2) / v0_j - 1 - lv_j + ln v0_j ]

    Args:
        mu, logvar: [B, d] float32.
        prior_mu, prior_logvar: [d] or [B, d].

    Returns:
        [B] nats, >= 0.
    """
    require_same_shape(mu=mu, logvar=logvar)
    return gaussian_kl_per_dimension(mu, logvar, prior_mu, prior_logvar).sum(-1)


def gaussian_kl_per_dimension(
    mu: torch.Tensor, logvar: torch.Tensor, prior_mu: torch.Tensor, prior_logvar: torch.Tensor
) -> torch.Tensor:
    """The [B, d] summands of `gaussian_kl`."""
    # expm1 keeps what is left of exp(x) - 1 - x near 0, and a ratio of variances is finite where each is not.
    log_ratio = logvar - prior_logvar
    distance = (mu - prior_mu) * torch.exp(-0.5 * prior_logvar)
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + distance**2)


def kl_penalty(
    kl_w: torch.Tensor, kl_z: torch.Tensor, *, weight_w: float, weight_z: float, free_bits: float
) -> torch.Tensor:
    """beta_w max(KL_w, f) + beta_z max(KL_zw + KL_zl, 2 f): below f a divergence is free.

    Source: the weighted KL terms of VRM Eq. 14; free bits as in Kingma et al. 2016, arXiv:1606.04934, Eq. 15. Theirs is
    a bound on a mini-batch mean. Ours is per sample, so sharding changes nothing (docs/method.md section 3).

    Args:
        kl_w: [B] divergence of the objective weights.
        kl_z: [B] divergences of both responses' features, added.
        weight_w, weight_z: beta_w, beta_z >= 0.
        free_bits: f >= 0, in the unit of the divergences; 0 leaves them as they are.

    Returns:
        [B].
    """
    if free_bits > 0:
        kl_w, kl_z = kl_w.clamp(min=free_bits), kl_z.clamp(min=2.0 * free_bits)
    return weight_w * kl_w + weight_z * kl_z


def sample_dirichlet(alpha: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """w ~ Dir(alpha), one draw per row, differentiable in alpha (Eq. 10).

    w = g / sum_k g_k,  g_k ~ Gamma(alpha_k, 1) with implicit reparameterisation gradients
    (Figurnov et al. 2018, arXiv:1805.08498). The draw is clamped away from 0 and renormalised.

    Each row has a generator of its own, so the draw depends on its seed and on no other row. Neither sharding nor
    micro-batching changes it.

    Args:
        alpha: [B, K] float32, any device.
        seeds: [B] int64.

    Returns:
        [B, K] on the simplex.
    """
    gammas = torch.stack([
        torch._standard_gamma(row, _generator(seed, 0))
        for row, seed in zip(alpha.cpu(), seeds.tolist(), strict=True)
    ])  # fmt: skip
    return _onto_the_simplex(gammas.to(alpha.device))


def dirichlet_draws(alpha: torch.Tensor, *, draws: int, seed: int) -> torch.Tensor:
    """[B, K] concentrations to [B, draws, K] weights; every row is drawn with the same noise."""
    gammas = torch.stack([torch._standard_gamma(row.expand(draws, -1), _generator(seed, 0)) for row in alpha.cpu()])
    return _onto_the_simplex(gammas.to(alpha.device))


def _onto_the_simplex(gammas: torch.Tensor) -> torch.Tensor:
    """Gamma draws [*, K] to weights [*, K] that sum to 1, none of them below about `SIMPLEX_FLOOR`."""
    weights = (gammas / gammas.sum(-1, keepdim=True).clamp(min=torch.finfo(gammas.dtype).tiny)).clamp(min=SIMPLEX_FLOOR)
    return weights / weights.sum(-1, keepdim=True)


def gaussian_noise(seeds: torch.Tensor, *, draws: int, dims: int) -> torch.Tensor:
    """[B, draws, dims] standard normal noise; row b depends on seeds[b] alone. On the CPU, float32."""
    return torch.stack([torch.randn(draws, dims, generator=_generator(seed, 1)) for seed in seeds.tolist()])


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(2 * seed + stream)


def supervision_scores(
    chosen: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected: torch.Tensor,
    rejected_mask: torch.Tensor,
    *,
    target_from: Literal["chosen", "diff", "both"],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores whose softmax is the supervision target (docs/method.md section 5).

    chosen: s_w                          Eq. 13; the paper's
    diff:   s_w - s_l                    what separates the pair, where both are annotated
    both:   the mean of s_w and s_l      or the one that is annotated

    Args:
        chosen, rejected: [B, K] standardised scores s_w and s_l, 0 where masked.
        chosen_mask, rejected_mask: [B, K] bool, True where annotated.

    Returns:
        scores [B, K] and their mask [B, K].
    """
    require_same_shape(chosen=chosen, chosen_mask=chosen_mask, rejected=rejected, rejected_mask=rejected_mask)
    match target_from:
        case "chosen":
            return chosen, chosen_mask
        case "diff":
            return chosen - rejected, chosen_mask & rejected_mask
        case "both":
            annotated = chosen_mask.int() + rejected_mask.int()
            return (chosen + rejected) / annotated.clamp(min=1), annotated > 0


def supervision_target(
    standardised: torch.Tensor, mask: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """t = softmax(s_hat / tau) over the annotated objectives, Eq. 13.

    Args:
        standardised: [B, K] from `supervision_scores`, in units of standard deviations; ignored where masked.
        mask: [B, K] bool, True where annotated.
        temperature: tau > 0.

    Returns:
        target [B, K], 0 where masked, and the mask [B, K]. Rows with fewer than two objectives are masked: one score
        alone says nothing about relative weights (docs/method.md section 5).
    """
    require_same_shape(standardised=standardised, mask=mask)
    mask = mask & (mask.sum(-1, keepdim=True) >= 2)
    logits = torch.where(mask, standardised / temperature, torch.full_like(standardised, -torch.inf))
    target = torch.softmax(torch.where(mask.any(-1, keepdim=True), logits, torch.zeros_like(logits)), dim=-1)
    return torch.where(mask, target, torch.zeros_like(target)), mask


def log_weights(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """ln( w_k / sum_{j in mask} w_j ): log-weights renormalised over the annotated objectives.

    A renormalised sub-vector of a Dirichlet is the Dirichlet of the sub-alpha. So `weights` may also be concentrations,
    and the result is then the logarithm of the sub-vector's posterior mean.

    Args:
        weights: [B, K] > 0, of any scale.
        mask: [B, K] bool from `supervision_target`.

    Returns:
        [B, K]; meaningless where masked, but finite.
    """
    require_same_shape(weights=weights, mask=mask)
    present = torch.where(mask, weights, torch.zeros_like(weights)).sum(-1, keepdim=True)
    return weights.log() - torch.where(mask.any(-1, keepdim=True), present, torch.ones_like(present)).log()


def expected_log_weights(alpha: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """E_q[ ln w_k ] = digamma(alpha_k) - digamma( sum_{j in mask} alpha_j ), of the renormalised weights.

    Args and result as in `log_weights`, `weights` being the concentrations.
    """
    require_same_shape(alpha=alpha, mask=mask)
    present = torch.where(mask, alpha, torch.zeros_like(alpha)).sum(-1, keepdim=True)
    present = torch.where(mask.any(-1, keepdim=True), present, torch.ones_like(present))
    return torch.digamma(alpha) - torch.digamma(present)


def weight_supervision(
    target: torch.Tensor, mask: torch.Tensor, log_w: torch.Tensor, form: Literal["kl", "mse", "mae", "rank"]
) -> torch.Tensor:
    """L_sup: how far the objective weights are from their target, Eq. 13.

    kl:   sum_k t_k (ln t_k - ln w_k)                the paper's; with expected logarithms E_q[ KL(t || w) ], exactly
    mse:  sum_k (t_k - w_k)^2
    mae:  sum_k |t_k - w_k|
    rank: mean over ordered pairs with t_k > t_j of softplus(-(ln w_k - ln w_j)), 0 without such a pair

    All over the annotated objectives.

    Source: VRM, arXiv 2603.04974, Eq. 13 and section 6.5; docs/method.md section 5.

    Args:
        target: [B, K] from `supervision_target`.
        mask: [B, K] bool from `supervision_target`.
        log_w: [B, K] from `log_weights` or `expected_log_weights`; the latter for "kl" and "rank" only.

    Returns:
        [B], nats for "kl" and "rank"; 0 for rows without annotation.
    """
    require_same_shape(target=target, mask=mask, log_w=log_w)
    match form:
        case "kl":
            terms = torch.xlogy(target, target) - target * log_w
        case "mse":
            terms = (target - log_w.exp()) ** 2
        case "mae":
            terms = (target - log_w.exp()).abs()
        case "rank":
            above = (target.unsqueeze(-1) > target.unsqueeze(-2)) & mask.unsqueeze(-1) & mask.unsqueeze(-2)
            losses = F.softplus(log_w.unsqueeze(-2) - log_w.unsqueeze(-1))
            losses = torch.where(above, losses, torch.zeros_like(losses))
            return losses.sum((-1, -2)) / above.sum((-1, -2)).clamp(min=1)
    return torch.where(mask, terms, torch.zeros_like(terms)).sum(-1)


def reward_mean_and_variance(
    alpha: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor, score_matrix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """E[r] and Var[r] of r = <w, S z> under q(w|x) q(z|x,y), in closed form for the bilinear decoder.

    w_bar = alpha / A,  s_bar = S mu,  Sz = S diag(sigma^2) S^T,  C = (diag(w_bar) - w_bar w_bar^T) / (A + 1)
    E[r]   = <w_bar, s_bar>
    Var[r] = w_bar^T Sz w_bar + tr( C (s_bar s_bar^T + Sz) )

    Source: docs/method.md section 7 (w and z are independent under q).

    Args:
        alpha: [N, K]; mu, logvar: [N, d]; score_matrix: S, [K, d]; all float32.

    Returns:
        mean [N] and variance [N] >= 0.
    """
    total = alpha.sum(-1, keepdim=True)
    w_bar = alpha / total
    s_bar = mu @ score_matrix.T
    score_covariance = torch.einsum("kj,nj,lj->nkl", score_matrix, logvar.exp(), score_matrix)
    second_moment = s_bar.unsqueeze(-1) * s_bar.unsqueeze(-2) + score_covariance
    weight_covariance = (torch.diag_embed(w_bar) - w_bar.unsqueeze(-1) * w_bar.unsqueeze(-2)) / (total + 1.0).unsqueeze(
        -1
    )
    variance = torch.einsum("nk,nkl,nl->n", w_bar, score_covariance, w_bar) + (weight_covariance * second_moment).sum(
        (-1, -2)
    )
    return (w_bar * s_bar).sum(-1), variance.clamp(min=0.0)


def sampled_reward_moments(
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    alpha: torch.Tensor,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    *,
    draws: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Monte-Carlo estimates of E[r] and Var[r] of r = g(w, z) for any decoder.

    u_l = g(w_l, mu + sigma * eps_l),  v_l = g(w_l, mu + sigma * eps'_l):  L draws of w, each with two of z
    E[r] = mean of u and v,   Var[r] = 1/2 (var u + var v)

    All rows share one fixed set of noise, so a score does not depend on when it is computed or with which other rows.

    Source: docs/method.md section 7.

    Args:
        decode: g, [*, K] and [*, d] -> [*].
        alpha: [N, K]; mu, logvar: [N, d]; all float32.
        draws: L >= 2.

    Returns:
        mean [N] and variance [N] >= 0.
    """
    weights = dirichlet_draws(alpha, draws=draws, seed=INFERENCE_SEED)
    noise = gaussian_noise(torch.tensor([INFERENCE_SEED]), draws=2 * draws, dims=mu.shape[-1]).to(mu.device)
    features = mu.unsqueeze(1) + torch.exp(0.5 * logvar).unsqueeze(1) * noise
    rewards = decode(torch.cat([weights, weights], dim=1), features).unflatten(1, (2, draws))
    return rewards.mean((1, 2)), rewards.var(-1).mean(-1)
