"""AlpacaEval 2: a judge prefers one of two answers by the first token that it writes (docs/method.md section 12)."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.benchmark.alpaca_eval.model_outputs import ModelOutput, pair_by_instruction
from pipeline.benchmark.judges.judge import (
    AnswerPair,
    Judge,
    JudgeOutcome,
    JudgeRequest,
    JudgeSampling,
    Judgment,
    Unanswered,
)
from pipeline.benchmark.judges.judge_prompt import fill_template, require_fields
from pipeline.benchmark.judges.judged_benchmark import JudgedRows
from pipeline.errors import DataError
from pipeline.records import Message

FIRST, SECOND = "m", "M"
"""Names of the first and the second answer in the prompt of alpaca_eval_clf."""

ANNOTATOR_SAMPLING = JudgeSampling(temperature=1.0, max_tokens=1, top_logprobs=5)
"""Settings of the annotator weighted_alpaca_eval_gpt4_turbo."""

ANNOTATOR_SEED = 0
"""Seed of the annotator; it decides which answer is shown first."""

ANSWERS_ONLY_MESSAGES: tuple[Message, ...] = ({"role": "user", "content": "{instruction}\n\n{output_1}\n\n{output_2}"},)
"""Prompt for a judge that scores answers and needs no instructions."""

CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


def read_chatml(path: Path) -> tuple[Message, ...]:
    """The messages of a ChatML prompt file such as alpaca_eval_clf.txt.

    Raises:
        DataError: the file cannot be read, or lacks {instruction}, {output_1} or {output_2}.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the template {path} cannot be read: {error}") from error
    require_fields(text, ("instruction", "output_1", "output_2"), place=str(path))
    messages = tuple({"role": role, "content": content.strip()} for role, content in CHATML.findall(text))
    if not messages:
        raise DataError(
            f"{path} holds no ChatML (<|im_start|>role ... <|im_end|>); give AlpacaEval's alpaca_eval_clf.txt"
        )
    return messages


def is_switched(instruction: str) -> bool:
    """Whether the model's answer is shown first. AlpacaEval draws this at random from the instruction alone."""
    return random.Random(f"is_switched_outputs{instruction}{ANNOTATOR_SEED}").choices([False, True])[0]


def parse_identifier(text: str) -> float | None:
    """1 where the judge names the first answer, 2 where it names the second, None otherwise."""
    return {FIRST: 1.0, SECOND: 2.0}.get(text.strip())


def shown_preference(judgment: Judgment, parse: Callable[[str], float | None]) -> float | None:
    """The preference in [1, 2] between the answers in the order shown; 1 means the first. None without a preference.

    preference = 2 - p(m) / (p(m) + p(M)) over the alternatives to the first token; a token that is not among the
    alternatives has p = 0. Without log-probabilities, the text decides.

    Source: `logprob_parser` of alpaca_eval 0.6.6.
    """
    if not judgment.first_token_logprobs:
        return parse(judgment.text)
    first, second = (math.exp(judgment.first_token_logprobs.get(token, -math.inf)) for token in (FIRST, SECOND))
    return 2.0 - first / (first + second) if first + second > 0.0 else None


class AlpacaEvalJudging:
    """Implements `JudgedBenchmark`: one request for each pair of answers that differ."""

    def __init__(
        self,
        answers: Sequence[ModelOutput],
        baseline: Sequence[ModelOutput],
        template: Sequence[Message],
        *,
        annotator: str,
        parse: Callable[[str], float | None] = parse_identifier,
    ) -> None:
        """
        Args:
            annotator: name of the prompt; each output row contains it.
            parse: reads the preference from a judgment's text when the judgment has no log-probabilities.

        Raises:
            DataError: the model and the baseline do not answer the same instructions; or they have the same name and
                different answers.
        """
        self._pairs = pair_by_instruction(answers, baseline)
        for answer, other in self._pairs:
            if answer.generator == other.generator and answer.output != other.output:
                raise DataError(
                    f"{answer.place}: {answer.generator!r} gives another answer than in {other.place}. A model and its "
                    "baseline with one name count as the same model, whose rate is 50: rename one of the two."
                )
        self._annotator = annotator
        self._parse = parse
        self.requests = [
            _request(answer, baseline_answer, template)
            for answer, baseline_answer in self._pairs
            if answer.output != baseline_answer.output
        ]

    def rows(self, outcomes: Sequence[JudgeOutcome], judge: Judge) -> JudgedRows:
        """annotations.json: output_1 is the baseline's answer, and the preference is 1 + P(the model's is better)."""
        remaining = iter(outcomes)
        rows = []
        unparsed = 0
        for answer, baseline_answer in self._pairs:
            row: dict[str, Any] = {
                "instruction": answer.instruction,
                "output_1": baseline_answer.output,
                "generator_1": baseline_answer.generator,
                "output_2": answer.output,
                "generator_2": answer.generator,
                "annotator": f"{self._annotator}/{judge.model}",
            }
            if answer.dataset is not None:
                row["dataset"] = answer.dataset
            if answer.output == baseline_answer.output:
                rows.append(row | {"preference": 1.5, "preference_raw_completion": None})
                continue
            match next(remaining):
                case Unanswered(reason=reason):
                    rows.append(row | {"preference": None, "preference_raw_completion": None, "failure": reason})
                case judgment:
                    preference = shown_preference(judgment, self._parse)
                    if preference is None:
                        unparsed += 1
                    elif is_switched(answer.instruction):
                        preference = 3.0 - preference
                    rows.append(row | {"preference": preference, "preference_raw_completion": judgment.text})
        return JudgedRows(rows=rows, unparsed=unparsed)


def _request(answer: ModelOutput, baseline_answer: ModelOutput, template: Sequence[Message]) -> JudgeRequest:
    first, second = baseline_answer.output, answer.output
    if is_switched(answer.instruction):
        first, second = second, first
    fields = {"instruction": answer.instruction, "output_1": first, "output_2": second}
    return JudgeRequest(
        messages=tuple({"role": turn["role"], "content": fill_template(turn["content"], fields)} for turn in template),
        sampling=ANNOTATOR_SAMPLING,
        pair=AnswerPair(
            prompt=({"role": "user", "content": answer.instruction},),
            answer_a=first,
            answer_b=second,
            verdict_a=FIRST,
            verdict_b=SECOND,
            verdict_tie="",
        ),
    )
