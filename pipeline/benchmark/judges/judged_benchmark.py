"""What a benchmark asks a judge, and the rows that the benchmark makes of the judge's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pipeline.benchmark.judges.judge import Judge, JudgeOutcome, JudgeRequest
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class JudgedRows:
    """Rows in the layout of the benchmark's own scorer."""

    rows: list[dict[str, Any]]
    unparsed: int
    """Judgments in which the benchmark's parser found no verdict. Their rows are there, without a verdict."""


class JudgedBenchmark(Protocol):
    """One benchmark and the answers of one model to it."""

    @property
    def requests(self) -> Sequence[JudgeRequest]: ...

    def rows(self, outcomes: Sequence[JudgeOutcome], judge: Judge) -> JudgedRows:
        """Rows for the outcomes of `requests`, in the order of the requests."""


class QuestionAnswer(Protocol):
    """An answer with its question, its model and the place where it was read."""

    @property
    def question_id(self) -> Any: ...

    @property
    def model(self) -> str: ...

    @property
    def place(self) -> str: ...


A = TypeVar("A", bound=QuestionAnswer)


def answers_of_one_model(
    answers: Sequence[A], needed: Sequence[Any], *, known: Sequence[Any] | None, what: str
) -> tuple[str, dict[Any, A]]:
    """The model's name, and its answer to each question.

    Args:
        needed: ids of the questions that must be answered.
        known: ids of the questions that may be answered; None allows any.
        what: what the answers are, for the error message.

    Raises:
        DataError: the answers are of several models; a question has two answers; an answered question is not in
            `known`; or a question of `needed` has no answer.
    """
    if not answers:
        raise DataError(f"there are no {what}; give those of one model")
    model = answers[0].model
    by_question: dict[Any, A] = {}
    for answer in answers:
        if answer.model != model:
            raise DataError(f"{answer.place}: {answer.model} among the {what} of {model}; give one model's")
        if known is not None and answer.question_id not in known:
            raise DataError(
                f"{answer.place}: {model} answers question {answer.question_id}, which is not among the "
                f"{len(known)} questions. Give the question file that was answered."
            )
        if answer.question_id in by_question:
            first = by_question[answer.question_id].place
            raise DataError(f"{answer.place}: {model} answers question {answer.question_id} again, as in {first}")
        by_question[answer.question_id] = answer
    missing = [question_id for question_id in needed if question_id not in by_question]
    if missing:
        raise DataError(
            f"the {what} of {model}, which end at {answers[-1].place}, lack {len(missing)} of {len(needed)} questions, "
            f"as {missing[0]}. "
            "Generate them, or leave those questions out of the question file and of every other answer file."
        )
    return model, by_question
