"""Single responses that somebody liked or did not like: the unpaired data of KTO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace

from pipeline.data.chat import strip_thinking
from pipeline.data.files import Row, distinct, read_rows
from pipeline.data.preferences import LeftOut, normalised_prompt
from pipeline.data.prompts import PROMPT_FIELDS, prompt_of
from pipeline.errors import DataError
from pipeline.records import LabelledResponse


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
        for row in map(labelled_response, read_rows(path)):
            if not strip_thinking(row.response).strip():
                left_out[LeftOut.EMPTY] += 1
            elif normalised_prompt(row.prompt) in heldout_prompts:
                left_out["a held-out prompt"] += 1
            else:
                found.append(row)
    labels = Counter(row.label for row in found)
    if len(labels) < 2:
        raise DataError(
            f"{', '.join(paths)}: {labels[True]} rows with label true and {labels[False]} with label false. KTO learns "
            "from both classes. Give responses of the other class, too, or use a method for pairs."
        )
    identities = distinct(row.id for row in found)
    return [replace(row, id=identity) for identity, row in zip(identities, found, strict=True)], left_out


def labelled_response(row: Row) -> LabelledResponse:
    """A row of a file.

    Raises:
        DataError: it lacks a field or has one of another kind; names file, line and field.
    """
    return LabelledResponse(
        id=row.identity,
        prompt=prompt_of(row, PROMPT_FIELDS),
        response=row.require("response", str),
        label=row.require("label", bool),
    )
