"""MT-Bench, single-answer grading: one grade for each of two turns (docs/method.md section 12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmark.judges.judge import Judge, JudgeOutcome, JudgeRequest, JudgeSampling, Unanswered
from pipeline.benchmark.judges.judge_prompt import JudgePrompt, require_fields
from pipeline.benchmark.judges.judged_benchmark import JudgedRows, answers_of_one_model
from pipeline.benchmark.mt_bench.grades import FAILED, ModelAnswer
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError

SAMPLING = JudgeSampling(temperature=0.0, max_tokens=2048, top_logprobs=0)

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")

PLAIN = ("single-v1", "single-v1-multi-turn")
WITH_REFERENCE = ("single-math-v1", "single-math-v1-multi-turn")
"""Names of the prompts in judge_prompts.jsonl, for turns 1 and 2."""

PLACED = {
    PLAIN[0]: ("question", "answer"),
    PLAIN[1]: ("question_1", "answer_1", "question_2", "answer_2"),
    WITH_REFERENCE[0]: ("question", "ref_answer_1", "answer"),
    WITH_REFERENCE[1]: ("question_1", "ref_answer_1", "question_2", "ref_answer_2", "answer_1", "answer_2"),
}
"""What each prompt shows the judge."""


@dataclass(frozen=True, kw_only=True)
class MTBenchQuestion:
    question_id: int
    category: str
    turns: tuple[str, str]


def read_grading_templates(path: Path) -> dict[str, JudgePrompt]:
    """The four prompts of single-answer grading, by name, from FastChat's judge_prompts.jsonl.

    Raises:
        DataError: one of them is missing, or does not show question and answer.
    """
    templates = {}
    for row in read_rows(str(path)):
        name = row.require("name", str)
        templates[name] = JudgePrompt(
            system=row.require("system_prompt", str), user=row.require("prompt_template", str)
        )
        require_fields(templates[name].user, PLACED.get(name, ()), place=row.place)
    missing = [name for name in PLACED if name not in templates]
    if missing:
        raise DataError(f"{path} has no prompt {', '.join(missing)}; give FastChat's judge_prompts.jsonl")
    return templates


def read_mt_bench_questions(path: Path) -> list[MTBenchQuestion]:
    """question.jsonl, a question a row.

    Raises:
        DataError: names file and line: a row of another kind, or a question that is there already.
    """
    questions: dict[int, MTBenchQuestion] = {}
    for row in read_rows(str(path)):
        question = mt_bench_question(row)
        if question.question_id in questions:
            raise DataError(f"{row.place}: question {question.question_id} is there already; keep one")
        questions[question.question_id] = question
    return list(questions.values())


def mt_bench_question(row: Row) -> MTBenchQuestion:
    """A row {question_id, category, turns: [2]}.

    Raises:
        DataError: a row of another kind.
    """
    turns = row.require("turns", list)
    if len(turns) != 2 or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{row.place}, field 'turns': {len(turns)} turns, {turns!r:.60}; MT-Bench asks two, in words")
    return MTBenchQuestion(
        question_id=row.require("question_id", int), category=row.require("category", str), turns=tuple(turns)
    )


class MTBenchJudging:
    """Implements `JudgedBenchmark`: two requests a question, turn 1 and turn 2."""

    def __init__(
        self,
        questions: Sequence[MTBenchQuestion],
        answers: Sequence[ModelAnswer],
        references: Sequence[ModelAnswer],
        templates: Mapping[str, JudgePrompt],
        *,
        parse: Callable[[str], float],
    ) -> None:
        """
        Args:
            references: of the categories math, reasoning and coding. Upstream looks them up under the judge's name;
                here they are a file of their own, so that any judge sees the same ones.
            templates: by name.
            parse: score from a judgment's text, FAILED where there is none.

        Raises:
            DataError: as `answers_of_one_model`; or an answer that has not two turns.
        """
        ids = [question.question_id for question in questions]
        with_reference = [q.question_id for q in questions if q.category in REFERENCE_CATEGORIES]
        self._model, given = answers_of_one_model(answers, ids, known=ids, what="answers")
        # Public references answer questions that a short question file leaves out.
        _, right = answers_of_one_model(references, with_reference, known=None, what="reference answers")
        for answer in (*given.values(), *right.values()):
            if len(answer.turns) != 2:
                raise DataError(
                    f"{answer.place}: {answer.model} answers question {answer.question_id} in "
                    f"{len(answer.turns)} turns, not in 2"
                )
        self._parse = parse
        self._asked: list[tuple[int, int, str]] = []
        self.requests: list[JudgeRequest] = []
        for question in questions:
            names = WITH_REFERENCE if question.category in REFERENCE_CATEGORIES else PLAIN
            reference = right[question.question_id].turns if question.category in REFERENCE_CATEGORIES else ()
            fields = _fields(question, given[question.question_id].turns, reference)
            for turn, name in enumerate(names, start=1):
                self._asked.append((question.question_id, turn, name))
                self.requests.append(
                    JudgeRequest(messages=templates[name].filled(fields), sampling=SAMPLING, pair=None)
                )

    def rows(self, outcomes: Sequence[JudgeOutcome], judge: Judge) -> JudgedRows:
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
                rows.append(row | {"judgment": "", "score": FAILED, "tstamp": 0.0, "failure": outcome.reason})
                continue
            score = self._parse(outcome.text)
            unparsed += score == FAILED
            rows.append(row | {"judgment": outcome.text, "score": score, "tstamp": outcome.time})
        return JudgedRows(rows=rows, unparsed=unparsed)


def _fields(question: MTBenchQuestion, answer: Sequence[str], reference: Sequence[str]) -> dict[str, str]:
    """What the prompts of either turn name."""
    return {
        "question": question.turns[0],
        "answer": answer[0],
        **{f"question_{turn}": text for turn, text in enumerate(question.turns, start=1)},
        **{f"answer_{turn}": text for turn, text in enumerate(answer, start=1)},
        **{f"ref_answer_{turn}": text for turn, text in enumerate(reference, start=1)},
    }
