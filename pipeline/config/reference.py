"""Every setting of a recipe with its type, default and sentence: for `vrm explain` and docs/configuration.md.

The sentences are the docstrings below the fields, read from the source: pydantic itself drops them, or starts slowly.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError

TABLE_HEAD = ["", "| setting | values | default | meaning |", "| --- | --- | --- | --- |"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a recipe, or a section of settings."""

    path: str
    """As in an override: `alignment.kl.coefficient`. A section of a list is written once: `data.sources.path`."""
    values: str
    """What it may be, in words; "section" for a section."""
    default: str
    """As YAML writes it; "required" without one."""
    text: str


def settings(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[Setting]:
    """All settings below a section: its own, then each section in front of what is below it."""
    sentences = _sentences(model)
    sections = []
    for name, field in model.model_fields.items():
        below = list(_sections(field.annotation))
        if below:
            sections.append((name, below))
            continue
        values, default = _values(field.annotation, field.metadata), _default(field)
        yield Setting(path=f"{prefix}{name}", values=values, default=default, text=sentences.get(name, ""))
    for name, below in sections:
        text = sentences.get(name) or " ".join(map(_docstring, below))
        yield Setting(path=f"{prefix}{name}", values="section", default="", text=text)
        for section in below:
            yield from settings(section, f"{prefix}{name}.")


def explained(name: str) -> list[Setting]:
    """The settings of that path, below that section, or with that last part of a path.

    Raises:
        ConfigError: there is none.
    """
    every = list(settings())
    found = [s for s in every if s.path == name or s.path.startswith(f"{name}.") or s.path.endswith(f".{name}")]
    if not found:
        near = [s.path for s in every if name.rpartition(".")[2] in s.path][:5]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"no setting is called {name!r}{hint}. `vrm explain` lists all.")
    return found


def as_markdown() -> str:
    """The page docs/configuration.md: a table a section."""
    lines = [
        "# Configuration reference",
        "",
        "Every setting of a recipe. `vrm explain NAME` prints the same, `vrm run RECIPE --dry-run` a recipe's values.",
        "This page is made from the schema: `python -m pipeline.config.reference > docs/configuration.md`.",
        *TABLE_HEAD,
    ]
    for setting in settings():
        if setting.values == "section":
            # A section of sections alone would have an empty table.
            lines = lines[: -len(TABLE_HEAD)] if lines[-len(TABLE_HEAD) :] == TABLE_HEAD else lines
            lines += ["", f"## {setting.path}", "", setting.text, *TABLE_HEAD]
            continue
        cells = (f"`{setting.path}`", f"`{setting.values}`", f"`{setting.default}`", setting.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


@cache
def _sentences(model: type[BaseModel]) -> dict[str, str]:
    """Field -> the docstring below it, in the class or in one that it inherits from."""
    found: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        tree = ast.parse(inspect.getsource(cls))
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in pairwise(body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = _one_line(str(below.value.value))
    return found


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _docstring(model: type[BaseModel]) -> str:
    """Its first paragraph."""
    return _one_line((model.__doc__ or "").split("\n\n")[0])


def _values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values of a type in words: `float > 0`, `a or b`, `list of str`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " or ".join(_values(argument) for argument in arguments)
    if origin is tuple:
        return "list of " + _values(arguments[0])
    if origin in (dict, Mapping):
        return f"map of {_values(arguments[0])} to {_values(arguments[1])}"
    if annotation is type(None):
        return "null"
    return " ".join([annotation.__name__, *_bounds(metadata)])


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for constraint in metadata:
        for nested in getattr(constraint, "metadata", [constraint]):
            for sign, name in ((">", "gt"), (">=", "ge"), ("<", "lt"), ("<=", "le")):
                if getattr(nested, name, None) is not None:
                    yield f"{sign} {getattr(nested, name)}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(as_markdown(), end="")
