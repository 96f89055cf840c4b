"""How alarms stand in a row of metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALARM_PREFIX = "alarm/"


def raised_alarms(row: Mapping[str, Any]) -> list[str]:
    """Names of the alarms that a row of metrics raises, in the order of the row."""
    return [name.removeprefix(ALARM_PREFIX) for name, value in row.items() if name.startswith(ALARM_PREFIX) and value]
