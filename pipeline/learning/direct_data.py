"""What direct alignment reads: tokenised pairs or labelled responses, their references, and the batch of every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config.direct_alignment import DirectConfig
from pipeline.data.batching import stable_seed, step_indices
from pipeline.data.chat import encode_prompt, encode_response, fit_prompt, strip_thinking
from pipeline.data.chat_rendering import require_chat_template
from pipeline.data.token_limit import require_enough_fit
from pipeline.errors import DataError
from pipeline.records import (
    DirectBatch,
    LabelledResponse,
    Message,
    Metrics,
    PreferencePair,
    PromptGroup,
    ReferencedResponses,
)

ReferenceOf = Callable[[Sequence[PromptGroup]], torch.Tensor]
"""[N, k] summed log-probabilities under the reference, of N prompts with k responses each."""

LEFT_OUT = "data/left_out/"
TOO_LONG, EMPTY, IDENTICAL = "more than max_length tokens", "an empty response", "identical responses in tokens"


@dataclass(frozen=True, kw_only=True)
class DirectExamples:
    """N prompts in the policy's tokens, with k responses each."""

    ids: tuple[str, ...]
    prompts: tuple[tuple[Message, ...], ...]
    groups: tuple[PromptGroup, ...]
    desirable: torch.Tensor
    """[N, k] bool."""
    left_out: Mapping[str, int]
    """Rows that gave no example, by reason."""

    def __len__(self) -> int:
        return len(self.groups)


def tokenise_examples(
    rows: Sequence[PreferencePair] | Sequence[LabelledResponse],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_too_long: float = 1.0,
) -> DirectExamples:
    """Encodes pairs or labelled responses; leaves out what does not fit, is empty, or is twice the same.

    Args:
        max_too_long: share of the rows that may be left out because they do not fit.

    Raises:
        DataError: nothing is left, which names the first row and a cure; or too little fits.
    """
    require_chat_template(tokenizer)
    kept: list[tuple[PreferencePair | LabelledResponse, PromptGroup]] = []
    left_out: Counter[str] = Counter()
    all_lengths: list[int] = []
    first_fault = ""
    for row in rows:
        texts = (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.response,)
        responses = tuple(encode_response(tokenizer, strip_thinking(text)) for text in texts)
        tokens = PromptGroup(prompt_ids=encode_prompt(tokenizer, row.prompt), response_ids=responses)
        all_lengths.append(len(tokens.prompt_ids) + max(map(len, responses)))
        fault = _fault(tokens, max_length)
        if fault is None:
            kept.append((row, tokens))
            continue
        left_out[fault] += 1
        first_fault = first_fault or f"{row.id!r} has {fault} ({all_lengths[-1]} tokens)"
    if left_out[TOO_LONG]:
        limit, num_fit = f"alignment.direct.max_length = {max_length}", len(rows) - left_out[TOO_LONG]
        require_enough_fit(all_lengths, num_fit, kind="rows", limit=limit, max_too_long=max_too_long)
    if not kept:
        raise DataError(
            f"none of {len(rows)} rows can be used: {first_fault or 'there is none'}. Give other data, or correct its "
            "format."
        )
    return DirectExamples(
        ids=tuple(row.id for row, _ in kept),
        prompts=tuple(row.prompt for row, _ in kept),
        groups=tuple(tokens for _, tokens in kept),
        desirable=torch.tensor([(True, False) if isinstance(row, PreferencePair) else (row.label,) for row, _ in kept]),
        left_out=left_out,
    )


def _fault(tokens: PromptGroup, max_length: int) -> str | None:
    lengths = [len(ids) for ids in tokens.response_ids]
    if min(lengths) < 2:  # the end of the turn alone
        return EMPTY
    if len(tokens.prompt_ids) + max(lengths) > max_length:
        return TOO_LONG
    return IDENTICAL if len(lengths) == 2 and len(set(tokens.response_ids)) == 1 else None


