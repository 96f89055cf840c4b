"""When each alarm of a run was checked and raised, and whether the finished model still raises it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.evaluation.alarms import Alarm, alarm_messages
from pipeline.reporting.report_data import MetricsRow
from pipeline.tracking.alarm_names import ALARM_PREFIX


@dataclass(frozen=True, kw_only=True)
class AlarmHistory:
    """One alarm over a training."""

    name: str
    raised_when: str
    """Its threshold, in words."""
    is_raised: bool
    """By the finished model."""
    values: str
    """Of its signals, at the end."""
    message: str
    """What the terminal said; empty where the finished model raises no alarm."""
    checked: int
    """Number of steps that checked it."""
    raised_at: tuple[int, ...]
    """Steps that raised it, counted from 1."""

    @property
    def times(self) -> str:
        """The steps that raised it, in words."""
        if not self.raised_at:
            return "never"
        first, last = self.raised_at[0], self.raised_at[-1]
        steps = f"in step {first}" if first == last else f"in steps {first} to {last}"
        return f"in {len(self.raised_at)} of {self.checked} checks, {steps}"


def alarm_histories(
    rows: Sequence[MetricsRow], finished: Mapping[str, float], alarms: Sequence[Alarm], *, are_pairs_scored: bool
) -> list[AlarmHistory]:
    """The history of each alarm that was ever checked.

    Args:
        rows: metrics.jsonl of the stage; may be empty.
        finished: metrics of the finished model.
        are_pairs_scored: whether any training pair has objective scores.
    """
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        steps.setdefault(row["step"] + 1, {}).update(row)
    # The finished metrics may lack a signal of training, such as that of the last batch.
    at_end = {**(steps[max(steps)] if steps else {}), **finished}
    histories = []
    for alarm in alarms:
        key = ALARM_PREFIX + alarm.name
        checked = {step: bool(row[key]) for step, row in steps.items() if key in row}
        if key in at_end or checked:
            is_raised = bool(at_end.get(key, False))
            histories.append(
                AlarmHistory(
                    name=alarm.name,
                    raised_when=alarm.raised_when.replace("`", ""),
                    is_raised=is_raised,
                    values=_values(alarm, at_end),
                    message="".join(alarm_messages(at_end, [alarm], are_pairs_scored=are_pairs_scored)),
                    checked=len(checked),
                    raised_at=tuple(step for step, raised in checked.items() if raised),
                )
            )
    return histories


def _values(alarm: Alarm, metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{signal} = {metrics[signal]:.3g}" for signal in alarm.signals if signal in metrics)
