"""MT-Bench's single-answer grades, from 1 to 10: their files and their means.

Source: Zheng et al. 2023, arXiv:2306.05685. Files and scores are those of fastchat.llm_judge (FastChat 0.2.36).
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.benchmark.verdict_number import read_verdict_number
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError
from pipeline.records import Metrics
from pipeline.stages.storage import write_text

MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""Each category has ten questions, in this order, starting at FIRST_QUESTION."""

FIRST_QUESTION, QUESTIONS_PER_CATEGORY = 81, 10

LOWEST_GRADE, HIGHEST_GRADE = 1.0, 10.0

NO_GRADE = -1.0
"""The score of a judgment without a grade."""

RESAMPLES = 1000
"""Draws of the bootstrap over questions."""

GRADE = re.compile(r"\[\[(\d+\.?\d*)\]\]")

GRADE_IN_SINGLE_BRACKETS = re.compile(r"\[(\d+\.?\d*)\]")


@dataclass(frozen=True, kw_only=True)
class TurnGrade:
    """The grade of one turn of one answer."""

    question_id: int
    model: str
    judge: str
    template: str
    """Name of the judge's prompt: single-v1 or single-math-v1, with -multi-turn for turn 2."""
    turn: int
    """1 or 2."""
    user_prompt: str
    judgment: str
    score: float
    """1 to 10; NO_GRADE where the judgment has no grade."""


def parse_grade(judgment: str) -> float:
    """The first [[number]], otherwise the first [number]; NO_GRADE without one, or where it is not from 1 to 10.

    Upstream takes any number. Then one [[85]] moves the mean of 160 grades by half a point.
    """
    match = GRADE.search(judgment) or GRADE_IN_SINGLE_BRACKETS.search(judgment)
    grade = float(match.group(1)) if match else NO_GRADE
    return grade if LOWEST_GRADE <= grade <= HIGHEST_GRADE else NO_GRADE


def category_of(question_id: int) -> str:
    """The category of one of the 80 questions.

    Raises:
        DataError: MT-Bench has no such question.
    """
    number = question_id - FIRST_QUESTION
    if not 0 <= number < QUESTIONS_PER_CATEGORY * len(MT_BENCH_CATEGORIES):
        raise DataError(f"MT-Bench has questions 81 to 160, not {question_id}")
    return MT_BENCH_CATEGORIES[number // QUESTIONS_PER_CATEGORY]


def mean_grades(judgments: Sequence[TurnGrade], *, seed: int = 0) -> dict[str, Metrics]:
    """Mean grades of every model over its judgments that have a grade.

    Returns:
        Model -> `average`, over all judgments of both turns. It equals (turn_1 + turn_2)/2 only if both turns have as
        many grades;
        `low`, `high`: 95% percentile bootstrap of `average` over questions, seeded;
        `turn_1`, `turn_2`; `category/<name>`, over both turns. A turn or a category without a grade has no entry;
        `failures` and `judgments`: counts.

    Raises:
        DataError: there are no judgments, a question is not MT-Bench's, or a model has no grade at all.
    """
    if not judgments:
        raise DataError("no judgments to average. Give the files of a judge.")
    by_model: dict[str, list[TurnGrade]] = defaultdict(list)
    for judgment in judgments:
        by_model[judgment.model].append(judgment)
    return {model: _mean_grades_of_model(model, rows, seed) for model, rows in by_model.items()}


def _mean_grades_of_model(model: str, judgments: list[TurnGrade], seed: int) -> Metrics:
    groups: dict[str, list[float]] = defaultdict(list)
    by_question: dict[int, list[float]] = defaultdict(list)
    graded = [judgment for judgment in judgments if judgment.score != NO_GRADE]
    if not graded:
        raise DataError(f"none of the {len(judgments)} judgments of {model!r} holds a score like [[7]]")
    for judgment in graded:
        by_question[judgment.question_id].append(judgment.score)
        groups[f"turn_{judgment.turn}"].append(judgment.score)
        groups[f"category/{category_of(judgment.question_id)}"].append(judgment.score)
    low, high = _question_bootstrap(list(by_question.values()), seed)
    return {
        "average": float(np.mean([judgment.score for judgment in graded])),
        "low": low,
        "high": high,
        **{name: float(np.mean(grades)) for name, grades in sorted(groups.items())},
        "failures": float(len(judgments) - len(graded)),
        "judgments": float(len(judgments)),
    }


def _question_bootstrap(grades: Sequence[Sequence[float]], seed: int) -> tuple[float, float]:
    """95% interval of the mean grade. It resamples questions, each with all its grades."""
    sums, counts = np.array([sum(g) for g in grades]), np.array([len(g) for g in grades])
    rng = np.random.default_rng(seed)
    resampled = rng.multinomial(len(grades), np.full(len(grades), 1 / len(grades)), size=RESAMPLES)
    low, high = np.percentile((resampled @ sums) / (resampled @ counts), (2.5, 97.5))
    return float(low), float(high)


def read_grades(files: Sequence[str]) -> list[TurnGrade]:
    """The grades in files model_judgment/<judge>_single.jsonl.

    Raises:
        DataError: a row is not a grade; or a turn is graded twice, also where a file is named twice. Names file, line
            and field.
    """
    grades = []
    places: dict[tuple[str, int, int], str] = {}
    for row in (row for file in files for row in read_rows(file)):
        grade = _turn_grade(row)
        graded = (grade.model, grade.question_id, grade.turn)
        if graded in places:
            raise DataError(
                f"{row.place}: turn {grade.turn} of question {grade.question_id} by {grade.model!r} is graded "
                f"again, as in {places[graded]}. Keep one, and name each file once: grades of two judges are two "
                "tables."
            )
        places[graded] = row.place
        grades.append(grade)
    return grades


def write_grades(path: Path, grades: Sequence[TurnGrade]) -> None:
    """Writes the rows that `read_grades` and FastChat's show_result read."""
    rows = [
        {
            "question_id": grade.question_id,
            "model": grade.model,
            "judge": [grade.judge, grade.template],
            "user_prompt": grade.user_prompt,
            "judgment": grade.judgment,
            "score": grade.score,
            "turn": grade.turn,
            "tstamp": time.time(),
        }
        for grade in grades
    ]
    write_text(str(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _turn_grade(row: Row) -> TurnGrade:
    judge, turn = row.require("judge", list), row.require("turn", int)
    if len(judge) != 2 or not all(isinstance(name, str) for name in judge):
        raise DataError(f"{row.place}, field 'judge': {judge!r:.60} is not [judge, prompt template]")
    if turn not in (1, 2) or isinstance(turn, bool):
        raise DataError(f"{row.place}, field 'turn': {turn} is neither 1 nor 2")
    score = read_verdict_number(
        row,
        "score",
        lowest=LOWEST_GRADE,
        highest=HIGHEST_GRADE,
        marks=(NO_GRADE,),
        remedy=f"Write {NO_GRADE:g} for a judgment that gives no grade; it then counts as failed.",
    )
    question_id = row.require("question_id", int)
    try:
        category_of(question_id)
    except DataError as error:
        raise DataError(f"{row.place}, field 'question_id': {error}") from error
    return TurnGrade(
        question_id=question_id,
        model=row.require("model", str),
        judge=judge[0],
        template=judge[1],
        turn=turn,
        user_prompt=row.require("user_prompt", str),
        judgment=row.require("judgment", str),
        score=NO_GRADE if score is None else score,
    )
