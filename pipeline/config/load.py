"""From a YAML recipe and dotted overrides to a frozen `Recipe`, or an error that says what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError

RECIPES = Path(str(files("jobs").joinpath("recipes")))
"""Data of the package `jobs`, in a checkout as in an installed wheel."""
EXTENDS = "extends"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by name (from jobs/recipes) or by path, and applies `key.path=value` overrides.

    A recipe with a top-level `extends: other` starts from that recipe and changes what it names; lists are replaced.

    Raises:
        ConfigError: no such recipe, no YAML, an unknown key, a wrong value; names the place, the value and the cure.
    """
    path = recipe_path(name)
    values = _read(path, below=())
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"{override!r} is no override; write key.path=value, as in alignment.num_steps=50")
    try:
        merged = OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides)))
        plain = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path.name} with overrides {list(overrides)}: {error}") from error
    plain.setdefault("own_objectives", _are_objectives_own(path, overrides))
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        messages = [_error_message(detail) for detail in error.errors()]
        where = f"recipe {path.name}" + (" with overrides" if overrides else "")
        raise ConfigError(f"{where}:\n  " + "\n  ".join(messages)) from error


def _read(path: Path, *, below: tuple[Path, ...]) -> DictConfig:
    """The values of a recipe file on top of those it extends; `below` are the files that led here."""
    if path in below:
        circle = " -> ".join(p.name for p in (*below, path))
        raise ConfigError(f"recipes extend each other in a circle: {circle}. Remove one `extends`.")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path} holds a list; a recipe is a mapping, as in `name: tiny`")
    parent = values.pop(EXTENDS, None)
    if parent is None:
        return values
    return cast(DictConfig, OmegaConf.merge(_read(recipe_path(str(parent)), below=(*below, path)), values))


def _are_objectives_own(path: Path, overrides: Sequence[str]) -> bool:
    """Whether an override or a recipe outside the package names the objectives."""
    if any(override.startswith("objectives=") for override in overrides):
        return True
    values = cast(DictConfig, OmegaConf.load(path))
    if "objectives" in values or EXTENDS not in values:
        return path.resolve().parent != RECIPES.resolve()
    return _are_objectives_own(recipe_path(str(values[EXTENDS])), ())


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def first_comment(name: str) -> str:
    """The first line of a recipe's file, which says what the recipe is and what it needs."""
    return recipe_path(name).read_text().partition("\n")[0].removeprefix("# ")


def recipe_keys() -> list[str]:
    """The dotted path of every setting and section, in the order of the schema."""
    return _all_keys(Recipe)


def recipe_path(name: str) -> Path:
    """The file of a recipe given by name or by path."""
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
        if not path.exists():
            raise ConfigError(f"recipe {name} does not exist (looked in {Path.cwd()})")
        return path
    path = RECIPES / f"{name}.yaml"
    if not path.exists():
        known = recipe_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"there is no recipe {name!r}. {hint}Known are {', '.join(known)}; or give a path to a .yaml file."
        )
    return path


def _error_message(detail: Any) -> str:
    """One pydantic error as a sentence: place, value, what is wrong, what to write instead."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).removeprefix(".")
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    value = f"{detail['input']!r:.80}"
    match detail["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key; {_nearest(key)}"
        case "missing":
            return f"{key}: must be given"
        case "model_type":
            section = ", ".join(k.rpartition(".")[2] for k in _siblings(f"{key}."))
            return f"{key} = {value}: this is a section; set one of its keys: {section}"
        case "tuple_type":
            return f"{key} = {value}: this is a list; write [{detail['input']}]"
        case "too_short":
            return f"{key} = {value}: give at least {detail['ctx']['min_length']}"
        case "value_error":
            return f"{key}: {message}" if key else message
        case _:
            return f"{key} = {value}: {message}"


def _nearest(key: str) -> str:
    """What the user may have meant by an unknown key: a like-named neighbour, or the same name elsewhere."""
    key = _without_positions(key)
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in _siblings(key)}
    near = difflib.get_close_matches(name, siblings, n=1)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    known = recipe_keys()
    elsewhere = [k for k in known if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, known, n=1)
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known {f'in {section}' if section else 'at the top'}: {', '.join(siblings)}"


def _siblings(key: str) -> list[str]:
    """All keys with the same parent."""
    parent = _without_positions(key.rpartition(".")[0])
    return [k for k in recipe_keys() if k.rpartition(".")[0] == parent]


def _without_positions(key: str) -> str:
    """All entries of a list have the same settings."""
    return re.sub(r"\[\d+\]", "", key)


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for annotation in (field.annotation, *get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                keys += _all_keys(annotation, f"{prefix}{name}.")
    return keys
