"""MT-Bench, single-answer grading: a judge grades each of two turns (docs/method.md section 12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmark.judges.judge import Judge, JudgeOutcome, JudgeRequest, JudgeSampling, Unanswered
from pipeline.benchmark.judges.judge_prompt import JudgePrompt, require_fields
from pipeline.benchmark.judges.judged_benchmark import JudgedRows, answers_of_one_model
from pipeline.benchmark.mt_bench.answers import MTBenchAnswer
from pipeline.benchmark.mt_bench.grades import NO_GRADE
from pipeline.benchmark.mt_bench.questions import MTBenchQuestion
from pipeline.data.files import read_rows
from pipeline.errors import DataError

GRADING_SAMPLING = JudgeSampling(temperature=0.0, max_tokens=2048, top_logprobs=0)

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")

PLAIN = ("single-v1", "single-v1-multi-turn")

WITH_REFERENCE = ("single-math-v1", "single-math-v1-multi-turn")
"""Names of the prompts for turns 1 and 2 in judge_prompts.jsonl."""

TEMPLATE_FIELDS = {
    PLAIN[0]: ("question", "answer"),
    PLAIN[1]: ("question_1", "answer_1", "question_2", "answer_2"),
    WITH_REFERENCE[0]: ("question", "ref_answer_1", "answer"),
    WITH_REFERENCE[1]: ("question_1", "ref_answer_1", "question_2", "ref_answer_2", "answer_1", "answer_2"),
}
"""Prompt -> the fields that its template must contain."""


def read_grading_templates(path: Path) -> dict[str, JudgePrompt]:
    """The four prompts of single-answer grading, by name, from FastChat's judge_prompts.jsonl.

    Raises:
        DataError: a prompt is missing, or its template lacks a field.
    """
    templates = {}
    for row in read_rows(str(path)):
        name = row.require("name", str)
        templates[name] = JudgePrompt(
            system=row.require("system_prompt", str), user=row.require("prompt_template", str)
        )
        require_fields(templates[name].user, TEMPLATE_FIELDS.get(name, ()), place=row.place)
    missing = [name for name in TEMPLATE_FIELDS if name not in templates]
    if missing:
        raise DataError(f"{path} has no prompt {', '.join(missing)}; give FastChat's judge_prompts.jsonl")
    return templates


class MTBenchJudging:
    """Implements `JudgedBenchmark`: two requests per question, one for each turn."""

    def __init__(
        self,
        questions: Sequence[MTBenchQuestion],
        answers: Sequence[MTBenchAnswer],
        references: Sequence[MTBenchAnswer],
        templates: Mapping[str, JudgePrompt],
        *,
        parse: Callable[[str], float],
    ) -> None:
        """
        Args:
            references: answers to the questions of the categories math, reasoning and coding. Upstream looks them up
                under the judge's name. Here they have their own file, so that every judge sees the same ones.
            templates: the four prompts by name.
            parse: reads the score from a judgment's text; NO_GRADE if there is none.

        Raises:
            DataError: as `answers_of_one_model`; or an answer does not have two turns.
        """
        ids = [question.question_id for question in questions]
        with_reference = [q.question_id for q in questions if q.category in REFERENCE_CATEGORIES]
        self._model, model_answers = answers_of_one_model(answers, ids, known=ids, what="answers")
        # A short question file may leave out questions that the public references answer.
        _, reference_answers = answers_of_one_model(references, with_reference, known=None, what="reference answers")
        for answer in (*model_answers.values(), *reference_answers.values()):
            if len(answer.turns) != 2:
                raise DataError(
                    f"{answer.place}: {answer.model} answers question {answer.question_id} in "
                    f"{len(answer.turns)} turns, not in 2"
                )
        self._parse = parse
        self._turns: list[tuple[int, int, str]] = []
        self.requests: list[JudgeRequest] = []
        for question in questions:
            needs_reference = question.category in REFERENCE_CATEGORIES
            names = WITH_REFERENCE if needs_reference else PLAIN
            reference = reference_answers[question.question_id].turns if needs_reference else ()
            fields = _fields(question, model_answers[question.question_id].turns, reference)
            for turn, name in enumerate(names, start=1):
                self._turns.append((question.question_id, turn, name))
                self.requests.append(
                    JudgeRequest(messages=templates[name].filled(fields), sampling=GRADING_SAMPLING, pair=None)
                )

    def rows(self, outcomes: Sequence[JudgeOutcome], judge: Judge) -> JudgedRows:
        """model_judgment/<judge>_single.jsonl."""
        rows: list[dict[str, Any]] = []
        unparsed = 0
        for (question_id, turn, name), request, outcome in zip(self._turns, self.requests, outcomes, strict=True):
            row = {
                "question_id": question_id,
                "model": self._model,
                "judge": [judge.model, name],
                "user_prompt": request.messages[-1]["content"],
                "turn": turn,
            }
            if isinstance(outcome, Unanswered):
                rows.append(row | {"judgment": "", "score": NO_GRADE, "tstamp": 0.0, "failure": outcome.reason})
                continue
            score = self._parse(outcome.text)
            unparsed += score == NO_GRADE
            rows.append(row | {"judgment": outcome.text, "score": score, "tstamp": outcome.time})
        return JudgedRows(rows=rows, unparsed=unparsed)


def _fields(question: MTBenchQuestion, answer: Sequence[str], reference: Sequence[str]) -> dict[str, str]:
    """The fields of the prompts of both turns."""
    return {
        "question": question.turns[0],
        "answer": answer[0],
        **{f"question_{turn}": text for turn, text in enumerate(question.turns, start=1)},
        **{f"answer_{turn}": text for turn, text in enumerate(answer, start=1)},
        **{f"ref_answer_{turn}": text for turn, text in enumerate(reference, start=1)},
    }
