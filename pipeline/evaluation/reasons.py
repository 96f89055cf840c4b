"""Whether objective scores mean what they are named after, on annotations that training did not see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeline.evaluation.correlation import correlation_or_zero
from pipeline.models.reward_model_card import RewardModelCard
from pipeline.objectives.masked import require_same_shape
from pipeline.records import Metrics, ObjectiveTruth

REASON_PREFIX = "reasons/"

TRUSTED_PAIR_ACCURACY = 0.65
"""A score that orders fewer of the annotator's held-out pairs than this is not shown as a reason. Chance is 0.5."""

UNVERIFIED = "what the model cannot tell apart"
"""Stands in the place of the objectives that are no reasons."""

SAME_PART = 1e-9
"""True parts of a lead that differ by no more are equal: rounding."""

LEAST_PAIRS = 30
"""Fewer annotated held-out pairs verify nothing: chance alone moves a share of 30 by 0.09."""


def reason_fidelity(
    scores: torch.Tensor, annotations: torch.Tensor, mask: torch.Tensor, objectives: Sequence[str]
) -> Metrics:
    """How well the scores of each objective agree with its annotations on held-out pairs.

    correlation_k    = Pearson correlation of s_k and its annotation over annotated responses
    pair_accuracy_k  = share of pairs that s_k orders as the annotator does, among pairs that the annotator orders;
                       equal scores count one half
    collinearity     = mean |correlation| of two objectives' scores: at 1 all objectives are one score

    Args:
        scores: [2B, K] objective scores, chosen rows first.
        annotations: [2B, K] annotated scores in any unit, ignored where masked.
        mask: [2B, K] bool, True where annotated.
        objectives: K names.

    Returns:
        `reasons/<objective>/{correlation,pair_accuracy,pairs}` for each objective with an ordered pair, and
        `reasons/collinearity`. Nothing is returned for a head without scores.
    """
    require_same_shape(annotations=annotations, mask=mask)
    if not scores.shape[1]:
        return {}
    require_same_shape(scores=scores, annotations=annotations)
    num_pairs = len(scores) // 2
    metrics = {f"{REASON_PREFIX}collinearity": score_collinearity(scores)}
    for k, objective in enumerate(objectives):
        s, t, known = scores[:, k].double(), annotations[:, k].double(), mask[:, k]
        truth = torch.sign(t[:num_pairs] - t[num_pairs:])
        ordered = known[:num_pairs] & known[num_pairs:] & (truth != 0)
        if not ordered.any():
            continue
        agreement = torch.sign(s[:num_pairs] - s[num_pairs:])[ordered] * truth[ordered]
        metrics |= {
            f"{REASON_PREFIX}{objective}/correlation": correlation_or_zero(
                s[known].cpu().numpy(), t[known].cpu().numpy()
            ),
            f"{REASON_PREFIX}{objective}/pair_accuracy": float(0.5 + 0.5 * agreement.mean()),
            f"{REASON_PREFIX}{objective}/pairs": float(ordered.sum()),
        }
    return metrics


@dataclass(frozen=True, kw_only=True)
class SummedRewards:
    """The rewards of B pairs as sums over K objectives, r = sum_k w_k s_k; chosen rows first."""

    weights: torch.Tensor
    """[2B, K] objective weights of each row's prompt."""
    scores: torch.Tensor
    """[2B, K] objective scores in units of the reward."""

    @property
    def margin_contributions(self) -> torch.Tensor:
        """[B, K] what each objective adds to r_chosen - r_rejected."""
        chosen, rejected = (self.weights * self.scores).double().chunk(2)
        return chosen - rejected


def mean_margin_contributions(
    rewards: SummedRewards, annotations: torch.Tensor, mask: torch.Tensor, objectives: Sequence[str]
) -> Metrics:
    """What each objective adds to the mean margin, by its score and by its annotation in the score's place.

    contribution_k    = mean over pairs of  w_k,chosen * s_k,chosen - w_k,rejected * s_k,rejected
    by_annotations_k  = the same with the annotation t_k instead of s_k

    Both are means over the pairs whose two responses are annotated. The weights of both are the model's.

    Args:
        annotations: [2B, K] annotated scores in the units of `rewards.scores`, ignored where masked.
        mask: [2B, K] bool, True where annotated.

    Returns:
        `reasons/<objective>/{contribution,contribution_by_annotations}` for each objective with such a pair.
    """
    require_same_shape(scores=rewards.scores, annotations=annotations, mask=mask)
    by_scores = rewards.margin_contributions
    by_annotations = SummedRewards(weights=rewards.weights, scores=annotations).margin_contributions
    chosen, rejected = mask.chunk(2)
    return {
        f"{REASON_PREFIX}{objective}/{name}": float(contributions[known, k].mean())
        for k, (objective, known) in enumerate(zip(objectives, (chosen & rejected).unbind(1), strict=True))
        if known.any()
        for name, contributions in (
            ("contribution", by_scores),
            ("contribution_by_annotations", by_annotations),
        )
    }


