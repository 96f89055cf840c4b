"""Rows of different lengths in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from pipeline.errors import ShapeError


@dataclass(frozen=True, eq=False)
class Ragged:
    """B rows end to end. Nobody writes into the tensors: views share them, and processes of a node may share them.

    A pickle holds the numbers of these rows alone, also where they are a view into more. They lie in buffers that Ray
    hands over without a copy.
    """

    values: torch.Tensor
    """[N], the rows one after the other."""
    offsets: torch.Tensor
    """[B + 1] int64: row b is `values[offsets[b]:offsets[b + 1]]`."""

    def __post_init__(self) -> None:
        """Raises ShapeError unless the offsets begin with 0 and end with N."""
        first, last = (int(self.offsets[0]), int(self.offsets[-1])) if len(self.offsets) else (0, -1)
        if self.values.dim() != 1 or first != 0 or last != len(self.values):
            raise ShapeError(f"offsets from {first} to {last} do not divide values of shape {list(self.values.shape)}")

    @classmethod
    def of(cls, rows: Iterable[Sequence[float]], dtype: type[np.generic]) -> Ragged:
        """Copies rows of Python numbers."""
        rows = list(rows)
        values = np.fromiter(chain.from_iterable(rows), dtype=dtype, count=sum(map(len, rows)))
        return cls(torch.from_numpy(values), torch.tensor([0, *accumulate(map(len, rows))]))

    @classmethod
    def divided(cls, values: torch.Tensor, lengths: torch.Tensor) -> Ragged:
        """Rows of these lengths, one after the other."""
        return cls(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, one part after the other; copies them."""
        return cls.divided(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> torch.Tensor:
        """A view of one row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.values.split(self.lengths.tolist()))

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int64."""
        return self.offsets.diff()

    def sums(self) -> torch.Tensor:
        """[B] float64: the sum of each row, whose rounding does not depend on other rows."""
        sums, has_values = torch.zeros(len(self), dtype=torch.float64), self.lengths > 0
        if len(self.values):
            starts = self.offsets[:-1][has_values].numpy()
            sums[has_values] = torch.from_numpy(np.add.reduceat(self.values.numpy(), starts, dtype=np.float64))
        return sums

    def select(self, rows: torch.Tensor) -> Ragged:
        """The rows of these [n] indices, in their order. Consecutive rows stay a view, others are copied."""
        if len(rows) and bool((rows.diff() == 1).all()):
            offsets = self.offsets[int(rows[0]) : int(rows[-1]) + 2]
            return Ragged(self.values[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0])
        lengths = self.lengths[rows]
        ends = lengths.cumsum(0)
        shift = (self.offsets[rows] - ends + lengths).repeat_interleave(lengths)
        return Ragged.divided(self.values[shift + torch.arange(len(shift))], lengths)

    def __eq__(self, other: object) -> bool:
        """Whether the rows are the same numbers of the same type, bit for bit but for the sign of zero."""
        if not isinstance(other, Ragged):
            return NotImplemented
        return self.values.dtype == other.values.dtype and all(
            torch.equal(ours, theirs) for ours, theirs in ((self.values, other.values), (self.offsets, other.offsets))
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[..., Ragged], tuple[Any, Any]]:
        return _from_arrays, (self.values.numpy(), self.offsets.numpy())


BLOCK_VALUES = 2**20
"""Values of a padded block: few enough that the passes over a block find it in a processor's cache."""


def in_padded_blocks(
    function: Callable[..., torch.Tensor], *columns: Ragged, block_values: int = BLOCK_VALUES
) -> torch.Tensor:
    """[N] what `function` makes of columns with the same offsets, block by block of rows of similar length.

    Args:
        function: takes a block [n, T] of each column, left-aligned and 0 on padding, then the mask [n, T], which is
            True on values. Returns [n, T].
        block_values: n * T at most. A row that is longer is a block of its own.
    """
    offsets = columns[0].offsets
    results = torch.empty_like(columns[0].values)
    lengths, rows = offsets.diff().sort(descending=True, stable=True)
    first = 0
    while first < len(rows):
        width = int(lengths[first])
        block = slice(first, first + max(1, block_values // max(1, width)))
        starts, ends = offsets[rows[block]].tolist(), offsets[rows[block] + 1].tolist()
        padded = [_padded(column.values.numpy(), starts, ends, width) for column in columns]
        result = function(*padded, torch.arange(width) < lengths[block].unsqueeze(-1)).numpy()
        target = results.numpy()
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            target[start:end] = result[row, : end - start]
        first = block.stop
    return results


def _padded(values: np.ndarray, starts: list[int], ends: list[int], width: int) -> torch.Tensor:
    # A copy a row takes a tenth of the time of one assignment through a mask.
    dense = np.zeros((len(starts), width), dtype=values.dtype)
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        dense[row, : end - start] = values[start:end]
    return torch.from_numpy(dense)


def _from_arrays(values: np.ndarray, offsets: np.ndarray) -> Ragged:
    # Not `from_numpy`, which warns of memory that cannot be written.
    return Ragged(torch.from_dlpack(values), torch.from_dlpack(offsets))
