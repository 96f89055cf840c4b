"""Whether the reasons of scored pairs agree with the annotations of an evaluation file, or with a known truth."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.data.score_statistics import SMALLEST_STD
from pipeline.evaluation.reasons import SummedRewards, agreement_with_truth, reason_fidelity, verified_objectives
from pipeline.records import Metrics, ObjectiveTruth, RewardScore

if TYPE_CHECKING:
    from pipeline.data.evaluation_examples import EvaluationExample
    from pipeline.data.planted import GoldAnnotator

NOT_ANNOTATED = float("nan")


def annotated_reasons(
    scored: Iterable[tuple[RewardScore, RewardScore]],
    examples: Iterable[EvaluationExample],
    objectives: Sequence[str],
    gold: GoldAnnotator | None,
) -> Metrics:
    """`reason_fidelity` over the annotated pairs, and `agreement_with_truth` where the truth is known.

    Pairs without an annotation of one of the objectives count nowhere. Only numbers of annotated pairs are kept in
    memory.

    Args:
        scored: scores of the chosen and the rejected response of each pair.
        examples: the same pairs in the same order, one chosen and one rejected response each.
        objectives: those of the model, in its order.

    Returns:
        `reasons/...`; nothing without annotated pairs, or for a reward without objective scores.

    Raises:
        DataError: the truth is to be used, and a prompt is not of the planted world.
    """
    sources: list[str] = []
    columns = {name: array("d") for name in ("weights", "scores", "annotations", "true_weights", "true_scores")}
    for both, example in zip(scored, examples, strict=True):
        given = (example.scores_chosen, example.scores_rejected)
        if not both[0].objective_scores or not any(name in scores for scores in given for name in objectives):
            continue
        sources.append(example.source)
        responses = (example.chosen[0], example.rejected[0])
        for score, annotated, response in zip(both, given, responses, strict=True):
            columns["weights"].extend(score.objective_weights)
            columns["scores"].extend(score.objective_scores)
            columns["annotations"].extend(annotated.get(name, NOT_ANNOTATED) for name in objectives)
            if gold is not None:
                true_weights = gold.objective_weights(example.prompt)
                true_scores = gold.objective_scores(example.prompt, response)
                columns["true_weights"].extend(true_weights[name] for name in objectives)
                columns["true_scores"].extend(true_scores[name] for name in objectives)
    if not columns["scores"]:
        return {}
    of = {name: _chosen_first(column, len(objectives)) for name, column in columns.items()}
    mask = ~of["annotations"].isnan()
    annotations = _standardised_by_source(of["annotations"], mask, sources)
    metrics = reason_fidelity(of["scores"], annotations, mask, objectives)
    if gold is not None:
        metrics |= agreement_with_truth(
            SummedRewards(weights=of["weights"], scores=of["scores"]),
            ObjectiveTruth(weights=of["true_weights"][: len(mask) // 2], scores=of["true_scores"]),
            objectives,
            verified_objectives(metrics, objectives),
        )
    return metrics


def _standardised_by_source(annotations: torch.Tensor, mask: torch.Tensor, sources: Sequence[str]) -> torch.Tensor:
    """[2B, K] annotations in standard deviations of their source, 0 where masked: annotators' scales do not mix."""
    standardised = torch.zeros_like(annotations)
    names = np.array([*sources, *sources])
    for source in dict.fromkeys(sources):
        rows = torch.from_numpy(names == source)
        for k in range(annotations.shape[1]):
            known = rows & mask[:, k]
            if known.any():
                own = annotations[known, k]
                standardised[known, k] = (own - own.mean()) / own.std(correction=0).clamp(min=SMALLEST_STD)
    return standardised


def _chosen_first(column: array[float], num_objectives: int) -> torch.Tensor:
    """[B * 2 * K] numbers, pair after pair, as [2B, K] with the chosen rows first."""
    pairs = torch.from_numpy(np.asarray(column)).view(-1, 2, num_objectives)
    return torch.cat([pairs[:, 0], pairs[:, 1]])
