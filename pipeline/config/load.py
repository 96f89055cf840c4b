"""From a YAML recipe and dotted overrides to a frozen `Recipe`, or a letter that says what is wrong with them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from pipeline.config.schema import Recipe
from pipeline.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe by name (from jobs/recipes) or by path, and applies `key.path=value` overrides.

    Raises:
        ConfigError: no such recipe, no YAML, an unknown key, a wrong value; names the place, the value and the cure.
    """
    path = recipe_path(name)
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"{override!r} is no override; write key.path=value, as in alignment.num_steps=50")
    try:
        merged = OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"overrides {list(overrides)} do not fit {path}: {error}") from error
    try:
        return Recipe.model_validate(plain)
    except ValidationError as error:
        letters = [_letter(detail) for detail in error.errors()]
        raise ConfigError(f"recipe {path.name}" + (" with overrides" if overrides else "") + ":\n  " + "\n  ".join(letters)) from error


def recipe_path(name: str) -> Path:
    """The file of a recipe given by name or by path."""
    if Path(name).suffix in (".yaml", ".yml"):
        path = Path(name)
        if not path.exists():
            raise ConfigError(f"recipe {name} does not exist (looked in {Path.cwd()})")
        return path
    path = RECIPES / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"there is no recipe {name!r}. {hint}Known are {', '.join(known)}; or give a path to a .yaml file.")
    return path


def _letter(detail: Any) -> str:
    """One pydantic error as a sentence: place, value, what is wrong, what to write instead."""
    location = [part for part in detail["loc"] if isinstance(part, str)]
    key = ".".join(location)
    match detail["type"]:
        case "extra_forbidden":
            known = _all_keys(Recipe)
            same_parent = [k for k in known if k.rpartition(".")[0] == ".".join(location[:-1])]
            near = difflib.get_close_matches(key, same_parent, n=1) or difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(same_parent)}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: must be given"
        case _:
            return f"{key} = {detail['input']!r}: {detail['msg'].lower().removeprefix('value error, ')}"


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for annotation in (field.annotation, *get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                keys += _all_keys(annotation, f"{prefix}{name}.")
    return keys
