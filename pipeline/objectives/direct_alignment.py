"""Losses that align a policy with preferences directly, without a reward model and without sampling.

One notation in all docstrings, for a prompt x with a chosen response y_w and a rejected response y_l:

    lp(y) = sum_t log pi(y_t | x, y_<t)     under the policy; the sum runs over the response and its end token
    lr(y) = the same sum under the reference policy
    h(y)  = lp(y) - lr(y)                   the log-ratio, nats
    |y|   = the number of response tokens, the end token included

Every loss returns [B], one number for a pair (KTO: for a response). The caller adds these numbers up over all shards
and micro-batches and divides by the pairs (KTO: the responses) of the optimiser step. So the loss of a step does not
depend on how the step was cut.

`beta` is the strength with which a method holds on to its reference. It has no unit; it must be > 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from pipeline.objectives.masked import require_same_shape
from pipeline.objectives.preference import bradley_terry_loss

LEAST_BETA = 1e-3
"""The floor of a dynamic beta, as in beta-DPO's code: a beta of zero or below would reward the rejected response."""

LARGEST_LOG_PROBABILITY = -1e-6
"""Odds of a probability of 1 are infinite: ORPO takes a mean log-probability nearer to 0 than this as this one."""


def dpo_loss(margins: torch.Tensor, *, beta: float | torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO: L_b = -(1 - eps) log sigmoid(beta m) - eps log sigmoid(-beta m),   m = h(y_w) - h(y_l)

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7, where eps = 0; eps > 0 is conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences").

    Args:
        margins: [B] m, nats; carries gradient.
        beta: one number, or [B] for the instance form of beta-DPO; no gradient runs through it.
        label_smoothing: eps in [0, 1/2), the share of labels taken to be wrong.

    Returns:
        [B] nats; ln 2 where the policy is its reference.
    """
    return bradley_terry_loss(beta * margins, label_smoothing=label_smoothing)


def robust_dpo_loss(margins: torch.Tensor, *, beta: float, label_smoothing: float) -> torch.Tensor:
    """Robust DPO: L_b = ( -(1 - eps) log sigmoid(beta m) + eps log sigmoid(-beta m) ) / (1 - 2 eps)

    Its expectation over labels of which a share eps is flipped is the DPO loss of the true labels. The loss has no
    lower bound.

    Source: Chowdhury, Kini and Natarajan 2024, arXiv:2403.00409. Arguments as in `dpo_loss`.
    """
    kept = -(1.0 - label_smoothing) * F.logsigmoid(beta * margins)
    flipped = -label_smoothing * F.logsigmoid(-beta * margins)
    return (kept - flipped) / (1.0 - 2.0 * label_smoothing)


def ipo_loss(margins: torch.Tensor, *, beta: float) -> torch.Tensor:
    """IPO: L_b = ( m - 1 / (2 beta) )^2

    The paper, and our default, sums over tokens: m = h(y_w) - h(y_l). The length-normalised form, TRL's, takes means:
    m = h(y_w)/|y_w| - h(y_l)/|y_l|. `length_normalised` makes these means. A beta of one form does not fit the other.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17; their tau is our beta.

    Args:
        margins: [B] m, nats, or nats a token; carries gradient.
        beta: > 0; the margin aimed at is 1 / (2 beta).

    Returns:
        [B] nats^2.
    """
    return (margins - 1.0 / (2.0 * beta)) ** 2


def length_normalised(logprobs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """lp(y)/|y| or h(y)/|y|: [B] sums over tokens to [B] means, nats a token.

    Args:
        logprobs: [B] sums.
        lengths: [B] |y| >= 1.
    """
    require_same_shape(logprobs=logprobs, lengths=lengths)
    return logprobs / lengths


def kto_loss(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    reference_point: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """KTO: L_b = lambda_D (1 - sigmoid(beta (h - z0))) for a desirable response,
               lambda_U (1 - sigmoid(beta (z0 - h))) for an undesirable one.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.

    Args:
        log_ratios: [B] h of single responses, nats; carries gradient.
        desirable: [B] bool.
        reference_point: z0 >= 0, a scalar without gradient: `kto_reference_point`.
        beta: > 0.
        desirable_weight, undesirable_weight: lambda_D and lambda_U. The paper asks for
            lambda_D n_D / (lambda_U n_U) in [1, 4/3], with n_D and n_U the numbers of responses.

    Returns:
        [B] in [0, lambda]. Divide by the responses of the step, not by pairs.
    """
    require_same_shape(log_ratios=log_ratios, desirable=desirable)
    z0 = reference_point.detach()
    liked = desirable_weight * (1.0 - torch.sigmoid(beta * (log_ratios - z0)))
    disliked = undesirable_weight * (1.0 - torch.sigmoid(beta * (z0 - log_ratios)))
    return torch.where(desirable, liked, disliked)


def kto_reference_point(mismatched_log_ratios: torch.Tensor) -> torch.Tensor:
    """z0 = max(0, mean_i h(y_(i+1 mod m) | x_i)): KTO's estimate of KL(pi || pi_ref), nats, without gradient.

    Each prompt meets the response of the next row of its group. The estimate is biased and cheap: both responses to
    a prompt would be far above the KL of responses that the policy samples.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4. TRL makes one z0 of each device's micro-batch and
    averages over devices before the maximum. We make one of the whole step, so that z0 does not depend on the shards.
    With one device and one micro-batch the two are one number.

    Args:
        mismatched_log_ratios: [m] log-ratios of the mismatched responses of the whole step.
    """
    return mismatched_log_ratios.detach().mean().clamp(min=0.0)


def simpo_loss(
    chosen_means: torch.Tensor,
    rejected_means: torch.Tensor,
    *,
    beta: float,
    margin: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """SimPO: L_b = -log sigmoid( beta lp(y_w)/|y_w| - beta lp(y_l)/|y_l| - gamma )

    Source: Meng, Xia and Chen 2024, arXiv:2405.14734, Eq. 6. gamma is absolute here, in the paper and in TRL; the
    authors' code asks for the ratio gamma / beta.

    Args:
        chosen_means, rejected_means: [B] lp/|y|, nats a token (`length_normalised`); carry gradient.
        beta: > 0; 2 to 10 in the paper, for means are small numbers.
        margin: gamma >= 0.
        label_smoothing: eps in [0, 1/2).

    Returns:
        [B] nats.
    """
    require_same_shape(chosen_means=chosen_means, rejected_means=rejected_means)
    return bradley_terry_loss(beta * (chosen_means - rejected_means) - margin, label_smoothing=label_smoothing)


def cpo_loss(
    chosen_logprobs: torch.Tensor, rejected_logprobs: torch.Tensor, *, beta: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """CPO's preference term: L_b = -log sigmoid( beta lp(y_w) - beta lp(y_l) ), DPO with a uniform reference.

    The whole objective adds alpha times `likelihood_loss` of the chosen response: alpha = 1 and average = "none" in
    the paper, average = "token" in TRL.

    Source: Xu et al. 2024, arXiv:2401.08417, section 3.

    Args:
        chosen_logprobs, rejected_logprobs: [B] lp, nats; carry gradient.
        beta: > 0.
        label_smoothing: eps in [0, 1/2).

    Returns:
        [B] nats.
    """
    require_same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    return bradley_terry_loss(beta * (chosen_logprobs - rejected_logprobs), label_smoothing=label_smoothing)


def orpo_loss(chosen_means: torch.Tensor, rejected_means: torch.Tensor) -> torch.Tensor:
    """ORPO's odds-ratio term: L_b = -log sigmoid( log odds(y_w) - log odds(y_l) ),
    odds(y) = p / (1 - p),   p = exp(lp(y)/|y|).

    The whole objective is `likelihood_loss` of the chosen response plus lambda times this term. The paper's likelihood
    is that of the response; TRL's counts the tokens of the prompt, too.

    Source: Hong, Lee and Thorne 2024, arXiv:2403.07691, Eqs. 4, 6 and 7.

    Args:
        chosen_means, rejected_means: [B] lp/|y|, nats a token (`length_normalised`); carry gradient.

    Returns:
        [B] nats.
    """
    require_same_shape(chosen_means=chosen_means, rejected_means=rejected_means)
    return -F.logsigmoid(log_odds(chosen_means) - log_odds(rejected_means))


def log_odds(mean_logprobs: torch.Tensor) -> torch.Tensor:
    """log( p / (1 - p) ) of p = exp(mean_logprobs); [B] to [B], finite also where p rounds to 1."""
    x = mean_logprobs.clamp(max=LARGEST_LOG_PROBABILITY)
    # Two ways to log(1 - e^x): each is exact on its side of -ln 2 (Maechler 2012), and finite on the other side.
    log_rest = torch.where(x > -math.log(2.0), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    return x - log_rest


def likelihood_loss(
    logprobs: torch.Tensor,
    lengths: torch.Tensor,
    *,
    average: Literal["none", "sequence", "token"],
    tokens_per_row: float,
) -> torch.Tensor:
    """The negative log-likelihood of the chosen responses, as CPO, ORPO and mixtures with a likelihood term add it.

    none:     -lp(y_w)              a long response counts more (CPO's paper)
    sequence: -lp(y_w) / |y_w|      every response counts the same
    token:    -lp(y_w) / mean|y|    every token of the step counts the same (TRL's CPO and ORPO)

    Args:
        logprobs: [B] lp, nats; carries gradient.
        lengths: [B] |y|.
        average: one of the three.
        tokens_per_row: mean|y|, tokens of the whole step over its rows; only "token" reads it.

    Returns:
        [B] nats, or nats a token. All three are divided by the pairs of the step, like the other losses here.
    """
    require_same_shape(logprobs=logprobs, lengths=lengths)
    match average:
        case "none":
            return -logprobs
        case "sequence":
            return -logprobs / lengths
        case "token":
            return -logprobs / tokens_per_row


@torch.no_grad()
def wpo_response_weights(logprobs: torch.Tensor, log_collisions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """WPO: v(y) = exp( 1/|y| sum_t [ log pi(y_t) - log sum_v pi(v)^2 ] ), how likely the policy is to say y.

    The second term is the log-probability that a sampled token has on average, so v is about 1 for a response of the
    policy itself.

    Source: Zhou et al. 2024, arXiv:2406.11827, section 3 ("sampled alignment").

    Args:
        logprobs: [B] lp(y), nats.
        log_collisions: [B] sum_t log sum_v pi(v | x, y_<t)^2, nats.
        lengths: [B] |y| >= 1.

    Returns:
        [B] weights > 0, without gradient.
    """
    require_same_shape(logprobs=logprobs, log_collisions=log_collisions, lengths=lengths)
    return torch.exp((logprobs - log_collisions) / lengths)


@torch.no_grad()
def wpo_pair_weights(chosen: torch.Tensor, rejected: torch.Tensor, *, clamp: bool) -> torch.Tensor:
    """v(y_w) v(y_l), by which WPO multiplies the DPO loss of a pair.

    Args:
        chosen, rejected: [B] `wpo_response_weights`.
        clamp: hold the product at 1 or below, as the authors' code does. The paper and TRL do not.

    Returns:
        [B] weights > 0, without gradient.
    """
    require_same_shape(chosen=chosen, rejected=rejected)
    product = chosen * rejected
    return product.clamp(max=1.0) if clamp else product


@dataclass(frozen=True, kw_only=True)
class RewardGaps:
    """The running mean and standard deviation of the margins m = h(y_w) - h(y_l) that beta-DPO has seen, nats."""

    mean: float
    std: float

    def updated(self, margins: torch.Tensor, *, momentum: float) -> RewardGaps:
        """M0 <- p M0 + (1 - p) mean(m),   sd <- p sd + (1 - p) sd(m), with Bessel's correction.

        Args:
            margins: [B] all margins of the step, over all shards; one alone leaves sd as it was.
            momentum: p in [0, 1).
        """
        margins = margins.detach().double()
        std = float(margins.std()) if len(margins) > 1 else self.std
        return RewardGaps(
            mean=momentum * self.mean + (1.0 - momentum) * float(margins.mean()),
            std=momentum * self.std + (1.0 - momentum) * std,
        )


@torch.no_grad()
def dynamic_beta(margins: torch.Tensor, gaps: RewardGaps, *, beta: float, sensitivity: float) -> torch.Tensor:
    """beta-DPO: beta_i = max( floor, beta ( 1 + alpha (m_i - M0) ) )

    A clear pair pulls the policy less far from its reference than an unclear one. The batch form, the paper's default,
    passes one margin: the mean over the step. The instance form passes them all.

    Source: Wu et al. 2024, arXiv:2407.08639, section 4. The paper compares with the running mean of the steps before;
    the authors' code updates `gaps` with this step first. The caller's order decides.

    Args:
        margins: any shape, nats: the mean margin of the step, or [B].
        gaps: running statistics; M0 is their mean.
        beta: beta_0 > 0.
        sensitivity: alpha >= 0, 1 / nats; 0 is DPO.

    Returns:
        The shape of `margins`, without gradient.
    """
    return (beta * (1.0 + sensitivity * (margins - gaps.mean))).clamp(min=LEAST_BETA)


@torch.no_grad()
def filter_weights(margins: torch.Tensor, gaps: RewardGaps) -> torch.Tensor:
    """beta-DPO's weight of a pair in the draw of pairs that stay: exp( -1/2 ((m - M0) / sd)^2 ). [B] to [B].

    Source: Wu et al. 2024, arXiv:2407.08639, section 4. Pairs far from the mean, on either side, are taken for noise.
    """
    return torch.exp(-0.5 * ((margins - gaps.mean) / gaps.std) ** 2)


def pairs_that_stay(weights: torch.Tensor, *, share: float, generator: torch.Generator) -> torch.Tensor:
    """Draws ceil(share * B) pairs without replacement, each in proportion to its weight.

    Args:
        weights: [B] `filter_weights` of the whole step.
        share: of pairs to keep, in (0, 1]; 0.8 in the paper.
        generator: on the device of `weights`; the same state draws the same pairs on every shard.

    Returns:
        [B] bool. The loss of a pair that leaves is not counted, in the numerator or in the denominator.
    """
    stay = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
    # A weight that rounds to 0 would make the draw fail where too few others are left.
    positive = weights.double().clamp(min=1e-300)
    drawn = torch.multinomial(positive, math.ceil(share * len(weights)), replacement=False, generator=generator)
    stay[drawn] = True
    return stay
