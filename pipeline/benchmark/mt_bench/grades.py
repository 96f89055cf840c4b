"""MT-Bench: two-turn answers and their single-answer grades, from 1 to 10.

Source: Zheng et al. 2023, arXiv:2306.05685; files and scores as fastchat.llm_judge (FastChat 0.2.36) has them.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError
from pipeline.records import Metrics
from pipeline.stages.storage import write_text

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Ten questions each, in this order, from FIRST_QUESTION on."""
FIRST_QUESTION, QUESTIONS_PER_CATEGORY = 81, 10

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "reasoning": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "extraction": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature of the answers, by category."""
OTHER_TEMPERATURE = 0.7
"""Of a category that is not MT-Bench's own."""

FAILED = -1.0
"""The score of a judgment that gave none."""

SCORE = re.compile(r"\[\[(\d+\.?\d*)\]\]")
SCORE_IN_SINGLE_BRACKETS = re.compile(r"\[(\d+\.?\d*)\]")


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """The grade of one turn of one answer."""

    question_id: int
    model: str
    judge: str
    template: str
    """Name of the judge's prompt: single-v1, single-math-v1, and their -multi-turn for turn 2."""
    turn: int
    """1 or 2."""
    user_prompt: str
    judgment: str
    score: float
    """1 to 10; FAILED where the judgment holds none."""


@dataclass(frozen=True, kw_only=True)
class ModelAnswer:
    """One model's answers to the two turns of a question; a reference answer is one too."""

    question_id: int
    model: str
    turns: tuple[str, ...]
    place: str = field(default="an answer", compare=False, repr=False)
    """File and line it was read from."""


def parse_score(judgment: str) -> float:
    """The first [[number]], else the first [number], else FAILED."""
    found = SCORE.search(judgment) or SCORE_IN_SINGLE_BRACKETS.search(judgment)
    return float(found.group(1)) if found else FAILED


def category_of(question_id: int) -> str:
    """The category of one of the 80 questions.

    Raises:
        DataError: MT-Bench has no such question.
    """
    number = question_id - FIRST_QUESTION
    if not 0 <= number < QUESTIONS_PER_CATEGORY * len(CATEGORIES):
        raise DataError(f"MT-Bench has questions 81 to 160, not {question_id}")
    return CATEGORIES[number // QUESTIONS_PER_CATEGORY]


def scores(judgments: Sequence[Judgment], *, seed: int = 0, num_resamples: int = 1000) -> dict[str, Metrics]:
    """Mean grades of every model over its judgments that did not fail.

    Returns:
        Model -> `average`, over all judgments of both turns (that is (turn_1 + turn_2)/2 only when as many of either
        succeeded); `low`, `high`: its 95% percentile bootstrap over questions, seeded; `turn_1`, `turn_2`;
        `category/<name>`, over both turns; `failures` and `judgments`, counts. A turn or a category without a grade
        has no entry.

    Raises:
        DataError: no judgments, a question that MT-Bench does not have, or a model without a single grade.
    """
    if not judgments:
        raise DataError("no judgments to average. Give the files of a judge.")
    by_model: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        by_model[judgment.model].append(judgment)
    return {model: _scores(model, rows, seed, num_resamples) for model, rows in by_model.items()}


def _scores(model: str, judgments: list[Judgment], seed: int, num_resamples: int) -> Metrics:
    groups: dict[str, list[float]] = defaultdict(list)
    by_question: dict[int, list[float]] = defaultdict(list)
    graded = [judgment for judgment in judgments if judgment.score != FAILED]
    if not graded:
        raise DataError(f"none of the {len(judgments)} judgments of {model!r} holds a score like [[7]]")
    for judgment in graded:
        by_question[judgment.question_id].append(judgment.score)
        groups[f"turn_{judgment.turn}"].append(judgment.score)
        groups[f"category/{category_of(judgment.question_id)}"].append(judgment.score)
    low, high = _question_bootstrap(list(by_question.values()), seed, num_resamples)
    return {
        "average": float(np.mean([judgment.score for judgment in graded])),
        "low": low,
        "high": high,
        **{name: float(np.mean(grades)) for name, grades in sorted(groups.items())},
        "failures": float(len(judgments) - len(graded)),
        "judgments": float(len(judgments)),
    }


def _question_bootstrap(grades: Sequence[Sequence[float]], seed: int, num_resamples: int) -> tuple[float, float]:
    """95% interval of the mean grade: questions are drawn again, each with all its grades."""
    sums, counts = np.array([sum(g) for g in grades]), np.array([len(g) for g in grades])
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(grades), np.full(len(grades), 1 / len(grades)), size=num_resamples)
    low, high = np.percentile((drawn @ sums) / (drawn @ counts), (2.5, 97.5))
    return float(low), float(high)


