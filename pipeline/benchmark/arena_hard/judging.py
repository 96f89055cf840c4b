"""Arena-Hard: a judge compares each answer with the baseline's, in both orders (docs/method.md section 12)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.benchmark.arena_hard.answers import ArenaAnswer
from pipeline.benchmark.arena_hard.questions import ArenaQuestion
from pipeline.benchmark.judges.judge import AnswerPair, Judge, JudgeOutcome, JudgeRequest, JudgeSampling, Unanswered
from pipeline.benchmark.judges.judge_prompt import JudgePrompt, require_fields
from pipeline.benchmark.judges.judged_benchmark import JudgedRows, answers_of_one_model
from pipeline.errors import DataError

VERDICT_SAMPLING = JudgeSampling(temperature=0.0, max_tokens=4096, top_logprobs=0)

PLACEHOLDERS = (("QUESTION", "ANSWER_A", "ANSWER_B"), ("question_1", "answer_1", "answer_2"))
"""Names of the question, the first and the second answer in the templates of v2 and of v0.1."""

ANSWERS_ONLY_PROMPT = JudgePrompt(system="", user="{QUESTION}\n\n{ANSWER_A}\n\n{ANSWER_B}")
"""Prompt for a judge that scores answers and needs no instructions."""


def read_arena_template(path: Path) -> JudgePrompt:
    """The `system_prompt` and `prompt_template` of a YAML file such as v0.1's config/judge_config.yaml.

    The template contains {QUESTION}, {ANSWER_A} and {ANSWER_B}, or the v0.1 names of these fields.

    Raises:
        DataError: a prompt is missing, or the template lacks one of the fields.
    """
    try:
        values = yaml.safe_load(path.read_text())
        system, user = values["system_prompt"], values["prompt_template"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a template ({error!r}). Give a YAML file with system_prompt and prompt_template; "
            "v2 has its system prompt in utils/judge_utils.py: copy it into the file."
        ) from error
    # In v0.1 this is a list with one template for each turn of the judge.
    turns = user if isinstance(user, list) else [user]
    if len(turns) != 1 or not isinstance(turns[0], str) or not isinstance(system, str):
        raise DataError(f"{path}: system_prompt and prompt_template must be one text each")
    names = PLACEHOLDERS[0] if "{QUESTION}" in turns[0] else PLACEHOLDERS[1]
    require_fields(turns[0], names, place=str(path))
    return JudgePrompt(system=system, user=turns[0])


class ArenaHardJudging:
    """Implements `JudgedBenchmark`: two games per question. The first game shows the baseline first."""

    def __init__(
        self,
        questions: Sequence[ArenaQuestion],
        answers: Sequence[ArenaAnswer],
        baseline: Sequence[ArenaAnswer],
        template: JudgePrompt,
        *,
        parse: Callable[[str], str | None],
    ) -> None:
        """
        Args:
            parse: reads the verdict ("A>B", "B>>A", ...) from a judgment's text; None if there is none.

        Raises:
            DataError: as `answers_of_one_model`; or the model is the baseline itself.
        """
        self._questions, self._parse = questions, parse
        ids = [question.question_id for question in questions]
        self._model, model_answers = answers_of_one_model(answers, ids, known=ids, what="answers")
        self._baseline, baseline_answers = answers_of_one_model(baseline, ids, known=ids, what="baseline's answers")
        if self._model == self._baseline:
            raise DataError(
                f"the answers and the baseline's answers are both of {self._model!r}: a model has no win rate over "
                "itself. Give the answers of another model, or rename one of the two."
            )
        self.requests = []
        for question in questions:
            by_model = model_answers[question.question_id].output
            by_baseline = baseline_answers[question.question_id].output
            self.requests += [
                _request(question, by_baseline, by_model, template),
                _request(question, by_model, by_baseline, template),
            ]

    def rows(self, outcomes: Sequence[JudgeOutcome], judge: Judge) -> JudgedRows:
        """model_judgment/<judge>/<model>.jsonl in the v2 layout."""
        games = [self._game(request, outcome) for request, outcome in zip(self.requests, outcomes, strict=True)]
        rows = [
            {
                "uid": question.question_id,
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
    texts = (question.prompt, answer_a, answer_b)
    fields = {name: text for names in PLACEHOLDERS for name, text in zip(names, texts, strict=True)}
    return JudgeRequest(
        messages=template.filled(fields),
        sampling=VERDICT_SAMPLING,
        pair=AnswerPair(
            prompt=({"role": "user", "content": question.prompt},),
            answer_a=answer_a,
            answer_b=answer_b,
            verdict_a="[[A>B]]",
            verdict_b="[[B>A]]",
            verdict_tie="[[A=B]]",
        ),
    )
