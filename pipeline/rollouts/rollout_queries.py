"""Pages of kept rollouts: filtered, sorted and searched where the files lie, so a reader holds a page at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import parquet

from pipeline.errors import DataError
from pipeline.rollouts.kept_rollouts import step_file

SortColumn = Literal[
    "step", "reward", "reward_std", "advantage", "kl", "logprob_gap", "tokens", "repetition", "policy_version"
]
SORT_COLUMNS = get_args(SortColumn)
MAX_PAGE = 200
SHOWN_CHARS = 280
"""Of prompts and responses in a page; a single rollout has them whole."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RolloutFilter:
    """Which rollouts are asked for; None takes all."""

    text: str | None = None
    """Stands in prompt or response, in any case."""
    prompt_id: str | None = None
    step_from: int | None = None
    step_to: int | None = None
    """The last step that is asked for, from 0 as in the files."""
    finish_reason: str | None = None
    reward_from: float | None = None
    reward_to: float | None = None

    def expression(self) -> pc.Expression | None:
        """The filter for pyarrow; None takes every row."""
        field = ds.field
        terms = []
        if self.text:
            terms.append(_holds_text(self.text))
        if self.prompt_id is not None:
            terms.append(field("prompt_id") == self.prompt_id)
        if self.finish_reason is not None:
            terms.append(field("finish_reason") == self.finish_reason)
        for column, low, high in (
            ("step", self.step_from, self.step_to),
            ("reward", self.reward_from, self.reward_to),
        ):
            if low is not None:
                terms.append(field(column) >= low)
            if high is not None:
                terms.append(field(column) <= high)
        whole = None
        for term in terms:
            whole = term if whole is None else whole & term
        return whole


def _holds_text(text: str) -> pc.Expression:
    return pc.match_substring(ds.field("response"), text, ignore_case=True) | pc.match_substring(
        ds.field("prompt"), text, ignore_case=True
    )


class RolloutQueries:
    """The rollout files of one stage, which a training may still be writing."""

    def __init__(self, directory: str) -> None:
        """
        Args:
            directory: a local directory of `RolloutFiles`.
        """
        self._directory = directory

    def page(
        self, asked: RolloutFilter, *, sort: SortColumn, descending: bool, offset: int, limit: int
    ) -> tuple[int, list[Row]]:
        """How many rollouts the filter takes, and `limit` of them from `offset` on, with their texts cut short.

        Equal rollouts stand in the order of training. Rollouts without a value come last.
        """
        dataset = self._dataset()
        if dataset is None:
            return 0, []
        places = dataset.to_table(columns=[*{"step", "position", sort}], filter=asked.expression())
        order = "descending" if descending else "ascending"
        keys = [(sort, order), *((key, "ascending") for key in ("step", "position") if key != sort)]
        ranked = places.take(pc.sort_indices(places, sort_keys=keys))  # what has no value stands at the end either way
        chosen = ranked.slice(offset, min(limit, MAX_PAGE))
        wanted = list(zip(chosen["step"].to_pylist(), chosen["position"].to_pylist(), strict=True))
        found = self._rows(wanted)
        return places.num_rows, [_cut(found[place]) for place in wanted]

    def rollout(self, step: int, position: int) -> Row:
        """One rollout with its whole texts.

        Raises:
            DataError: it was not kept.
        """
        found = self._rows([(step, position)])
        if not found:
            raise DataError(f"rollout {position} of step {step} was not kept")
        return found[step, position]

    def summary(self) -> Row:
        """How many rollouts there are, of which steps, in how many bytes, and the names of sources and objectives."""
        files = self._files()
        rows = sum(parquet.read_metadata(path).num_rows for path in files)
        first = self._first_row()
        steps = [int(os.path.basename(path).removeprefix("step-").removesuffix(".parquet")) for path in files]
        return {
            "rollouts": rows,
            "steps": [min(steps), max(steps)] if steps else [],
            "mib": sum(map(os.path.getsize, files)) / 2**20,
            "sources": list(first.get("rewards", {})),
            "objectives": list(first.get("contributions", {})),
        }

    def all_rows(self) -> Iterator[Row]:
        """Every rollout, step by step; one file at a time is in memory."""
        for path in self._files():
            yield from map(_plain, parquet.read_table(path).to_pylist())

    def _first_row(self) -> Row:
        return next(self.all_rows(), {})

    def _rows(self, wanted: list[tuple[int, int]]) -> dict[tuple[int, int], Row]:
        """(step, position) -> the rollout; those that were not kept are missing."""
        found: dict[tuple[int, int], Row] = {}
        for step in {step for step, _ in wanted}:
            path = os.path.join(self._directory, step_file(step))
            if os.path.exists(path):
                positions = pyarrow.array([position for of_step, position in wanted if of_step == step])
                table = parquet.read_table(path, filters=ds.field("position").isin(positions))
                found |= {(row["step"], row["position"]): _plain(row) for row in table.to_pylist()}
        return found

    def _dataset(self) -> ds.Dataset | None:
        files = self._files()
        return ds.dataset(files, format="parquet") if files else None

    def _files(self) -> list[str]:
        if not os.path.isdir(self._directory):
            return []
        names = sorted(name for name in os.listdir(self._directory) if name.endswith(".parquet"))
        return [os.path.join(self._directory, name) for name in names]


def _plain(row: Row) -> Row:
    """As JSON has it: a map is an object."""
    return row | {name: dict(row[name]) for name in ("rewards", "contributions")}


def _cut(row: Row) -> Row:
    """Without what only a single rollout shows."""
    kept = {name: value for name, value in row.items() if name not in ("messages", "prompt_ids", "response_ids")}
    return kept | {name: _shortened(row[name]) for name in ("prompt", "response")}


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]} …"
