"""Held-out metrics of each source of a mixture, with bootstrap intervals by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.evaluation.pair_metrics import accuracy_metrics, longer_is_better
from pipeline.records import Metrics

SOURCE_PREFIX = "eval/source/"

WITH_INTERVAL = ("accuracy", "nll")


@dataclass(frozen=True, kw_only=True)
class SourceResult:
    """One line of the table of sources. An interval is empty where the source has one prompt alone."""

    name: str
    pairs: int
    accuracy: float
    accuracy_interval: tuple[float, ...]
    nll: float
    nll_interval: tuple[float, ...]
    longer_is_better: float


def source_metrics(
    margins: np.ndarray,
    length_gap: np.ndarray,
    prompts: Sequence[int] | np.ndarray,
    sources: Sequence[str],
    *,
    seed: int = 0,
) -> Metrics:
    """The metrics of every source.

    Args:
        margins: [B] r_chosen - r_rejected.
        length_gap: [B] length of the chosen response minus length of the rejected one, in any unit.
        prompts: [B] a number for each distinct prompt: the bootstrap draws prompts.
        sources: [B] name of the source of each pair.
        seed: of the bootstrap.

    Returns:
        `eval/source/<name>/{pairs,accuracy,nll,longer_is_better}`, where a tie is an error of `accuracy`, and
        `.../{accuracy,nll}_{low,high}`, the 95% intervals, where a source has several prompts.
    """
    names, rows_of, prompts_of = np.array(sources), np.asarray(margins), np.asarray(prompts)
    metrics: Metrics = {}
    for name in dict.fromkeys(sources):
        here = names == name
        own = rows_of[here]

        def statistic(rows: np.ndarray, own: np.ndarray = own) -> Metrics:
            return {
                "accuracy": accuracy_metrics(own[rows])["accuracy"],
                "nll": float(np.logaddexp(0.0, -own[rows]).mean()),
            }

        values = statistic(np.arange(len(own))) | {
            "pairs": float(len(own)),
            "longer_is_better": longer_is_better(np.asarray(length_gap)[here].tolist()),
        }
        for metric, ends in bootstrap_intervals(statistic, prompts_of[here], seed=seed).items():
            if not any(map(math.isnan, ends)):
                values |= zip((f"{metric}_low", f"{metric}_high"), ends, strict=True)
        metrics |= {f"{SOURCE_PREFIX}{name}/{metric}": value for metric, value in values.items()}
    return metrics


def source_results(metrics: Metrics) -> list[SourceResult]:
    """The lines of the table of sources, from the metrics of an evaluation."""
    names = [key.removeprefix(SOURCE_PREFIX).removesuffix("/pairs") for key in metrics if _is_size(key)]
    results = []
    for name in names:
        own = {key.rpartition("/")[2]: value for key, value in metrics.items() if _is_of(key, name)}
        accuracy, nll = (
            tuple(own[f"{metric}_{end}"] for end in ("low", "high") if f"{metric}_{end}" in own)
            for metric in WITH_INTERVAL
        )
        results.append(
            SourceResult(
                name=name,
                pairs=int(own["pairs"]),
                accuracy=own["accuracy"],
                accuracy_interval=accuracy,
                nll=own["nll"],
                nll_interval=nll,
                longer_is_better=own["longer_is_better"],
            )
        )
    return results


def _is_size(key: str) -> bool:
    return key.startswith(SOURCE_PREFIX) and key.endswith("/pairs")


def _is_of(key: str, name: str) -> bool:
    return key.rpartition("/")[0] == f"{SOURCE_PREFIX}{name}"
