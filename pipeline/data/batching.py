"""Which rows, in which order, on which rank: pure functions of seed and step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pipeline.errors import DataError


def step_indices(num_items: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of optimiser step `step`: a fresh permutation per epoch, drawn from (seed, epoch).

    Batches run across epoch borders, so every batch is whole and every row is used once per epoch.
    Resume and scaling change nothing: the answer depends on the arguments alone.

    Raises:
        DataError: there are no items.
    """
    if num_items == 0:
        raise DataError("there is nothing to draw a batch from: the training split is empty")
    first = step * batch_size
    indices: list[int] = []
    for position in range(first, first + batch_size):
        epoch, offset = divmod(position, num_items)
        if not indices or offset == 0:
            permutation = np.random.default_rng([seed, epoch]).permutation(num_items)
        indices.append(int(permutation[offset]))
    return indices


def plan_micro_batches(lengths: Sequence[int], *, world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Divides rows among ranks and packs each rank's rows into micro-batches of at most `max_tokens` tokens.

    The longest row comes first, and every second round runs backwards through the ranks, so ranks get similar amounts
    of work. A row longer than the budget gets a micro-batch of its own. Every rank gets as many micro-batches, some
    perhaps empty: a collective in the forward pass (ZeRO-3) needs the same number of calls from every rank.

    Args:
        lengths: tokens of each row.
        world_size: number of ranks.
        max_tokens: budget of one micro-batch.

    Returns:
        plan[rank][micro_batch] = row indices.
    """
    by_length = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    rows_of_ranks: list[list[int]] = [[] for _ in range(world_size)]
    for position, row in enumerate(by_length):
        round_number, rank = divmod(position, world_size)
        rows_of_ranks[rank if round_number % 2 == 0 else world_size - 1 - rank].append(row)
    plan = [_pack(rows, lengths, max_tokens) for rows in rows_of_ranks]
    most = max(len(packed) for packed in plan)
    return [packed + [[] for _ in range(most - len(packed))] for packed in plan]


def _pack(rows: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Fills one micro-batch after the other, in the order of the rows."""
    packed: list[list[int]] = []
    room = 0
    for row in rows:
        if lengths[row] > room:
            packed.append([])
            room = max_tokens
        packed[-1].append(row)
        room -= lengths[row]
    return packed


def stable_seed(*parts: int | str) -> int:
    """A 62-bit seed from numbers and names; the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
