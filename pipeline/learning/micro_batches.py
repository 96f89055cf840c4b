"""A rank's share of a batch, and the sums over the shares of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.data.batching import plan_micro_batches
from pipeline.learning.engine import TrainEngine
from pipeline.models.packing import PackedTokens, pack
from pipeline.models.sequence_parallel import SequenceGroup
from pipeline.records import PromptGroup


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows of a batch that a rank runs together in one forward pass."""

    rows: torch.Tensor
    """[n] int64 indices into the global batch; never empty."""
    weight: float
    """1, or 0 where the rows count elsewhere: on the first rank of this rank's sequence group, or nowhere, if they only
    stand in to make the collective calls of a rank that has no rows left."""
    last: bool
    """No micro-batch of the batch follows."""
    most_response_tokens: int
    """Response tokens that any rank predicts in this micro-batch, at most."""
    sequence_group: SequenceGroup | None = None
    """The ranks that compute these rows together with this one."""

    def pack(self, groups: Sequence[PromptGroup]) -> PackedTokens:
        """The prompts and responses of the rows, as this rank computes them."""
        return pack(groups, most_response_tokens=self.most_response_tokens, sequence_group=self.sequence_group)


def own_micro_batches(groups: Sequence[PromptGroup], engine: TrainEngine, max_tokens: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a batch of prompts with their responses; as many on every rank.

    n ranks of a sequence group have the same rows, and the first of them counts what is computed. Together they take n
    times the tokens of a rank.
    """
    n = 1 if engine.sequence_group is None else engine.sequence_group.size
    share, place = divmod(engine.rank, n)
    plan = plan_micro_batches(
        [g.num_tokens for g in groups], world_size=engine.world_size // n, max_tokens=n * max_tokens
    )
    # A rank without rows stands in with row 0.
    by_position = [[rows or [0] for rows in rows_of_shares] for rows_of_shares in zip(*plan, strict=True)]
    for i, rows_of_shares in enumerate(by_position):
        yield MicroBatch(
            rows=torch.tensor(rows_of_shares[share]),
            weight=float(place == 0 and bool(plan[share][i])),
            last=i == len(by_position) - 1,
            most_response_tokens=max(
                sum(_most_predicted(len(response), n) for row in rows for response in groups[row].response_ids)
                for rows in rows_of_shares
            ),
            sequence_group=engine.sequence_group,
        )


def _most_predicted(num_tokens: int, n: int) -> int:
    """Tokens of a response that one of n ranks predicts, at most.

    The first is predicted from the end of the prompt, the others from num_tokens - 1 consecutive tokens.
    """
    return 1 + math.ceil((num_tokens - 1) / n)


class Sums:
    """Named sums, added up over micro-batches here and over ranks at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, weight: float, **values: torch.Tensor) -> None:
        """Adds float64 sums; a stand-in micro-batch (weight 0) adds 0, so all ranks have the same names."""
        for name, value in values.items():
            term = torch.nan_to_num(value.detach().double()) * weight if weight == 0 else value.detach().double()
            self._sums[name] = self._sums[name] + term if name in self._sums else term

    def over_ranks(self, engine: TrainEngine) -> dict[str, torch.Tensor]:
        """The sums of all ranks, on the CPU, equal everywhere; one collective for all names."""
        flat = torch.cat([value.reshape(-1) for value in self._sums.values()]).to(engine.device)
        total = engine.sum_over_ranks(flat).cpu()
        pieces = total.split([value.numel() for value in self._sums.values()])
        return {name: piece.view(self._sums[name].shape) for name, piece in zip(self._sums, pieces, strict=True)}


class RowValues:
    """One value per row of the whole batch, each filled in by the rank that owns the row."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._dense: torch.Tensor | None = None

    def put(self, weight: float, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Fills in `values` [n, ...] of the rows [n]; a stand-in (weight 0) only sets the shape."""
        if self._dense is None:
            self._dense = values.new_zeros(self._num_rows, *values.shape[1:])
        if weight:
            self._dense[rows] = values.detach()

    def over_ranks(self, engine: TrainEngine) -> torch.Tensor:
        """[num_rows, ...] on the CPU, equal on every rank: a sum, because other ranks' rows are zero here."""
        assert self._dense is not None  # every rank has a micro-batch, perhaps a stand-in
        return engine.sum_over_ranks(self._dense).cpu()
