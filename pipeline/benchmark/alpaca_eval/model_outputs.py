"""AlpacaEval's `model_outputs.json`: the answers of one model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.files import read_rows
from pipeline.errors import DataError
from pipeline.stages.storage import write_text


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """One row of a `model_outputs.json`."""

    instruction: str
    output: str
    generator: str
    dataset: str | None
    place: str = field(default="an answer", compare=False, repr=False)
    """File and row of the answer."""


def read_model_outputs(path: Path) -> list[ModelOutput]:
    """The answers of one model.

    Raises:
        DataError: a row lacks {instruction, output, generator}, the file has a second generator, or an instruction is
            answered twice (names file and row); or the file has no rows.
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
    """Writes a JSON list of {instruction, output, generator, dataset}, in one atomic step."""
    rows = [
        {"instruction": o.instruction, "output": o.output, "generator": o.generator, "dataset": o.dataset}
        for o in outputs
    ]
    write_text(str(path), json.dumps(rows, indent=1, ensure_ascii=False))


def pair_by_instruction(
    answers: Sequence[ModelOutput], baseline: Sequence[ModelOutput]
) -> list[tuple[ModelOutput, ModelOutput]]:
    """Each answer with the baseline's answer to the same instruction, in the order of `answers`.

    Raises:
        DataError: one of the two does not answer an instruction that the other answers.
    """
    for incomplete, reference in ((baseline, answers), (answers, baseline)):
        answered = {output.instruction for output in incomplete}
        missing = [output for output in reference if output.instruction not in answered]
        if missing:
            name = incomplete[0].generator
            raise DataError(
                f"{missing[0].place}: {name} has no answer to {missing[0].instruction!r:.80}, nor to "
                f"{len(missing) - 1} others of the {len(reference)} instructions that {reference[0].generator} answers."
                f" Judge answers to the same instructions; those of {name} end at {incomplete[-1].place}."
            )
    baseline_answers = {output.instruction: output for output in baseline}
    return [(answer, baseline_answers[answer.instruction]) for answer in answers]
