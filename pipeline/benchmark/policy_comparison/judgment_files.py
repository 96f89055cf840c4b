"""Judgment files of all benchmarks, brought together for a comparison of policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.alpaca_eval.annotations import Annotations, read_annotations
from pipeline.benchmark.arena_hard.games import ARENA_HARD_BASELINE, Games, read_games
from pipeline.benchmark.mt_bench.grades import TurnGrade, read_grades
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Judgments:
    """The judgments of several files, by benchmark."""

    annotations: Sequence[Annotations]
    games: Sequence[Games]
    grades: Sequence[TurnGrade]


def read_judgments(files: Sequence[Path]) -> Judgments:
    """Reads files of judge_benchmark or of the benchmarks' own evaluators. Each file belongs to one benchmark.

    Raises:
        DataError: as the readers of the benchmarks; or a file belongs to none of them. Names file and line.
    """
    annotations: list[Annotations] = []
    games: list[Games] = []
    grades: list[TurnGrade] = []
    for file in files:
        match next(read_rows(str(file)), None):
            case None:
                raise DataError(f"{file} holds no judgments")
            case Row(values={"instruction": _}):
                annotations.append(read_annotations(file))
            case Row(values={"games": _} | {"winner": _} as values):
                baseline = values.get("baseline", ARENA_HARD_BASELINE)
                games.append(read_games([str(file)], baseline=baseline))
            case Row(values={"turn": _}):
                grades += read_grades([str(file)])
            case row:
                raise DataError(
                    f"{row.place}: not a judgment of AlpacaEval (instruction), Arena-Hard (games) or MT-Bench (turn)"
                )
    return Judgments(annotations=annotations, games=games, grades=grades)
