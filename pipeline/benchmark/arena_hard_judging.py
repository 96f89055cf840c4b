"""Arena-Hard: each answer against the baseline's, shown in both orders (vrm_spec section 17)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.benchmark.judging import (
    Comparison,
    Judge,
    JudgedRows,
    JudgeRequest,
    JudgeSampling,
    Outcome,
    Unanswered,
    fill,
    require_fields,
)
from pipeline.data.files import read_rows
from pipeline.errors import DataError

SAMPLING = JudgeSampling(temperature=0.0, max_tokens=4096, top_logprobs=0)

PLACEHOLDERS = (("QUESTION", "ANSWER_A", "ANSWER_B"), ("question_1", "answer_1", "answer_2"))
"""What the templates of the newer and of the v0.1 repository call question, first and second answer."""


@dataclass(frozen=True, kw_only=True)
class ArenaTemplate:
    """The judge's prompt, with {QUESTION}, {ANSWER_A} and {ANSWER_B} or their v0.1 names."""

    system: str
    user: str


@dataclass(frozen=True, kw_only=True)
class ArenaQuestion:
    uid: str
    category: str
    prompt: str


@dataclass(frozen=True, kw_only=True)
class ArenaAnswers:
    """One model's answers."""

    model: str
    texts: Mapping[str, str]
    """By uid of the question."""


def read_arena_template(path: Path) -> ArenaTemplate:
    """The `system_prompt` and `prompt_template` of a YAML settings file, as v0.1's config/judge_config.yaml.

    Raises:
        DataError: one of them is missing, or does not place question and answers.
    """
    try:
        values = yaml.safe_load(path.read_text())
        system, user = values["system_prompt"], values["prompt_template"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no template ({error!r}). Give a YAML file with system_prompt and prompt_template; "
            "newer versions of Arena-Hard keep the system prompt in utils/judge_utils.py: copy it into the file."
        ) from error
    # v0.1 writes a list with one template a turn of the judge.
    turns = user if isinstance(user, list) else [user]
    if len(turns) != 1 or not isinstance(turns[0], str) or not isinstance(system, str):
        raise DataError(f"{path}: system_prompt and prompt_template must be one text each")
    names = PLACEHOLDERS[0] if "{QUESTION}" in turns[0] else PLACEHOLDERS[1]
    require_fields(turns[0], names, place=str(path))
    return ArenaTemplate(system=system, user=turns[0])


def read_arena_questions(path: Path) -> list[ArenaQuestion]:
    """question.jsonl in the newer layout {uid, category, prompt} or in v0.1's {question_id, category, turns}.

    Raises:
        DataError: a row of neither kind, or without exactly one turn.
    """
    questions = []
    for row in read_rows(str(path)):
        try:
            if "uid" in row.values:
                uid, prompt = row.values["uid"], row.values["prompt"]
            else:
                uid, [turn] = row.values["question_id"], row.values["turns"]
                prompt = turn["content"]
            questions.append(ArenaQuestion(uid=uid, category=row.values["category"], prompt=prompt))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{row.place}: no Arena-Hard question ({error!r})") from error
    return questions


def read_arena_answers(path: Path) -> ArenaAnswers:
    """model_answer/<model>.jsonl in the newer layout {uid, model, messages} or v0.1's {question_id, model_id, choices}.

    Raises:
        DataError: a row of neither kind, two for one question, or answers of several models.
    """
    texts: dict[str, str] = {}
    models = set()
    for row in read_rows(str(path)):
        try:
            if "uid" in row.values:
                uid, model = row.values["uid"], row.values["model"]
                text = row.values["messages"][-1]["content"]["answer"]
            else:
                uid, model = row.values["question_id"], row.values["model_id"]
                text = row.values["choices"][0]["turns"][0]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{row.place}: no Arena-Hard answer ({error!r})") from error
        if uid in texts:
            raise DataError(f"{row.place}: a second answer to question {uid}")
        texts[uid] = text
        models.add(model)
    if len(models) != 1:
        raise DataError(f"{path} holds answers of {len(models)} models ({sorted(models)}); give one model's answers")
    return ArenaAnswers(model=models.pop(), texts=texts)


class ArenaHardJudging:
    """Implements `JudgedBenchmark`: two games a question, the baseline first in the first one."""

    def __init__(
        self,
        questions: Sequence[ArenaQuestion],
        answers: ArenaAnswers,
        baseline: ArenaAnswers,
        template: ArenaTemplate,
        *,
        parse: Callable[[str], str | None],
    ) -> None:
        """
        Args:
            parse: verdict ("A>B", "B>>A", ...) from a judgment's text, None where there is none.

        Raises:
            DataError: a question without an answer.
        """
        for side in (answers, baseline):
            missing = [question.uid for question in questions if question.uid not in side.texts]
            if missing:
                raise DataError(
                    f"{side.model} has no answer to {len(missing)} of {len(questions)} questions, as {missing[0]}. "
                    "Generate them, or leave the questions out of --questions."
                )
        self._questions, self._answers, self._baseline, self._parse = questions, answers, baseline, parse
        self.requests = [
            _request(question, *shown, template)
            for question in questions
            for ours, theirs in [(answers.texts[question.uid], baseline.texts[question.uid])]
            for shown in ((theirs, ours), (ours, theirs))
        ]

    def rows(self, outcomes: Sequence[Outcome], judge: Judge) -> JudgedRows:
        """model_judgment/<judge>/<model>.jsonl in the newer layout."""
        games = [self._game(request, outcome) for request, outcome in zip(self.requests, outcomes, strict=True)]
        rows = [
            {
                "uid": question.uid,
                "category": question.category,
                "judge": judge.model,
                "model": self._answers.model,
                "baseline": self._baseline.model,
                "games": games[2 * i : 2 * i + 2],
            }
            for i, question in enumerate(self._questions)
        ]
        unparsed = sum(game["score"] is None and game["judgment"] is not None for game in games)
        return JudgedRows(rows=rows, unparsed=unparsed)

    def _game(self, request: JudgeRequest, outcome: Outcome) -> dict[str, Any]:
        prompt = [dict(message) for message in request.messages]
        if isinstance(outcome, Unanswered):
            return {"score": None, "judgment": None, "prompt": prompt, "failure": outcome.reason}
        return {"score": self._parse(outcome.text), "judgment": {"answer": outcome.text}, "prompt": prompt}


def _request(question: ArenaQuestion, answer_a: str, answer_b: str, template: ArenaTemplate) -> JudgeRequest:
    shown = (question.prompt, answer_a, answer_b)
    fields = {name: text for names in PLACEHOLDERS for name, text in zip(names, shown, strict=True)}
    return JudgeRequest(
        messages=(
            {"role": "system", "content": template.system},
            {"role": "user", "content": fill(template.user, fields)},
        ),
        sampling=SAMPLING,
        comparison=Comparison(
            prompt=({"role": "user", "content": question.prompt},),
            answer_a=answer_a,
            answer_b=answer_b,
            verdict_a="[[A>B]]",
            verdict_b="[[B>A]]",
            verdict_tie="[[A=B]]",
        ),
    )
