"""The JSONL file of scored rows: written while scoring, and read by every aggregation."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from pipeline.data.chat import strip_thinking
from pipeline.data.evaluation_examples import EvaluationExample, prompt_key
from pipeline.data.files import read_rows
from pipeline.data.prompts import read_prompts
from pipeline.errors import DataError, NumericsError
from pipeline.evaluation.scored_rows import RewardedResponse, ScoredComparison, ScoredRows, key_column, key_number
from pipeline.objectives.reward_comparison import compare_rewards
from pipeline.ports import RewardScorer
from pipeline.records import Message, RewardScore

ROWS_PER_CHUNK = 128
"""Rows in memory at a time; enough to put rows of similar length into one micro-batch."""

FIELDS = ("id", "subset", "source", "cut", "annotators_tie")


class ComparisonScorer(RewardScorer, Protocol):
    """A reward that also knows what it can read."""

    def fits(self, prompt: tuple[Message, ...], response: str) -> bool:
        """Whether `score` reads prompt and response whole."""


def write_scored_rows(
    comparisons: Iterable[EvaluationExample],
    path: Path,
    *,
    scored_by: str,
    load_scorer: Callable[[], ComparisonScorer],
    report: Callable[[int, int], None],
) -> None:
    """Writes one line per row, in order, and keeps the lines that an interrupted run left in the file.

    Consumes `comparisons` in chunks, with the texts of one chunk in memory at a time. A killed run may leave an
    incomplete last line. The next run resumes after the last complete line.

    Args:
        comparisons: the rows to score.
        path: the file. Its directory must exist.
        scored_by: identity of the model and its precision, written into every line.
        load_scorer: called once, before the first row is scored.
        report: called after every chunk with (rows done, rows of them that an earlier run did).

    Raises:
        DataError: the file holds rows of another model or of other data.
        NumericsError: a reward is not finite.
    """
    rows = iter(comparisons)
    kept = done = _skip_scored(rows, path, scored_by)
    scorer = None
    with path.open("a", encoding="utf-8") as file:
        while chunk := list(itertools.islice(rows, ROWS_PER_CHUNK)):
            scorer = scorer or load_scorer()
            _score_chunk(chunk, scorer, scored_by, file)
            done += len(chunk)
            report(done, kept)


def shared_prompts_note(prompt_keys: np.ndarray, training_files: Sequence[str]) -> str:
    """A sentence: how many of the prompts are also in files that the model was trained on.

    Args:
        prompt_keys: `Survey.prompt_keys`.
    """
    trained_on = key_column(prompt_key(messages) for _, messages in read_prompts(training_files))
    shared = np.intersect1d(prompt_keys, trained_on)
    return f"{len(shared)} of {len(prompt_keys)} prompts also stand in the training files"


def read_scored_rows(path: Path) -> tuple[ScoredRows, str]:
    """The rows that `write_scored_rows` wrote, and the identity of the model that scored them.

    Raises:
        DataError: the file does not exist, has no rows, or holds other rows or rows of several models.
    """
    scored_by: set[str] = set()
    rows = ScoredRows.of(_read_rows(path, scored_by))
    if len(scored_by) != 1:
        raise DataError(
            f"{path} holds rows of {len(scored_by)} models, not of one. Evaluate into a directory of its own."
        )
    return rows, scored_by.pop()


def read_pair_scores(path: Path) -> Iterator[tuple[RewardScore, RewardScore]]:
    """The whole scores of the first chosen and the first rejected response of every row, in order.

    The file must be one that `read_scored_rows` takes.
    """
    for row in read_rows(str(path)):
        yield _reward_score(row.values["chosen"][0]), _reward_score(row.values["rejected"][0])


def _read_rows(path: Path, scored_by: set[str]) -> Iterator[ScoredComparison]:
    """Yields the rows one by one, and adds the identities of their models to `scored_by`."""
    for row in read_rows(str(path)):
        try:
            chosen, rejected = (tuple(_response(r) for r in row.values[side]) for side in ("chosen", "rejected"))
            compared = compare_rewards(*(_reward_score(row.values[side][0]) for side in ("chosen", "rejected")))
            comparison = ScoredComparison(
                **{name: row.values[name] for name in FIELDS},
                content_key=key_number(row.values["content_key"]),
                prompt_key=key_number(row.values["prompt_key"]),
                chosen=chosen,
                rejected=rejected,
                margin_std=compared.margin_std,
                log_odds=compared.log_odds,
            )
            scored_by.add(row.values["scored_by"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"{row.place}: not a scored row ({error!r}). Give the rows.jsonl of an evaluation."
            ) from error
        yield comparison


def _skip_scored(rows: Iterator[EvaluationExample], path: Path, scored_by: str) -> int:
    """Skips the rows that the file already holds, and cuts off an incomplete last line. Returns the number skipped."""
    if not path.exists():
        return 0
    done = complete_bytes = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            row = next(rows, None)
            if row is None or not _is_line_of(line, row, scored_by):
                raise DataError(
                    f"{path}, line {done + 1}: scored by another model, or from other data or with other subsets, "
                    "than this evaluation. Give another --out, or delete the file."
                )
            done, complete_bytes = done + 1, complete_bytes + len(line)
    os.truncate(path, complete_bytes)
    return done


def _is_line_of(line: bytes, row: EvaluationExample, scored_by: str) -> bool:
    try:
        values = json.loads(line)
        found = [values[name] for name in ("scored_by", "content_key", "id", "subset", "source", "annotators_tie")]
        return found == [scored_by, row.content_key, row.id, row.subset, row.source, row.annotators_tie]
    except (ValueError, KeyError, TypeError):  # not a line of this format
        return False


def _score_chunk(chunk: Sequence[EvaluationExample], scorer: ComparisonScorer, scored_by: str, file: TextIO) -> None:
    texts = [(row, response) for row in chunk for response in (*row.chosen, *row.rejected)]
    scores = iter(scorer.score([row.prompt for row, _ in texts], [response for _, response in texts]))
    for row in chunk:
        chosen, rejected = (
            [_as_json(row, response, next(scores)) for response in side] for side in (row.chosen, row.rejected)
        )
        line = {
            "id": row.id,
            "subset": row.subset,
            "source": row.source,
            "content_key": row.content_key,
            "prompt_key": row.prompt_key,
            "scored_by": scored_by,
            "cut": not all(scorer.fits(row.prompt, response) for response in (*row.chosen, *row.rejected)),
            "annotators_tie": row.annotators_tie,
            "chosen": chosen,
            "rejected": rejected,
        }
        file.write(json.dumps(line) + "\n")
    file.flush()


def _as_json(row: EvaluationExample, response: str, score: RewardScore) -> dict[str, Any]:
    if not (math.isfinite(score.mean) and math.isfinite(score.std)):
        raise NumericsError(
            f"{row.place}: reward {score.mean} with standard deviation {score.std} for the response {response!r:.60}. "
            "Such a model ranks nothing; look at its weights, or score it in float32 (--device cpu)."
        )
    return {**asdict(score), "characters": len(strip_thinking(response))}


def _response(values: dict[str, Any]) -> RewardedResponse:
    if isinstance(values["mean"], bool) or not math.isfinite(values["mean"]):
        raise ValueError(f"the reward {values['mean']!r:.40} is no finite number")
    return RewardedResponse(reward=float(values["mean"]), characters=int(values["characters"]))


def _reward_score(values: dict[str, Any]) -> RewardScore:
    return RewardScore(**{field.name: values[field.name] for field in fields(RewardScore) if field.name in values})
