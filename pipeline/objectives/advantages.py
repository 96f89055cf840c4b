"""From rewards to advantages: reward shaping, token rewards, and the estimators of what a response was worth.

Estimators with a critic or per-token rewards take padded [B, T]; those that compare the G responses to one prompt take
[P, G], one row per prompt. Token rewards are made of the tokens of all responses end to end, [N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from pipeline.errors import ShapeError
from pipeline.objectives.masked import require_same_shape


def transform_reward(
    mean: torch.Tensor,
    std: torch.Tensor,
    kind: Literal["none", "zscore", "lcb", "log_sigmoid"],
    *,
    reward_mean: float,
    reward_std: float,
    posterior_std: float,
    lcb_coefficient: float,
    clip: float | None,
) -> torch.Tensor:
    """The reward PPO sees, from the reward model's posterior mean and standard deviation.

    none:   r
    zscore: (r - m) / s
    lcb:    (r - m - c (std - u)) / s    lower confidence bound plus a constant: an uncertain reward counts less
    log_sigmoid: log sigmoid(r - m)      to be better than average counts, to be far better counts hardly more
    then clipped to [-clip, clip].

    m and s are the mean and the standard deviation of r over held-out responses, u is the mean of std. Without u a
    large c would push all rewards below the clip, where they are equal.

    Source: docs/method.md section 11; log_sigmoid from Wang et al. 2024, arXiv:2402.00742, who take a reference reward
    per prompt where we take the one m.

    Args:
        mean, std: [B] posterior mean and standard deviation of the reward.
        reward_mean, reward_std: m and s > 0; "none" ignores both, "log_sigmoid" s.
        posterior_std: u, of "lcb".
        lcb_coefficient: c >= 0.
        clip: bound after scaling, or None.

    Returns:
        [B] rewards; in units of s for "zscore" and "lcb", nats <= 0 for "log_sigmoid".
    """
    match kind:
        case "none":
            reward = mean
        case "zscore":
            reward = (mean - reward_mean) / reward_std
        case "lcb":
            reward = (mean - reward_mean - lcb_coefficient * (std - posterior_std)) / reward_std
        case "log_sigmoid":
            reward = F.logsigmoid(mean - reward_mean)
    return reward if clip is None else reward.clamp(-clip, clip)


def overlong_penalty(lengths: torch.Tensor, *, max_tokens: int, buffer_tokens: float) -> torch.Tensor:
    """0 up to L_max - L_buf, then down to -1 at L_max in a straight line: a warning before the cut.

    R_length = clip((L_max - L_buf - |y|) / L_buf, -1, 0)

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, Eq. 13.

    Args:
        lengths: [B] response tokens |y|.
        max_tokens: L_max, the sampler's limit.
        buffer_tokens: 0 < L_buf <= L_max.

    Returns:
        [B] in [-1, 0], to be added to the reward.
    """
    return ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(-1.0, 0.0)


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, offsets: torch.Tensor, *, kl_coefficient: float
) -> torch.Tensor:
    """R_t = -beta * k_t + 1[t = last] * score.

    Source: docs/method.md section 11; Stiennon et al. 2020, arXiv:2009.01325, section 3.4.

    Args:
        scores: [B] one reward per response.
        kl: [N] per-token KL estimates, nats.
        offsets: [B + 1] where each response begins; every response has at least one token.
        kl_coefficient: beta >= 0.

    Returns:
        [N].
    """
    rewards = -kl_coefficient * kl
    rewards[offsets[1:] - 1] += scores
    return rewards


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> torch.Tensor:
    """Generalised advantage estimation over left-aligned responses.

    delta_t = R_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1}

    V and A are 0 after the last real token: a response that ended has no future.

    Source: Schulman et al. 2016, arXiv:1506.02438, Eqs. 11 and 16.

    Args:
        rewards: [B, T] token rewards.
        values: [B, T] value of the state before each token.
        mask: [B, T] bool, True on response tokens.
        gamma: discount in [0, 1].
        lam: lambda in [0, 1].

    Returns:
        [B, T], 0 on padding; not whitened.

    Raises:
        ShapeError: the three tensors differ in shape.
    """
    require_same_shape(rewards=rewards, values=values, mask=mask)
    values = torch.where(mask, values, 0.0)
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    # Time by time in memory: each step then reads and writes all rows at one place.
    by_time = deltas.t().contiguous()
    running = torch.zeros_like(by_time[0])
    for t in reversed(range(len(by_time))):
        running = by_time[t].add_(gamma * lam * running)
    return by_time.t().contiguous()


def rewards_to_go(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """A_t = sum_l gamma^l R_{t+l}: REINFORCE, which is GAE with no critic (V = 0) and lambda = 1.

    Source: Hu et al. 2025 (REINFORCE++), arXiv:2501.03262: with the KL of every token in its reward, then whitened over
    all tokens of the batch (`masked.whiten`).

    Args:
        rewards: [B, T] token rewards.
        mask: [B, T] bool, True on response tokens.
        gamma: discount in [0, 1].

    Returns:
        [B, T], 0 on padding; not whitened.
    """
    return generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)


# ------------------------------------------------------------------ groups: G responses to one prompt


def group_zscores(rewards: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """A_i = (R_i - mean_G R) / (sd_G R + eps): GRPO. A group of equal rewards teaches nothing, its A are 0.

    sd with Bessel's correction and eps outside the root, as in TRL (verl adds 1e-6 instead).

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.

    Args:
        rewards: [P, G] one reward per response, G >= 2.
        eps: in units of the reward.

    Returns:
        [P, G].

    Raises:
        ShapeError: G < 2, so there is nothing to compare with.
    """
    return group_centred(rewards) / (rewards.std(-1, keepdim=True) + eps)


def group_centred(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean_G R: Dr. GRPO, which leaves out the division that favours prompts with little spread.

    Source: Liu et al. 2025, arXiv:2503.20783, section 3. Arguments and errors as in `group_zscores`.
    """
    _require_groups(rewards)
    return rewards - rewards.mean(-1, keepdim=True)


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean of the other G - 1 rewards: RLOO, an unbiased baseline.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, section 3. Arguments and errors as in `group_zscores`.
    """
    _require_groups(rewards)
    return rewards - (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)


def uniform_groups(rewards: torch.Tensor) -> torch.Tensor:
    """[P] bool: all G rewards are equal, so every group advantage is 0 and dynamic sampling drops the prompt.

    Source: Yu et al. 2025 (DAPO), arXiv:2503.14476, Eq. 11. They sample more prompts until the batch is full again.
    Here the batch gets smaller, so that the prompts of a step stay a function of (seed, step).
    """
    return rewards.amax(-1) == rewards.amin(-1)


def groups_by_size(groups: torch.Tensor) -> list[torch.Tensor]:
    """The rows of the groups as [P, G] tables, one for each size: a row of a group may have been left out.

    Args:
        groups: [B] number of each row's group, equal ones side by side.
    """
    _, group_of, sizes = groups.unique_consecutive(return_inverse=True, return_counts=True)
    size_of = sizes[group_of]
    return [(size_of == size).nonzero().view(-1, size) for size in size_of.unique().tolist()]


def in_groups(
    compare: Callable[[torch.Tensor], torch.Tensor], rewards: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """[B] what one of the estimators above makes of [B] rewards, group by group.

    Args:
        groups: as in `groups_by_size`.
    """
    result = torch.empty_like(rewards)
    for rows in groups_by_size(groups):
        result[rows] = compare(rewards[rows])
    return result


def _require_groups(rewards: torch.Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ShapeError(f"group advantages need rewards [prompts, samples >= 2], got {list(rewards.shape)}")
