"""The number of a verdict in a judgment file: a grade or a preference. One rule holds for every benchmark."""

from __future__ import annotations

import math
from collections.abc import Container

from pipeline.data.files import Row
from pipeline.errors import DataError

VERDICT_RULE = (
    "A judgment without a verdict (null, NaN, MT-Bench's -1, an unknown label) counts as failed and enters no mean. A "
    "number outside the range of the benchmark is refused."
)
"""The rule as a sentence for the results."""


def read_verdict_number(
    row: Row, field: str, *, lowest: float, highest: float, marks: Container[float], remedy: str
) -> float | None:
    """The number in [lowest, highest], or one of `marks`; None for null and NaN, which mean that there is none.

    Args:
        marks: numbers outside the range to which the benchmark gives a meaning of their own.
        remedy: what to do about a number outside the range, for the error message.

    Raises:
        DataError: the field is missing, a boolean, no number, or outside the range. Names file, line and field.
    """
    value = row.values.get(field, "")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{row.place}, field {field!r}: {value!r:.40} is not a number")
    if math.isnan(value):
        return None
    if not lowest <= value <= highest and value not in marks:
        raise DataError(f"{row.place}, field {field!r}: {value!r:.40} is not in [{lowest:g}, {highest:g}]. {remedy}")
    return float(value)
