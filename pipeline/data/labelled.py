"""Single responses that somebody liked or did not like: the unpaired data of KTO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from pipeline.data.chat import strip_thinking
from pipeline.data.files import distinct, read_rows
from pipeline.data.preferences import LeftOut, normalised_prompt
from pipeline.data.prompts import prompt_of
from pipeline.errors import DataError
from pipeline.records import LabelledResponse

PROMPT_FIELDS = ("prompt", "messages", "instruction")


def read_labelled(
    paths: Sequence[str], *, heldout_prompts: Collection[str]
) -> tuple[list[LabelledResponse], Counter[str]]:
    """Rows with a prompt, `response` and `label`, and the number of rows left out, by reason.

    Args:
        paths: JSONL or Parquet files.
        heldout_prompts: normalised prompts that training must not see.

    Raises:
        DataError: a row lacks a field or has one of another kind; or the rows left have one class only.
    """
    found: list[LabelledResponse] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        for row in read_rows(path):
            prompt = prompt_of(row, PROMPT_FIELDS)
            response, label = row.require("response", str), row.require("label", bool)
            if not strip_thinking(response).strip():
                left_out[LeftOut.EMPTY] += 1
            elif normalised_prompt(prompt) in heldout_prompts:
                left_out["a held-out prompt"] += 1
            else:
                found.append(LabelledResponse(id=row.identity, prompt=prompt, response=response, label=label))
    labels = Counter(row.label for row in found)
    if len(labels) < 2:
        raise DataError(
            f"{', '.join(paths)}: {labels[True]} rows with label true and {labels[False]} with label false. KTO learns "
            "from both classes. Give responses of the other class, too, or use a method for pairs."
        )
    identities = distinct(row.id for row in found)
    return [
        LabelledResponse(id=identity, prompt=row.prompt, response=row.response, label=row.label)
        for identity, row in zip(identities, found, strict=True)
    ], left_out
