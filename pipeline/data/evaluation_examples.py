"""Examples to evaluate a reward model on: pairs, best-of-n lists, and lists with several right answers."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from pipeline.data.files import Row, read_rows, require_distinct_files
from pipeline.data.preferences import LeftOut, fault_of, normalised_prompt
from pipeline.data.prompts import prompt_of, split_conversation, with_columns_beside
from pipeline.errors import DataError
from pipeline.records import Message, PreferencePair

NO_SUBSET = "all"


@dataclass(frozen=True, kw_only=True)
class EvaluationExample:
    """One row to evaluate a reward model on: every chosen response should score above every rejected one."""

    id: str
    subset: str
    source: str
    """Its `source`, or the name of its file where the row has none."""
    place: str
    """"<file>, line <n>": what an error message needs."""
    prompt: tuple[Message, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    annotators_tie: bool
    """The data set's own scores of both sides are there, and equal: the label is random."""
    scores_chosen: Mapping[str, float] = field(default_factory=dict)
    """Annotated scores of the chosen response by objective; empty where nobody annotated it."""
    scores_rejected: Mapping[str, float] = field(default_factory=dict)

    @property
    def content_key(self) -> str:
        """Hash of all texts: equal rows of two files, or of two evaluations, have equal keys."""
        texts = [[[turn["role"], turn["content"]] for turn in self.prompt], self.chosen, self.rejected]
        return _digest(json.dumps(texts))

    @property
    def prompt_key(self) -> str:
        """Hash of the normalised prompt: rows of one prompt are not independent of each other."""
        return prompt_key(self.prompt)


def prompt_key(prompt: Sequence[Message]) -> str:
    """Hash of a prompt, lower case and white space aside."""
    return _digest(normalised_prompt(prompt))


def read_examples(
    files: Sequence[str], *, subset_field: str | None = None, left_out: Counter[LeftOut] | None = None
) -> Iterator[EvaluationExample]:
    """Streams the rows of JSONL and Parquet files; those with an empty response, or one on both sides, are left out.

    A row has `prompt` (a text or a conversation), `chosen` and `rejected`. Each of the two is one text, a list of
    texts, or one conversation that ends with the response. A conversation with turns before the response brings its own
    prompt, which must be the same on both sides. `id` and `subset` are optional. So are the annotators' `score_chosen`
    and `score_rejected`, as in UltraFeedback, and `scores_chosen` and `scores_rejected`, mappings from objective to
    score.

    Args:
        files: files, or directories of such files.
        subset_field: field that names the subset, required in every row; None reads `subset` where it is there.
        left_out: counts the rows that are left out, by reason.

    Raises:
        DataError: names file, line, field and cure; or a file is named twice.
    """
    require_distinct_files(files)
    for file in files:
        for row in read_rows(file):
            example = _example(row, subset_field, PurePath(file).stem)
            fault = fault_of(example.chosen, example.rejected)
            if fault is None:
                yield example
            elif left_out is not None:
                left_out[fault] += 1


def examples_of_pairs(pairs: Iterable[PreferencePair]) -> list[EvaluationExample]:
    """The pairs of a run as examples; the subset is the source."""
    return [
        EvaluationExample(
            id=pair.id,
            subset=pair.source,
            source=pair.source,
            place=f"pair {pair.id!r} of {pair.source}",
            prompt=pair.prompt,
            chosen=(pair.chosen,),
            rejected=(pair.rejected,),
            annotators_tie=False,
            scores_chosen=pair.scores_chosen or {},
            scores_rejected=pair.scores_rejected or {},
        )
        for pair in pairs
    ]


def _example(row: Row, subset_field: str | None, file: str) -> EvaluationExample:
    source = row.values.get("source")
    score = row.values.get("score_chosen")
    chosen, chosen_prompt = _responses(row, "chosen")
    rejected, rejected_prompt = _responses(row, "rejected")
    if chosen_prompt != rejected_prompt:
        raise DataError(
            f"{row.place}: the conversations 'chosen' and 'rejected' differ before their last turn, so they answer "
            "different prompts. Give the prompt once, in the field 'prompt', and the last turns alone."
        )
    return EvaluationExample(
        id=row.identity,
        subset=_subset(row, subset_field),
        source=source if isinstance(source, str) and source.strip() else file,
        place=row.place,
        prompt=with_columns_beside(row, "chosen", chosen_prompt) if chosen_prompt else prompt_of(row, ("prompt",)),
        chosen=chosen,
        rejected=rejected,
        annotators_tie=score is not None and bool(score == row.values.get("score_rejected")),
        scores_chosen=_scores(row, "scores_chosen"),
        scores_rejected=_scores(row, "scores_rejected"),
    )


def _scores(row: Row, name: str) -> dict[str, float]:
    """The annotated scores of a response, of any objective; null, "" and "N/A" mean: not annotated."""
    values = row.values.get(name)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise DataError(f"{row.place}, field {name!r}: {values!r:.60} is no mapping from objective to score")
    scores = {}
    for objective, value in values.items():
        if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A")):
            continue
        try:
            scores[objective] = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            scores[objective] = math.nan
        if not math.isfinite(scores[objective]):
            raise DataError(f"{row.place}, field '{name}.{objective}': {value!r:.40} is no finite number")
    return scores


def _responses(row: Row, field: str) -> tuple[tuple[str, ...], tuple[Message, ...]]:
    """The responses of a field, and their prompt where the field holds a conversation."""
    value, place = row.values.get(field), f"{row.place}, field {field!r}"
    if isinstance(value, str):
        return (value,), ()
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value), ()
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        prompt, response = split_conversation(value, place=place)
        return (response,), prompt
    raise DataError(
        f"{place}: {value!r:.60} is no response; give a text, a non-empty list of texts, or a conversation of "
        f"{{role, content}}. Of this row {row.found}; rename the columns of a file that calls its responses otherwise."
    )


def _subset(row: Row, field: str | None) -> str:
    value: Any = row.values.get(field or "subset")
    if value is None:
        if field is None:
            return NO_SUBSET
        raise DataError(
            f"{row.place}, field {field!r}: not there, but it names the subset. The row has "
            f"{', '.join(sorted(row.values))}; choose another field with --subset-field."
        )
    return str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