# ----------------------------------------------------------------------------- files


def read_judgments(files: Sequence[str]) -> list[Judgment]:
    """Rows of model_judgment/<judge>_single.jsonl.

    Raises:
        DataError: names file, line and field; a turn that is graded twice too.
    """
    judgments = []
    judged: dict[tuple[str, int, int], str] = {}
    for row in (row for file in files for row in read_rows(file)):
        judgment = _judgment(row)
        place = judged.setdefault((judgment.model, judgment.question_id, judgment.turn), row.place)
        if place != row.place:
            raise DataError(
                f"{row.place}: turn {judgment.turn} of question {judgment.question_id} by {judgment.model!r} is graded "
                f"again, as in {place}. Keep one: grades of two judges are two tables."
            )
        judgments.append(judgment)
    return judgments


def write_judgments(path: Path, judgments: Sequence[Judgment]) -> None:
    """The same rows, as FastChat's show_result reads them."""
    _write(
        path,
        [
            {
                "question_id": judgment.question_id,
                "model": judgment.model,
                "judge": [judgment.judge, judgment.template],
                "user_prompt": judgment.user_prompt,
                "judgment": judgment.judgment,
                "score": judgment.score,
                "turn": judgment.turn,
                "tstamp": time.time(),
            }
            for judgment in judgments
        ],
    )


def read_answers(files: Sequence[str]) -> list[ModelAnswer]:
    """The first choice of every row of model_answer/<model>.jsonl, or of reference_answer/<judge>.jsonl.

    Raises:
        DataError: names file, line and field.
    """
    return [_answer(row) for file in files for row in read_rows(file)]


def write_answers(path: Path, answers: Sequence[ModelAnswer]) -> None:
    """One choice per answer, as FastChat's gen_judgment reads them."""
    _write(
        path,
        [
            {
                "question_id": answer.question_id,
                "answer_id": hashlib.sha256(repr(answer).encode()).hexdigest()[:22],
                "model_id": answer.model,
                "choices": [{"index": 0, "turns": list(answer.turns)}],
                "tstamp": time.time(),
            }
            for answer in answers
        ],
    )


def _write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    write_text(str(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _judgment(row: Row) -> Judgment:
    judge, turn, score = row.require("judge", list), row.require("turn", int), row.values.get("score")
    if len(judge) != 2 or not all(isinstance(name, str) for name in judge):
        raise DataError(f"{row.place}, field 'judge': {judge!r:.60} is not [judge, prompt template]")
    if turn not in (1, 2):
        raise DataError(f"{row.place}, field 'turn': {turn} is neither 1 nor 2")
    if not isinstance(score, int | float):
        raise DataError(f"{row.place}, field 'score': {score!r:.40} is no number")
    question_id = row.require("question_id", int)
    try:
        category_of(question_id)
    except DataError as error:
        raise DataError(f"{row.place}, field 'question_id': {error}") from error
    return Judgment(
        question_id=question_id,
        model=row.require("model", str),
        judge=judge[0],
        template=judge[1],
        turn=turn,
        user_prompt=row.require("user_prompt", str),
        judgment=row.require("judgment", str),
        score=float(score),
    )


def _answer(row: Row) -> ModelAnswer:
    try:
        turns = row.values["choices"][0]["turns"]
        return ModelAnswer(
            question_id=row.require("question_id", int),
            model=row.require("model_id", str),
            turns=tuple(turns),
            place=row.place,
        )
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{row.place}: no choices[0].turns ({error!r})") from error
