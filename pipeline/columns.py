"""The token records of a batch as columns: the tokens of all rows in one tensor, everything else in tuples.

Each class is also a sequence of records of `pipeline.records`. Reading a row makes its record, with a Python object for
every token. So rows are for what people read; what every token passes through takes the columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
import torch

from pipeline.ragged import Ragged
from pipeline.records import FinishReason, Message, Prompt, PromptGroup, Rollout, TokenEvaluation
from pipeline.repetition import repeated_shares

Record = TypeVar("Record")


class Columns(Sequence[Record], Generic[Record]):
    """A sequence whose rows are made when they are read."""

    @abstractmethod
    def row(self, row: int) -> Record:
        """Makes one record; `row` counts from 0."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> Self:
        """The rows of these [n] indices, in their order."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Any:
        rows = range(len(self))[index]  # counts from the end, too, and raises IndexError
        return self.row(rows) if isinstance(rows, int) else self.select(torch.tensor(rows, dtype=torch.int64))

    def __iter__(self) -> Iterator[Record]:
        return map(self.row, range(len(self)))


@dataclass(frozen=True, kw_only=True)
class Sequences(Columns[PromptGroup]):
    """B prompts with one response each."""

    prompt_ids: Ragged
    """int32."""
    response_ids: Ragged
    """int32."""

    def __len__(self) -> int:
        return len(self.response_ids)

    def row(self, row: int) -> PromptGroup:
        return PromptGroup(
            prompt_ids=tuple(self.prompt_ids[row].tolist()), response_ids=(tuple(self.response_ids[row].tolist()),)
        )

    def select(self, rows: torch.Tensor) -> Sequences:
        return Sequences(prompt_ids=self.prompt_ids.select(rows), response_ids=self.response_ids.select(rows))


@dataclass(frozen=True, kw_only=True)
class Rollouts(Columns[Rollout]):
    """B rollouts; the columns are the fields of `Rollout`, and what is counted where the tokens are made."""

    prompts: tuple[Prompt, ...]
    sample_indices: tuple[int, ...]
    response_ids: Ragged
    """int32."""
    response_texts: tuple[str, ...]
    logprobs: Ragged
    """float32, as engines compute them."""
    policy_versions: tuple[int, ...]
    finish_reasons: tuple[FinishReason, ...]
    repetition: tuple[float, ...]
    """Share of the response's 4-grams of tokens that have occurred in it before."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Rollouts:
        response_ids = Ragged.of([rollout.response_ids for rollout in rollouts], np.int32)
        return cls(
            prompts=tuple(rollout.prompt for rollout in rollouts),
            sample_indices=tuple(rollout.sample_index for rollout in rollouts),
            response_ids=response_ids,
            response_texts=tuple(rollout.response_text for rollout in rollouts),
            logprobs=Ragged.of([rollout.logprobs for rollout in rollouts], np.float32),
            policy_versions=tuple(rollout.policy_version for rollout in rollouts),
            finish_reasons=tuple(rollout.finish_reason for rollout in rollouts),
            repetition=tuple(repeated_shares(response_ids).tolist()),
        )

    @classmethod
    def concat(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """The rows of all parts, one part after the other."""
        return cls(
            prompts=tuple(chain.from_iterable(part.prompts for part in parts)),
            sample_indices=tuple(chain.from_iterable(part.sample_indices for part in parts)),
            response_ids=Ragged.concat([part.response_ids for part in parts]),
            response_texts=tuple(chain.from_iterable(part.response_texts for part in parts)),
            logprobs=Ragged.concat([part.logprobs for part in parts]),
            policy_versions=tuple(chain.from_iterable(part.policy_versions for part in parts)),
            finish_reasons=tuple(chain.from_iterable(part.finish_reasons for part in parts)),
            repetition=tuple(chain.from_iterable(part.repetition for part in parts)),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def row(self, row: int) -> Rollout:
        return Rollout(
            prompt=self.prompts[row],
            sample_index=self.sample_indices[row],
            response_ids=tuple(self.response_ids[row].tolist()),
            response_text=self.response_texts[row],
            logprobs=tuple(self.logprobs[row].tolist()),
            policy_version=self.policy_versions[row],
            finish_reason=self.finish_reasons[row],
        )

    def select(self, rows: torch.Tensor) -> Rollouts:
        places = rows.tolist()
        return Rollouts(
            prompts=tuple(self.prompts[row] for row in places),
            sample_indices=tuple(self.sample_indices[row] for row in places),
            response_ids=self.response_ids.select(rows),
            response_texts=tuple(self.response_texts[row] for row in places),
            logprobs=self.logprobs.select(rows),
            policy_versions=tuple(self.policy_versions[row] for row in places),
            finish_reasons=tuple(self.finish_reasons[row] for row in places),
            repetition=tuple(self.repetition[row] for row in places),
        )

    @property
    def conversations(self) -> list[tuple[Message, ...]]:
        """The prompts in words."""
        return [prompt.messages for prompt in self.prompts]

    @property
    def num_response_tokens(self) -> int:
        return len(self.response_ids.values)

    @property
    def sequences(self) -> Sequences:
        """The tokens alone."""
        prompt_ids = Ragged.of([prompt.token_ids for prompt in self.prompts], np.int32)
        return Sequences(prompt_ids=prompt_ids, response_ids=self.response_ids)


@dataclass(frozen=True, kw_only=True)
class TokenEvaluations(Columns[TokenEvaluation]):
    """The learner's view of B rollouts; the columns are the fields of `TokenEvaluation`, float32."""

    logprobs: Ragged
    reference_logprobs: Ragged
    values: Ragged

    @classmethod
    def of(cls, evaluations: Sequence[TokenEvaluation]) -> TokenEvaluations:
        return cls(
            logprobs=Ragged.of([evaluation.logprobs for evaluation in evaluations], np.float32),
            reference_logprobs=Ragged.of([evaluation.reference_logprobs for evaluation in evaluations], np.float32),
            values=Ragged.of([evaluation.values for evaluation in evaluations], np.float32),
        )

    def __len__(self) -> int:
        return len(self.logprobs)

    def row(self, row: int) -> TokenEvaluation:
        return TokenEvaluation(
            logprobs=tuple(self.logprobs[row].tolist()),
            reference_logprobs=tuple(self.reference_logprobs[row].tolist()),
            values=tuple(self.values[row].tolist()),
        )

    def select(self, rows: torch.Tensor) -> TokenEvaluations:
        return TokenEvaluations(
            logprobs=self.logprobs.select(rows),
            reference_logprobs=self.reference_logprobs.select(rows),
            values=self.values.select(rows),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluatedRollouts:
    """Rollouts, and the learner's view of their tokens."""

    rollouts: Rollouts
    tokens: TokenEvaluations
