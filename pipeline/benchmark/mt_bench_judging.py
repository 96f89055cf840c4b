"""MT-Bench, single-answer grading: one grade for each of two turns (vrm_spec section 18)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmark.judging import Judge, JudgedRows, JudgeRequest, JudgeSampling, Outcome, Unanswered, fill
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError

SAMPLING = JudgeSampling(temperature=0.0, max_tokens=2048, top_logprobs=0)

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")

PLAIN = ("single-v1", "single-v1-multi-turn")
WITH_REFERENCE = ("single-math-v1", "single-math-v1-multi-turn")
"""Names of the prompts in judge_prompts.jsonl, for turns 1 and 2."""

NO_SCORE = -1
"""What the layout says where a judgment has no score."""


@dataclass(frozen=True, kw_only=True)
class GradingTemplate:
    """One row of judge_prompts.jsonl."""

    name: str
    system: str
    user: str


@dataclass(frozen=True, kw_only=True)
class MTBenchQuestion:
    question_id: int
    category: str
    turns: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class MTBenchAnswers:
    """One model's answers, or the references."""

    model: str
    turns: Mapping[int, tuple[str, str]]
    """By question_id; the first choice."""


def read_grading_templates(path: Path) -> dict[str, GradingTemplate]:
    """The four prompts of single-answer grading, by name, from FastChat's judge_prompts.jsonl.

    Raises:
        DataError: one of them is missing.
    """
    templates = {}
    for row in read_rows(str(path)):
        with _named(row, "judge prompt"):
            template = GradingTemplate(
                name=row.values["name"], system=row.values["system_prompt"], user=row.values["prompt_template"]
            )
        templates[template.name] = template
    missing = [name for name in (*PLAIN, *WITH_REFERENCE) if name not in templates]
    if missing:
        raise DataError(f"{path} has no prompt {', '.join(missing)}; give FastChat's judge_prompts.jsonl")
    return templates


def read_mt_bench_questions(path: Path) -> list[MTBenchQuestion]:
    """question.jsonl: {question_id, category, turns: [2]}.

    Raises:
        DataError: a row of another kind.
    """
    questions = []
    for row in read_rows(str(path)):
        with _named(row, "MT-Bench question"):
            first, second = row.values["turns"]
            questions.append(
                MTBenchQuestion(
                    question_id=row.values["question_id"], category=row.values["category"], turns=(first, second)
                )
            )
    return questions


def read_mt_bench_answers(path: Path) -> MTBenchAnswers:
    """model_answer/<model>.jsonl, or reference_answer/<model>.jsonl: {question_id, model_id, choices}.

    Raises:
        DataError: a row of another kind, two for one question, or answers of several models.
    """
    turns: dict[int, tuple[str, str]] = {}
    models = set()
    for row in read_rows(str(path)):
        with _named(row, "MT-Bench answer"):
            question_id, [first, second] = row.values["question_id"], row.values["choices"][0]["turns"]
            models.add(row.values["model_id"])
        if question_id in turns:
            raise DataError(f"{row.place}: a second answer to question {question_id}")
        turns[question_id] = (first, second)
    if len(models) != 1:
        raise DataError(f"{path} holds answers of {len(models)} models ({sorted(models)}); give one model's answers")
    return MTBenchAnswers(model=models.pop(), turns=turns)


class MTBenchJudging:
    """Implements `JudgedBenchmark`: two requests a question, turn 1 and turn 2."""

    def __init__(
        self,
        questions: Sequence[MTBenchQuestion],
        answers: MTBenchAnswers,
        references: MTBenchAnswers,
        templates: Mapping[str, GradingTemplate],
        *,
        parse: Callable[[str], float],
    ) -> None:
        """
        Args:
            references: of the categories math, reasoning and coding. Upstream looks them up under the judge's name;
                here they are a file of their own, so that any judge sees the same ones.
            templates: by name.
            parse: score from a judgment's text, -1 where there is none.

        Raises:
            DataError: a question without an answer, or without the reference it needs.
        """
        graded = [question for question in questions if question.category in REFERENCE_CATEGORIES]
        for what, side, needed in (("answer", answers, questions), ("reference", references, graded)):
            missing = [question.question_id for question in needed if question.question_id not in side.turns]
            if missing:
                raise DataError(
                    f"{side.model} has no {what} to {len(missing)} of {len(needed)} questions, as {missing[0]}"
                )
        self._model, self._parse = answers.model, parse
        self._asked: list[tuple[int, int, str]] = []
        self.requests: list[JudgeRequest] = []
        for question in questions:
            names = WITH_REFERENCE if question.category in REFERENCE_CATEGORIES else PLAIN
            fields = _fields(question, answers, references)
            for turn, name in enumerate(names, start=1):
                self._asked.append((question.question_id, turn, name))
                self.requests.append(_request(templates[name], fields))

    def rows(self, outcomes: Sequence[Outcome], judge: Judge) -> JudgedRows:
        """model_judgment/<judge>_single.jsonl."""
        rows: list[dict[str, Any]] = []
        unparsed = 0
        for (question_id, turn, name), request, outcome in zip(self._asked, self.requests, outcomes, strict=True):
            row = {
                "question_id": question_id,
                "model": self._model,
                "judge": [judge.model, name],
                "user_prompt": request.messages[-1]["content"],
                "turn": turn,
            }
            if isinstance(outcome, Unanswered):
                rows.append(row | {"judgment": "", "score": NO_SCORE, "tstamp": 0.0, "failure": outcome.reason})
                continue
            score = self._parse(outcome.text)
            unparsed += score == NO_SCORE
            rows.append(row | {"judgment": outcome.text, "score": score, "tstamp": outcome.time})
        return JudgedRows(rows=rows, unparsed=unparsed)


def _fields(question: MTBenchQuestion, answers: MTBenchAnswers, references: MTBenchAnswers) -> dict[str, str]:
    first, second = answers.turns[question.question_id]
    fields = {
        "question": question.turns[0],
        "question_1": question.turns[0],
        "question_2": question.turns[1],
        "answer": first,
        "answer_1": first,
        "answer_2": second,
    }
    if question.category in REFERENCE_CATEGORIES:
        fields["ref_answer_1"], fields["ref_answer_2"] = references.turns[question.question_id]
    return fields


def _request(template: GradingTemplate, fields: Mapping[str, str]) -> JudgeRequest:
    return JudgeRequest(
        messages=(
            {"role": "system", "content": template.system},
            {"role": "user", "content": fill(template.user, fields)},
        ),
        sampling=SAMPLING,
        comparison=None,
    )


@contextmanager
def _named(row: Row, kind: str) -> Iterator[None]:
    """A row that lacks what is read from it is refused by its place."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{row.place}: no {kind} ({error!r})") from error
