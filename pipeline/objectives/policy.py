"""The policy losses: how far a token's probability moved (ratio), and what that is worth (surrogate)."""

from __future__ import annotations

import torch

from pipeline.objectives.masked import masked_sum, require_same_shape


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    num_tokens: int,
) -> torch.Tensor:
    """PPO clipped surrogate, negated for minimisation.

    L = -1/N * sum_t min(r_t * A_t, clip(r_t, 1 - eps, 1 + eps) * A_t),  r_t = pi(a_t|s_t) / pi_old(a_t|s_t)

    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7; summed over tokens, divided by the step-wide count N.

    Args:
        logprobs: [B, T] natural log-probabilities under the current policy; carries gradient.
        old_logprobs: [B, T] the same tokens under the policy before this update; held fixed.
        advantages: [B, T] whitened over the batch, dimensionless.
        mask: [B, T] bool, True on response tokens.
        clip_range: eps > 0, dimensionless.
        num_tokens: N, response tokens in this optimiser step, over all shards and micro-batches.

    Returns:
        Scalar loss. Shard and micro-batch losses add up to the loss of the step.

    Raises:
        ShapeError: the four tensors differ in shape.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    ratio = importance_ratio(logprobs, old_logprobs, mask)
    surrogate = clipped_surrogate(ratio, advantages, clip_low=clip_range, clip_high=clip_range)
    return -masked_sum(surrogate, mask) / num_tokens


# ------------------------------------------------------------------ ratios


def importance_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """r_t = exp(log pi - log pi_old), [B, T]; 1 on padding, so that no infinity reaches the gradient."""
    return torch.exp(_log_ratio(logprobs, old_logprobs, mask))


def geometric_mean_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """s = (pi(y|x) / pi_old(y|x))^(1/|y|) = exp(mean_t(log pi - log pi_old)), repeated over the row: [B, T].

    Source: Zheng et al. 2025 (GSPO), arXiv:2507.18071, Eq. 7.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return torch.exp(mean).expand_as(log_ratio)


def product_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """pi(y|x) / pi_old(y|x) = exp(sum_t(log pi - log pi_old)), the whole response as one action, repeated: [B, T].

    Cut at e^20, where its gradient ends: a product over a thousand tokens would leave float32.

    Source: Ahmadian et al. 2024 (RLOO), arXiv:2402.14740, section 3: the bandit view of a response.
    """
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    return torch.exp(log_ratio.sum(-1, keepdim=True).clamp(max=20.0)).expand_as(log_ratio)


def truncated_importance_weights(
    learner_logprobs: torch.Tensor, engine_logprobs: torch.Tensor, mask: torch.Tensor, *, cap: float
) -> torch.Tensor:
    """w_t = min(pi_learner(a_t|s_t) / pi_engine(a_t|s_t), C): the samples are the engine's, the gradient the learner's.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (TIS).

    Args:
        learner_logprobs: [B, T] before the update, nats.
        engine_logprobs: [B, T] of the same tokens as sampled, nats.
        mask: [B, T] bool.
        cap: C >= 1, dimensionless.

    Returns:
        [B, T] weights in (0, C]; 1 on padding.
    """
    return importance_ratio(learner_logprobs, engine_logprobs, mask).clamp(max=cap)


def _log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    return torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))


# ------------------------------------------------------------------ surrogates


def clipped_surrogate(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), per token, to be maximised; with a dual clip never below c A.

    A positive advantage is clipped from above, a negative one from below. The dual clip bounds what is left: the loss
    of a bad token that became far more likely.

    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7; eps_high > eps_low ("clip-higher"): Yu et al. 2025,
    arXiv:2503.14476, Eq. 10; dual clip: Ye et al. 2020, arXiv:1912.09729, "Dual-clip PPO".

    Args:
        ratio: [B, T] r > 0; carries gradient.
        advantages: [B, T] A, dimensionless.
        clip_low, clip_high: eps_low, eps_high > 0.
        dual_clip: c > 1 + eps_high, or None.

    Returns:
        [B, T].
    """
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return surrogate
    return torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)


def clipped_tokens(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_range: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> torch.Tensor:
    """Number of tokens whose gradient `clipped_surrogate` removes: a bound is strictly in force. Scalar.

    `clip_range` is eps_low, and eps_high too unless `clip_high` is given.
    """
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + (clip_range if clip_high is None else clip_high))
    removed = clipped * advantages < ratio * advantages
    if dual_clip is not None:
        removed |= (advantages < 0) & (ratio > dual_clip)
    return masked_sum(removed.to(ratio.dtype), mask)


def cispo_surrogate(
    ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, *, clip_low: float, clip_high: float
) -> torch.Tensor:
    """stop_gradient(clip(r, 1 - eps_low, 1 + eps_high)) A log pi, per token, to be maximised.

    The weight is bounded, the gradient of no token is lost.

    Source: MiniMax 2025 (CISPO), arXiv:2506.13585, Eqs. 4 and 5.

    Args:
        ratio: [B, T] r > 0.
        logprobs: [B, T] log pi, 0 on padding; carries the gradient.
        advantages: [B, T] A, dimensionless.
        clip_low, clip_high: eps_low, eps_high > 0; eps_low = 1 leaves small ratios alone, as the paper does.

    Returns:
        [B, T].
    """
    return ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high) * advantages * logprobs


def bounded_weights(ratio: torch.Tensor, mask: torch.Tensor, *, clip_low: float, clip_high: float) -> torch.Tensor:
    """Number of tokens whose weight `cispo_surrogate` changes. Scalar."""
    outside = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)
    return masked_sum(outside.to(ratio.dtype), mask)
