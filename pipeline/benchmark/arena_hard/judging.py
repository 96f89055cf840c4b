"""Arena-Hard: each answer against the baseline's, shown in both orders (docs/method.md section 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.benchmark.arena_hard.files import ModelAnswer
from pipeline.benchmark.judges.judge import AnswerPair, Judge, JudgeOutcome, JudgeRequest, JudgeSampling, Unanswered
from pipeline.benchmark.judges.judge_prompt import JudgePrompt, require_fields
from pipeline.benchmark.judges.judged_benchmark import JudgedRows, answers_of_one_model
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError

SAMPLING = JudgeSampling(temperature=0.0, max_tokens=4096, top_logprobs=0)

PLACEHOLDERS = (("QUESTION", "ANSWER_A", "ANSWER_B"), ("question_1", "answer_1", "answer_2"))
"""What the templates of v2 and of v0.1 call question, first and second answer."""


UNREAD = JudgePrompt(system="", user="{QUESTION}\n\n{ANSWER_A}\n\n{ANSWER_B}")
"""For a judge that scores answers, and is told nothing."""


@dataclass(frozen=True, kw_only=True)
class ArenaQuestion:
    uid: str
    category: str
    prompt: str


def read_arena_template(path: Path) -> JudgePrompt:
    """The `system_prompt` and `prompt_template` of a YAML settings file, as v0.1's config/judge_config.yaml.

    The template places {QUESTION}, {ANSWER_A} and {ANSWER_B}, or their v0.1 names.

    Raises:
        DataError: one of them is missing, or does not place question and answers.
    """
    try:
        values = yaml.safe_load(path.read_text())
        system, user = values["system_prompt"], values["prompt_template"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no template ({error!r}). Give a YAML file with system_prompt and prompt_template; "
            "v2 keeps the system prompt in utils/judge_utils.py: copy it into the file."
        ) from error
    # v0.1 writes a list with one template a turn of the judge.
    turns = user if isinstance(user, list) else [user]
    if len(turns) != 1 or not isinstance(turns[0], str) or not isinstance(system, str):
        raise DataError(f"{path}: system_prompt and prompt_template must be one text each")
    names = PLACEHOLDERS[0] if "{QUESTION}" in turns[0] else PLACEHOLDERS[1]
    require_fields(turns[0], names, place=str(path))
    return JudgePrompt(system=system, user=turns[0])


def read_arena_questions(path: Path) -> list[ArenaQuestion]:
    """question.jsonl, a question a row.

    Raises:
        DataError: names file and line: a row of neither layout, or a question that is there already.
    """
    questions: dict[str, ArenaQuestion] = {}
    for row in read_rows(str(path)):
        question = arena_question(row)
        if question.uid in questions:
            raise DataError(f"{row.place}: question {question.uid} is there already; keep one")
        questions[question.uid] = question
    return list(questions.values())


def arena_question(row: Row) -> ArenaQuestion:
    """A row in the v2 layout {uid, category, prompt} or in v0.1's {question_id, category, turns}.

    Raises:
        DataError: neither of them, or several turns.
    """
    if "uid" in row.values:
        uid, prompt = row.require("uid", str), row.require("prompt", str)
    else:
        uid, turns = row.require("question_id", str), row.require("turns", list)
        if len(turns) != 1 or not isinstance(turns[0], dict) or not isinstance(turns[0].get("content"), str):
            raise DataError(f"{row.place}, field 'turns': {turns!r:.60} is not one turn with its content")
        prompt = turns[0]["content"]
    return ArenaQuestion(uid=uid, category=row.require("category", str), prompt=prompt)


class ArenaHardJudging:
    """Implements `JudgedBenchmark`: two games a question, the baseline first in the first one."""

    def __init__(
        self,
        questions: Sequence[ArenaQuestion],
        answers: Sequence[ModelAnswer],
        baseline: Sequence[ModelAnswer],
        template: JudgePrompt,
        *,
        parse: Callable[[str], str | None],
    ) -> None:
        """
        Args:
            parse: verdict ("A>B", "B>>A", ...) from a judgment's text, None where there is none.

        Raises:
            DataError: as `answers_of_one_model`.
        """
        self._questions, self._parse = questions, parse
        uids = [question.uid for question in questions]
        self._model, ours = answers_of_one_model(answers, uids, known=uids, what="answers")
        self._baseline, theirs = answers_of_one_model(baseline, uids, known=uids, what="baseline's answers")
        self.requests = []
        for question in questions:
            answer_of_model, answer_of_baseline = ours[question.uid].output, theirs[question.uid].output
            self.requests += [
                _request(question, answer_of_baseline, answer_of_model, template),
                _request(question, answer_of_model, answer_of_baseline, template),
            ]

    def rows(self, outcomes: Sequence[JudgeOutcome], judge: Judge) -> JudgedRows:
        """model_judgment/<judge>/<model>.jsonl in the v2 layout."""
        games = [self._game(request, outcome) for request, outcome in zip(self.requests, outcomes, strict=True)]
        rows = [
            {
                "uid": question.uid,
                "category": question.category,
                "judge": judge.model,
                "model": self._model,
                "baseline": self._baseline,
                "games": games[2 * i : 2 * i + 2],
            }
            for i, question in enumerate(self._questions)
        ]
        unparsed = sum(game["score"] is None and game["judgment"] is not None for game in games)
        return JudgedRows(rows=rows, unparsed=unparsed)

    def _game(self, request: JudgeRequest, outcome: JudgeOutcome) -> dict[str, Any]:
        prompt = [dict(message) for message in request.messages]
        if isinstance(outcome, Unanswered):
            return {"score": None, "judgment": None, "prompt": prompt, "failure": outcome.reason}
        return {"score": self._parse(outcome.text), "judgment": {"answer": outcome.text}, "prompt": prompt}


def _request(question: ArenaQuestion, answer_a: str, answer_b: str, template: JudgePrompt) -> JudgeRequest:
    shown = (question.prompt, answer_a, answer_b)
    fields = {name: text for names in PLACEHOLDERS for name, text in zip(names, shown, strict=True)}
    return JudgeRequest(
        messages=template.filled(fields),
        sampling=SAMPLING,
        pair=AnswerPair(
            prompt=({"role": "user", "content": question.prompt},),
            answer_a=answer_a,
            answer_b=answer_b,
            verdict_a="[[A>B]]",
            verdict_b="[[B>A]]",
            verdict_tie="[[A=B]]",
        ),
    )
