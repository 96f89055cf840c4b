"""A function that scores, ready to travel to the process that runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config.rewards import MathAnswer, PythonReward
from pipeline.errors import ConfigError
from pipeline.rewards.math_answers import MathAnswers, require_math_verify


@dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A function of a user's file. The text of the file travels, so every node runs what the driver read."""

    path: str
    """Absolute; files beside it can be imported where they exist."""
    name: str
    text: str

    @classmethod
    def read(cls, config: PythonReward) -> UserFunction:
        """Reads the file as it is now.

        Raises:
            ConfigError: the file cannot be read.
        """
        path = Path(config.path).absolute()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"alignment.rewards: python: {config.function}: {path} cannot be read ({error}). The path starts at "
                "the working directory."
            ) from error
        return cls(path=str(path), name=config.function_name, text=text)


@dataclass(frozen=True, kw_only=True)
class FunctionSpec:
    """A function, and how it is called."""

    name: str
    """Of the source."""
    function: UserFunction | MathAnswers
    deadline_s: float
    batch_size: int


def python_spec(name: str, config: PythonReward) -> FunctionSpec:
    function = UserFunction.read(config)
    return FunctionSpec(name=name, function=function, deadline_s=config.deadline_s, batch_size=config.batch_size)


def math_spec(name: str, config: MathAnswer) -> FunctionSpec:
    """Raises ConfigError where the library is missing."""
    require_math_verify()
    function = MathAnswers(column=config.column, after=config.after)
    return FunctionSpec(name=name, function=function, deadline_s=config.deadline_s, batch_size=config.batch_size)
