"""AlpacaEval 2: which of two answers is better, by the first token a judge writes (docs/method.md section 12)."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from pipeline.data.files import read_rows
from pipeline.errors import DataError
from pipeline.records import Message
from pipeline.stages.storage import write_text

FIRST, SECOND = "m", "M"
"""What the prompt of alpaca_eval_clf calls the answers it shows first and second."""

SAMPLING = JudgeSampling(temperature=1.0, max_tokens=1, top_logprobs=5)
"""Of the annotator weighted_alpaca_eval_gpt4_turbo."""

SEED = 0
"""Of the annotator, and so of its coin."""

UNREAD: tuple[Message, ...] = ({"role": "user", "content": "{instruction}\n\n{output_1}\n\n{output_2}"},)
"""The prompt for a judge that scores answers, and is told nothing."""

CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """One row of a `model_outputs.json`."""

    instruction: str
    output: str
    generator: str
    dataset: str | None
    place: str = field(default="an answer", compare=False, repr=False)
    """File and row it was read from."""


def read_model_outputs(path: Path) -> list[ModelOutput]:
    """The answers of one model.

    Raises:
        DataError: names file and row: no {instruction, output, generator}, a second generator, or an instruction
            answered twice; or the list is empty.
    """
    outputs: dict[str, ModelOutput] = {}
    generator = ""
    for row in read_rows(str(path)):
        output = ModelOutput(
            instruction=row.require("instruction", str),
            output=row.require("output", str),
            generator=row.require("generator", str),
            dataset=row.values.get("dataset"),
            place=row.place,
        )
        generator = generator or output.generator
        if output.generator != generator:
            raise DataError(f"{row.place}: {output.generator!r} in a file of {generator!r}; give one model's answers")
        if output.instruction in outputs:
            raise DataError(f"{row.place}: {generator!r} answers {output.instruction!r:.80} again; keep one answer")
        outputs[output.instruction] = output
    if not outputs:
        raise DataError(f"{path} holds no AlpacaEval answers; give a model_outputs.json")
    return list(outputs.values())


def write_model_outputs(path: Path, outputs: Sequence[ModelOutput]) -> None:
    """A JSON list of {instruction, output, generator, dataset}, whole or not at all."""
    rows = [
        {"instruction": o.instruction, "output": o.output, "generator": o.generator, "dataset": o.dataset}
        for o in outputs
    ]
    write_text(str(path), json.dumps(rows, indent=1, ensure_ascii=False))


def read_chatml(path: Path) -> tuple[Message, ...]:
    """The messages of a ChatML prompt file, as alpaca_eval_clf.txt.

    Raises:
        DataError: it cannot be read, or lacks {instruction}, {output_1} or {output_2}.
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
    """Whether the model's answer is shown first: AlpacaEval's coin, a function of the instruction alone."""
    return random.Random(f"is_switched_outputs{instruction}{SEED}").choices([False, True])[0]


def parse_identifier(text: str) -> float | None:
    """1 where the judge names the first answer, 2 where it names the second, None otherwise."""
    return {FIRST: 1.0, SECOND: 2.0}.get(text.strip())


def shown_preference(judgment: Judgment, parse: Callable[[str], float | None]) -> float | None:
    """The preference in [1, 2] between the answers as shown, 1 for the first; None where the judgment has none.

    2 - p(m) / (p(m) + p(M)) over the alternatives to the first token, an absent one having p = 0; without
    log-probabilities, what the text says.

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
            annotator: name of the prompt, for the rows.
            parse: preference from a judgment's text, where it has no log-probabilities.

        Raises:
            DataError: the two do not answer the same instructions.
        """
        self._pairs = pair_by_instruction(answers, baseline)
        self._annotator = annotator
        self._parse = parse
        differing = [(ours, theirs) for ours, theirs in self._pairs if ours.output != theirs.output]
        self.requests = [_request(ours, theirs, template) for ours, theirs in differing]

    def rows(self, outcomes: Sequence[JudgeOutcome], judge: Judge) -> JudgedRows:
        """annotations.json: output_1 is the baseline's, and 1 + P(the model's is better) the preference."""
        remaining = iter(outcomes)
        rows = []
        unparsed = 0
        for ours, theirs in self._pairs:
            row: dict[str, Any] = {
                "instruction": ours.instruction,
                "output_1": theirs.output,
                "generator_1": theirs.generator,
                "output_2": ours.output,
                "generator_2": ours.generator,
                "annotator": f"{self._annotator}/{judge.model}",
            }
            if ours.dataset is not None:
                row["dataset"] = ours.dataset
            if ours.output == theirs.output:
                rows.append(row | {"preference": 1.5, "preference_raw_completion": None})
                continue
            match next(remaining):
                case Unanswered(reason=reason):
                    rows.append(row | {"preference": None, "preference_raw_completion": None, "failure": reason})
                case judgment:
                    preference = shown_preference(judgment, self._parse)
                    if preference is None:
                        unparsed += 1
                    elif is_switched(ours.instruction):
                        preference = 3.0 - preference
                    rows.append(row | {"preference": preference, "preference_raw_completion": judgment.text})
        return JudgedRows(rows=rows, unparsed=unparsed)


def pair_by_instruction(
    answers: Sequence[ModelOutput], baseline: Sequence[ModelOutput]
) -> list[tuple[ModelOutput, ModelOutput]]:
    """Each answer with the baseline's to the same instruction, in the order of the answers.

    Raises:
        DataError: one of them does not answer an instruction that the other answers.
    """
    theirs = {output.instruction: output for output in baseline}
    for lacking, asked in ((baseline, answers), (answers, baseline)):
        known = {output.instruction for output in lacking}
        missing = [output for output in asked if output.instruction not in known]
        if missing:
            raise DataError(
                f"{missing[0].place}: {lacking[0].generator} has no answer to {missing[0].instruction!r:.80}, nor to "
                f"{len(missing) - 1} others of the {len(asked)} instructions that {asked[0].generator} answers. Judge "
                f"answers to the same instructions; those of {lacking[0].generator} end at {lacking[-1].place}."
            )
    return [(answer, theirs[answer.instruction]) for answer in answers]


def _request(ours: ModelOutput, theirs: ModelOutput, template: Sequence[Message]) -> JudgeRequest:
    shown = (ours.output, theirs.output) if is_switched(ours.instruction) else (theirs.output, ours.output)
    fields = {"instruction": ours.instruction, "output_1": shown[0], "output_2": shown[1]}
    return JudgeRequest(
        messages=tuple({"role": turn["role"], "content": fill_template(turn["content"], fields)} for turn in template),
        sampling=SAMPLING,
        pair=AnswerPair(
            prompt=({"role": "user", "content": ours.instruction},),
            answer_a=shown[0],
            answer_b=shown[1],
            verdict_a=FIRST,
            verdict_b=SECOND,
            verdict_tie="",
        ),
    )
