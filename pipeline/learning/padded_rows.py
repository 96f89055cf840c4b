"""Some rows of a batch as the loss wants them: padded, where the batch has its tokens end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """n rows of a batch, left-aligned, as long as the longest row of the whole batch."""

    mask: torch.Tensor
    """[n, T] bool, True on tokens."""
    _places: torch.Tensor
    """[n, T] int64: where each token lies in the batch; 0 on padding."""

    @classmethod
    def of(cls, offsets: torch.Tensor, rows: torch.Tensor) -> PaddedRows:
        """The rows [n] of a batch of B, whose tokens begin at `offsets` [B + 1]."""
        lengths = offsets.diff()
        columns = torch.arange(int(lengths.max()))
        mask = columns < lengths[rows].unsqueeze(-1)
        return cls(mask=mask, _places=torch.where(mask, offsets[rows].unsqueeze(-1) + columns, 0))

    def take(self, column: torch.Tensor) -> torch.Tensor:
        """[n, T] the numbers of these rows in a column [N] of the batch; 0 on padding."""
        return torch.where(self.mask, column[self._places], 0)
