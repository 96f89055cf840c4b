"""How a policy has changed since its alignment began, and the alarms that this raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from pipeline.evaluation.alarms import POLICY_ALARMS, alarm_messages, check_alarms
from pipeline.records import Metrics
from pipeline.tracking.alarm_names import raised_alarms

STEPS_AVERAGED = 3
"""Of the beginning and of the end: one step is noisy."""


class PolicyAlarms:
    """Checks the alarms of a policy step by step, and says each one once."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], *, say: Callable[[str], None]) -> None:
        """
        Args:
            rows: the metrics of the steps before, in order; what they raised has been said.
            say: shows a line to the user.
        """
        self._rows = list(rows)
        self._say = say
        self._said = {name for row in rows for name in raised_alarms(row)}

    def check(self, metrics: Metrics) -> Metrics:
        """`drift/*`, `alarm/*` and `train/alarms`, the number raised, of the next step."""
        self._rows.append(metrics)
        signals = drift(self._rows)
        checked = signals | check_alarms(metrics | signals, POLICY_ALARMS, counted_as="train/alarms")
        raised = {*raised_alarms(checked)}
        new = [alarm for alarm in POLICY_ALARMS if alarm.name in raised - self._said]
        for message in alarm_messages(metrics | checked, new, are_pairs_scored=True):
            self._say(message)
        self._said |= raised
        return checked


def drift(rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """`drift/*` of the last of these rows, as far as they are enough: the last three against the first three.

    drift/length, drift/entropy are factors. drift/repetition is a difference of shares. drift/reward_gap is the growth
    of the reward on training prompts minus that on validation prompts since the first validation, in standard
    deviations of the rewards of the first step.

    Args:
        rows: the metrics of every step so far, in order.
    """
    if len(rows) < 2 * STEPS_AVERAGED:
        return {}
    signals = {}
    for signal, metric in (("drift/length", "response/tokens"), ("drift/entropy", "ppo/entropy")):
        first, last = _ends(rows, metric)
        if first is not None and last is not None and first > 0:
            signals[signal] = last / first
    first, last = _ends(rows, "response/repetition")
    if first is not None and last is not None:
        signals["drift/repetition"] = last - first
    return signals | _reward_gap(rows)


def _ends(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[float | None, float | None]:
    """Means over the first and the last steps; None where the metric was not measured in each of them."""
    return _mean(rows[:STEPS_AVERAGED], metric), _mean(rows[-STEPS_AVERAGED:], metric)


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    values = [row[metric] for row in rows if metric in row]
    return fmean(values) if len(values) == STEPS_AVERAGED else None


def _reward_gap(rows: Sequence[Mapping[str, Any]]) -> Metrics:
    validated = [i for i, row in enumerate(rows) if "eval/reward" in row and "reward/mean" in row]
    spread = rows[0].get("reward/std_over_batch", 0.0)
    if len(validated) < 2 or validated[-1] != len(rows) - 1 or spread <= 0:
        return {}
    first, last = rows[validated[0]], rows[validated[-1]]
    trained = last["reward/mean"] - first["reward/mean"]
    return {"drift/reward_gap": (trained - (last["eval/reward"] - first["eval/reward"])) / spread}
