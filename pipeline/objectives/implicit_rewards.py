"""The reward that a policy implies, for each method of direct alignment: what its loss compares within a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pipeline.config.direct_alignment import DirectConfig
from pipeline.config.implicit_reward import ImplicitRewardName
from pipeline.errors import ShapeError
from pipeline.objectives.direct_alignment import length_normalised, log_odds

Reading = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""([B] log-ratios h or log-probabilities lp, [B] lengths) -> [B] rewards before beta."""


@dataclass(frozen=True, kw_only=True)
class ImplicitForm:
    """How a method reads a reward off its policy."""

    formula: str
    needs_reference: bool
    read: Reading


def _sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return values


def _mean_odds(logprobs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return log_odds(length_normalised(logprobs, lengths))


LOG_RATIO = ImplicitForm(formula="beta (lp - lr)", needs_reference=True, read=_sum)

IMPLICIT_FORMS: Mapping[ImplicitRewardName, ImplicitForm] = {
    "dpo": LOG_RATIO,
    "ipo": LOG_RATIO,
    "kto": LOG_RATIO,
    "wpo": LOG_RATIO,
    "selective_dpo": LOG_RATIO,
    "beta_dpo": LOG_RATIO,
    "ipo_mean": ImplicitForm(formula="beta (lp - lr) / |y|", needs_reference=True, read=length_normalised),
    "simpo": ImplicitForm(formula="beta lp / |y|", needs_reference=False, read=length_normalised),
    "cpo": ImplicitForm(formula="beta lp", needs_reference=False, read=_sum),
    "orpo": ImplicitForm(formula="beta log( p / (1 - p) ), p = exp(lp / |y|)", needs_reference=False, read=_mean_odds),
}
"""Method -> its implicit reward. lp and lr are sums over the response and its end token, by policy and reference."""


def implicit_rewards(
    form: ImplicitForm,
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor | None,
    lengths: torch.Tensor,
    *,
    beta: float,
) -> torch.Tensor:
    """r = beta (lp - lr), or the method's own reading of its policy.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 5, less the term of the prompt alone, which is the same for
    all responses to it. RewardBench (Lambert et al. 2024, arXiv:2403.13787) scores DPO models by lp - lr, that is
    beta = 1, and models without a reference by lp / |y|.

    Args:
        logprobs: [B] lp, nats.
        reference_logprobs: [B] lr, nats; None for a form without a reference.
        lengths: [B] |y| >= 1.
        beta: > 0. The order of responses does not depend on it, the size of margins does.

    Returns:
        [B] rewards; comparable between responses to one prompt only.

    Raises:
        ShapeError: the form needs a reference and there is none, or the reverse.
    """
    if form.needs_reference != (reference_logprobs is not None):
        raise ShapeError(f"{form.formula} with{'' if form.needs_reference else 'out'} lr: give exactly what it reads")
    return beta * form.read(logprobs if reference_logprobs is None else logprobs - reference_logprobs, lengths)


def form_of_method(config: DirectConfig) -> ImplicitForm:
    """The reward that a configured method of direct alignment implies."""
    if config.losses.odds_ratio and not config.losses.of_margins:
        return IMPLICIT_FORMS["orpo"]
    if config.reference:
        return IMPLICIT_FORMS["ipo_mean" if config.length_normalised else "dpo"]
    return IMPLICIT_FORMS["simpo" if config.length_normalised else "cpo"]
