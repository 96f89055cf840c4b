"""What is left out because it exceeds a stage's token limit: refused where it is most of the data."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import DataError


def require_enough_fit(lengths: Sequence[int], num_kept: int, *, kind: str, limit: str, max_too_long: float) -> None:
    """Checks what a token limit left of the data.

    Args:
        lengths: tokens of every item, kept or not.
        kind: what an item is, in the plural.
        limit: the setting and its value, as in "reward.max_length = 1024".
        max_too_long: share of the items that may be left out.

    Raises:
        DataError: nothing is kept, or a larger share is left out.
    """
    if num_kept == 0:
        raise DataError(
            f"none of {len(lengths)} {kind} fits in {limit} tokens (the shortest has {min(lengths, default=0)}). "
            f"Raise the limit, or give shorter {kind}."
        )
    num_left_out = len(lengths) - num_kept
    if num_left_out > max_too_long * len(lengths):
        median = sorted(lengths)[len(lengths) // 2]
        raise DataError(
            f"{num_left_out} of {len(lengths)} {kind} exceed {limit} tokens (the median has {median}); "
            f"data.max_too_long allows a share of {max_too_long:g}. Raise the limit or that share, or give shorter "
            f"{kind}."
        )
