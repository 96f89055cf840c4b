"""What a report is made from: the numbers, curves and answers of a finished run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.records import Answer, Metrics
from pipeline.rollouts.kept_samples import SamplesOfPolicy
from pipeline.tracking.progress import as_clock

MetricsRow = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StageSummary:
    """One line of the cost table."""

    name: str
    seconds: float
    """Of all attempts."""
    is_skipped: bool
    """An earlier job had finished it."""
    node_peak_gib: float
    """Peak memory of all processes on the driver's node while the stage ran."""
    versions: Mapping[str, str]
    metrics: Metrics
    """Final metrics of the stage. `memory/*` is the peak of one rank or rollout worker of a training stage."""

    @property
    def cells(self) -> tuple[str, ...]:
        memory = [self.metrics.get(f"memory/{place}_peak_gib") for place in ("rank", "device", "rollout_worker")]
        peaks = [self.node_peak_gib, *memory]
        name = f"{self.name} (earlier job)" if self.is_skipped else self.name
        return (name, as_clock(self.seconds), *("" if peak is None else f"{peak:.1f}" for peak in peaks))


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All data of the report."""

    name: str
    recipe: Mapping[str, Any]
    objectives: tuple[str, ...]
    stages: Sequence[StageSummary]
    reward_rows: Sequence[MetricsRow]
    """metrics.jsonl of train_reward_model."""
    alignment_rows: Sequence[MetricsRow]
    """metrics.jsonl of align_policy."""
    reward_metrics: Metrics
    """Empty without a reward model: the rewards of the alignment then scored the answers."""
    reward_model_fingerprint: str | None
    """Identity of the reward model's content, as the service and the other jobs give it; None without one."""
    benchmark_metrics: Metrics
    base: Sequence[Answer]
    aligned: Sequence[Answer]
    """Answers to the same prompts as `base`, in the same order."""
    kinds: Mapping[str, str]
    """Prompt id -> kind; empty if the kinds are unknown."""
    over_time: Sequence[SamplesOfPolicy]
    """Answers to the same held-out prompts during alignment, in its order; empty where none were kept."""
    planted_weights: Mapping[str, Mapping[str, float]]
    """Kind -> objective -> w*; empty if the truth is unknown."""
    gold: Callable[[str, str], float] | None
    """(text of a prompt, response) -> its true reward, from 1 to 5; None if the truth is unknown."""

    @property
    def exported_step(self) -> MetricsRow:
        """The metrics of the step whose policy the alignment exported. After a KL stop that is not the last one."""
        last = self.alignment_rows[-1] if self.alignment_rows else {}
        exported = next((stage.metrics for stage in self.stages if stage.name == "align_policy"), {})
        return {**last, **exported}