def agreement_with_truth(
    rewards: SummedRewards, truth: ObjectiveTruth, objectives: Sequence[str], named: Sequence[str]
) -> Metrics:
    """Whether weights and named reasons are the true ones, where the truth is known.

    A reason is named for a pair when the objective that adds most to the lead of the preferred response is among
    `named`. It is right when the truth prefers the same response, and no objective adds more to its true lead.

    Args:
        named: the objectives that may be named, those of `verified_objectives`.

    Returns:
        `reasons/weight_correlation`, Pearson's over all (prompt, objective); `reasons/decisive_pairs`, the pairs with
        a named reason; `reasons/decisive_accuracy`, the share of them whose reason is right, if there are any.
    """
    weights = rewards.weights[: len(truth.weights)]
    metrics = {
        f"{REASON_PREFIX}weight_correlation": correlation_or_zero(
            weights.double().flatten().cpu().numpy(), truth.weights.flatten().cpu().numpy()
        )
    }
    both = truth.weights.repeat(2, 1)
    lead, preferred = _lead_of_preferred(rewards.margin_contributions.cpu())
    true_lead, truly_preferred = _lead_of_preferred(
        SummedRewards(weights=both, scores=truth.scores).margin_contributions.cpu()
    )
    may_be_named = torch.tensor([objective in named for objective in objectives])
    deciding = lead.argmax(1)
    is_named = may_be_named[deciding] & (preferred != 0)
    true_part = true_lead.gather(1, deciding.unsqueeze(1)).squeeze(1)
    right = (preferred == truly_preferred) & (true_part >= true_lead.amax(1) - SAME_PART)
    metrics[f"{REASON_PREFIX}decisive_pairs"] = float(is_named.sum())
    if is_named.any():
        metrics[f"{REASON_PREFIX}decisive_accuracy"] = float(right[is_named].double().mean())
    return metrics


def _lead_of_preferred(contributions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, K] what each objective adds to the lead of the preferred response, [B] 1 if that is the chosen one, -1 if
    the rejected one, 0 for a tie)."""
    preferred = torch.sign(contributions.sum(1))
    return contributions * preferred.unsqueeze(1), preferred


def verified_objectives(metrics: Mapping[str, float], objectives: Sequence[str]) -> tuple[str, ...]:
    """The objectives whose scores may be shown as reasons: enough held-out pairs, and enough of them ordered right."""
    return tuple(
        objective
        for objective in objectives
        if metrics.get(f"{REASON_PREFIX}{objective}/pairs", 0.0) >= LEAST_PAIRS
        and metrics.get(f"{REASON_PREFIX}{objective}/pair_accuracy", 0.0) >= TRUSTED_PAIR_ACCURACY
    )


def reasons_of_model(card: RewardModelCard) -> tuple[str, ...]:
    """The objectives that a model may give as reasons: the verified ones, where its reward is a sum over objectives.

    A `bt_aux` predicts annotations, too, but its reward does not come from them.
    """
    return verified_objectives(card.metrics, card.objectives) if card.mean_contributions else ()


def named_contributions(
    contributions: Sequence[float], objectives: Sequence[str], verified: Sequence[str]
) -> list[tuple[str, float]]:
    """(verified objective, its contribution), then the sum of all others under `UNVERIFIED`: all add up as before.

    Nothing is named where no objective is verified, or where there are no contributions.

    Args:
        contributions: [K] in the order of `objectives`, or empty.
    """
    by_name = dict(zip(objectives, contributions, strict=bool(contributions)))
    told = [(name, value) for name, value in by_name.items() if name in verified]
    rest = [value for name, value in by_name.items() if name not in verified]
    return [*told, (UNVERIFIED, sum(rest))] if told and rest else told


def score_collinearity(scores: torch.Tensor) -> float:
    """Mean absolute correlation over responses of two different objectives' scores: 1 when all say the same.

    Equals 1 when the rows of S are collinear, and does not need S, which ZeRO-3 keeps in pieces.

    Args:
        scores: [N, K], K >= 2.
    """
    columns = scores.unbind(-1)
    pairs = [(x, y) for k, x in enumerate(columns) for y in columns[:k]]
    return sum(abs(correlation_or_zero(x.cpu().numpy(), y.cpu().numpy())) for x, y in pairs) / len(pairs)