@dataclass(frozen=True, kw_only=True)
class DirectData:
    """The batch of a step is a pure function of the step, so a resumed run sees the same data."""

    config: DirectConfig
    examples: DirectExamples
    trained: Sequence[int]
    """The rows of `examples` to train on; with `easy_first` in the order in which they are read."""
    heldout: DirectExamples
    seed: int

    @property
    def num_steps(self) -> int:
        passes = (self.config.epochs or 1) * len(self.trained)
        return self.config.num_steps or max(1, passes // self.config.batch_pairs)

    def metrics(self) -> Metrics:
        """Sizes of the splits, and what did not fit."""
        sizes = {"data/train_rows": float(len(self.trained)), "data/heldout_pairs": float(len(self.heldout))}
        left_out = {
            f"{LEFT_OUT}{reason.replace(' ', '_')}": float(count) for reason, count in self.examples.left_out.items()
        }
        left_out[f"{LEFT_OUT}held-out_pairs"] = float(sum(self.heldout.left_out.values()))
        return sizes | {name: count for name, count in left_out.items() if count}

    def rows(self, step: int) -> list[int]:
        """The rows of `examples` in an optimiser step."""
        size, num_rows = self.config.batch_pairs, len(self.trained)
        if self.config.order == "easy_first":
            places = [position % num_rows for position in range(step * size, (step + 1) * size)]
        else:
            places = step_indices(num_rows, size, step, self.seed)
        return [self.trained[place] for place in places]

    def mismatched(self, rows: Sequence[int]) -> tuple[PromptGroup, ...]:
        """Every prompt of a batch with the responses of the row before it; the first with those of the last."""
        groups = self.examples.groups
        return mismatched_groups([groups[row] for row in rows], max_length=self.config.max_length)

    def rows_read(self) -> list[int]:
        """The rows of `examples` that a step of the training reads, sorted."""
        return sorted({row for step in range(self.num_steps) for row in self.rows(step)})

    def with_references(self, reference: ReferenceOf, *, of_every_row: bool = False) -> DirectBatches:
        """The same data with the log-probabilities of the reference that its method asks for.

        Held-out pairs always get them: they show how far the policy has moved.

        Args:
            of_every_row: also of rows that no step reads.
        """
        config = self.config
        trained_on = None
        if config.reference:
            rows = list(range(len(self.examples))) if of_every_row else self.rows_read()
            trained_on = torch.full(self.examples.desirable.shape, torch.nan)
            trained_on[rows] = reference([self.examples.groups[row] for row in rows])
        mismatched = None
        if config.losses.kto:
            groups = [group for step in range(self.num_steps) for group in self.mismatched(self.rows(step))]
            mismatched = reference(groups).view(self.num_steps, config.batch_pairs, -1)
        return DirectBatches(
            data=self, reference_logprobs=trained_on, mismatched=mismatched, heldout=self._heldout_batch(reference)
        )

    def _heldout_batch(self, reference: ReferenceOf) -> DirectBatch:
        groups, mismatched = self.heldout.groups, None
        if self.config.losses.kto:
            others = mismatched_groups(groups, max_length=self.config.max_length)
            mismatched = ReferencedResponses(groups=others, reference_logprobs=reference(others))
        return DirectBatch(
            groups=groups,
            desirable=self.heldout.desirable,
            reference_logprobs=reference(groups),
            mismatched=mismatched,
            seed=0,
        )


@dataclass(frozen=True, kw_only=True)
class DirectBatches:
    """`DirectData` whose references are known."""

    data: DirectData
    reference_logprobs: torch.Tensor | None
    """[N, k] of all training examples, NaN of rows that no step reads; None where the method has no reference."""
    mismatched: torch.Tensor | None
    """[num_steps, B, k] of KTO's mismatched responses of every step."""
    heldout: DirectBatch

    def batch(self, step: int) -> DirectBatch:
        """The training examples of a step."""
        data, rows = self.data, self.data.rows(step)
        mismatched = None
        if self.mismatched is not None:
            mismatched = ReferencedResponses(groups=data.mismatched(rows), reference_logprobs=self.mismatched[step])
        return DirectBatch(
            groups=tuple(data.examples.groups[row] for row in rows),
            desirable=data.examples.desirable[rows],
            reference_logprobs=None if self.reference_logprobs is None else self.reference_logprobs[rows],
            mismatched=mismatched,
            seed=stable_seed("direct", data.seed, step),
        )


def mismatched_groups(groups: Sequence[PromptGroup], *, max_length: int) -> tuple[PromptGroup, ...]:
    """KTO's other responses: those of the row before, and for the first row those of the last.

    A prompt is cut from the left where it does not fit together with them.

    Raises:
        DataError: there is one row alone.
    """
    if len(groups) < 2:
        raise DataError(
            f"KTO compares every prompt with the response to another one, and there is {len(groups)} row. Give more."
        )
    return tuple(
        PromptGroup(
            prompt_ids=fit_prompt(group.prompt_ids, max(before.response_ids, key=len), max_length),
            response_ids=before.response_ids,
        )
        for before, group in zip([groups[-1], *groups[:-1]], groups, strict=True)
    )
