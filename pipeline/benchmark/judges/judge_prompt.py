"""The prompt of a judge: a template with named places for a question and its answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import DataError
from pipeline.records import Message


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """Two templates; each {name} in the user template stands for a question or an answer."""

    system: str
    user: str

    def filled(self, fields: Mapping[str, str]) -> tuple[Message, ...]:
        return (
            {"role": "system", "content": self.system},
            {"role": "user", "content": fill_template(self.user, fields)},
        )


def fill_template(template: str, fields: Mapping[str, str]) -> str:
    """The template with each `{name}` of `fields` replaced. One pass: an inserted text is not searched for names."""
    names = "|".join(map(re.escape, fields))
    return re.sub(rf"\{{({names})\}}", lambda match: fields[match[1]], template)


def require_fields(template: str, names: Sequence[str], *, place: str) -> None:
    """Checks that a template has every one of these fields.

    Raises:
        DataError: the template lacks one of them; names `place`, the file of the template.
    """
    missing = [name for name in names if f"{{{name}}}" not in template]
    if missing:
        raise DataError(f"{place}: the template has no {', '.join(f'{{{name}}}' for name in missing)}")
