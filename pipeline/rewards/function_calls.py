"""Calls a function that scores, and reads what it returns. Runs in the process that is the function's own."""

from __future__ import annotations

import asyncio
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import ConfigError
from pipeline.rewards.function_spec import FunctionSpec, UserFunction
from pipeline.rewards.math_answers import MathAnswers
from pipeline.rewards.rows import FailureKind, NoScore, RewardRows, SourceScore, plain_score

BATCH, SINGLE = ("prompts", "responses", "columns"), ("prompt", "response", "columns")
SIGNATURES = "function(prompts, responses, columns) for a batch, or function(prompt, response, columns) for one row"


class LoadedFunction:
    """A function in this process."""

    def __init__(self, spec: FunctionSpec) -> None:
        """
        Raises:
            ConfigError: the function cannot be imported, or takes other arguments.
        """
        self.spec = spec
        self._function = load_function(spec.function)
        self._is_single = tuple(inspect.signature(self._function).parameters) == SINGLE

    def score(self, rows: RewardRows) -> list[SourceScore]:
        """One batch. What the function raises or gets wrong becomes a failure of its rows."""
        prompts = [[dict(message) for message in prompt] for prompt in rows.prompts]
        if self._is_single:
            return self._one_by_one(prompts, rows)
        names = dict.fromkeys(name for row in rows.columns for name in row)
        columns = {name: [row.get(name) for row in rows.columns] for name in names}
        try:
            answer = _awaited(self._function(prompts, list(rows.responses), columns))
        except Exception as error:  # whatever a user's function raises is a failure of its rows
            return [_raised(error)] * len(rows)
        return batch_scores(answer, len(rows))

    def _one_by_one(self, prompts: list[list[dict[str, str]]], rows: RewardRows) -> list[SourceScore]:
        """Rows fail one at a time; the calls of a coroutine function run at once."""
        calls = [
            (self._function, (prompt, response, dict(columns)))
            for prompt, response, columns in zip(prompts, rows.responses, rows.columns, strict=True)
        ]
        if inspect.iscoroutinefunction(self._function):
            answers = asyncio.run(_at_once(calls))
        else:
            answers = [_outcome(function, arguments) for function, arguments in calls]
        return [_raised(a) if isinstance(a, Exception) else row_score(a) for a in answers]


def load_function(function: UserFunction | MathAnswers) -> Callable[..., Any]:
    """The function of a user's file, or the built-in one.

    Raises:
        ConfigError: the file cannot be run, has no such function, or its arguments are others.
    """
    if isinstance(function, MathAnswers):
        return function
    place = f"alignment.rewards: python: {function.path}:{function.name}"
    module = ModuleType(f"reward_{Path(function.path).stem}")
    module.__file__ = function.path
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    beside = str(Path(function.path).parent)
    if beside not in sys.path:
        sys.path.insert(0, beside)
    try:
        exec(compile(function.text, function.path, "exec"), module.__dict__)
    except Exception as error:  # whatever the user's file raises while it is imported
        raise ConfigError(f"{place} cannot be imported: {_last_lines(error)}") from error
    found = module.__dict__.get(function.name)
    if not callable(found):
        there = ", ".join(sorted(name for name, value in vars(module).items() if inspect.isfunction(value)))
        raise ConfigError(f"{place}: there is no such function; the file has {there or 'none'}.")
    names = tuple(inspect.signature(found).parameters)
    if names not in (BATCH, SINGLE):
        raise ConfigError(f"{place} takes ({', '.join(names)}); write {SIGNATURES}.")
    return found


def batch_scores(answer: Any, count: int) -> list[SourceScore]:
    """The scores of a batch: a sequence of numbers, or a pair of such sequences, scores and standard deviations."""
    if isinstance(answer, tuple) and len(answer) == 2 and all(_is_sequence(part) for part in answer):
        means, stds = ([*part] for part in answer)
    elif _is_sequence(answer):
        means = [*answer]
        stds = [0.0] * len(means)
    else:
        return [NoScore(kind="not_a_number", reason=f"{answer!r:.80} is no list of scores")] * count
    if not len(means) == len(stds) == count:
        lengths = f"{len(means)} scores and {len(stds)} standard deviations for {count} responses"
        return [NoScore(kind="wrong_length", reason=lengths)] * count
    return [_as_score(mean, std) for mean, std in zip(means, stds, strict=True)]


def row_score(answer: Any) -> SourceScore:
    """The score of one row: a number, or a pair of score and standard deviation."""
    mean, std = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, 0.0)
    return _as_score(mean, std)


def failed(rows: RewardRows, kind: FailureKind, reason: str) -> list[SourceScore]:
    """The same failure for every row of a batch."""
    return [NoScore(kind=kind, reason=reason)] * len(rows)


def _is_sequence(value: Any) -> bool:
    """A list, a tuple, or an array or tensor with a dimension; no text and no mapping."""
    if isinstance(value, str | bytes | Mapping) or getattr(value, "ndim", 1) == 0:
        return False
    return isinstance(value, Sequence) or hasattr(value, "__len__")


def _as_score(mean: Any, std: Any) -> SourceScore:
    try:
        return plain_score(float(mean), float(std))
    except (TypeError, ValueError):
        return NoScore(kind="not_a_number", reason=f"{mean!r:.80} is no number")


def _awaited(answer: Any) -> Any:
    async def wait() -> Any:
        return await answer

    return asyncio.run(wait()) if inspect.isawaitable(answer) else answer


def _outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # as above
        return error


async def _at_once(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    return await asyncio.gather(*(function(*arguments) for function, arguments in calls), return_exceptions=True)


def _raised(error: Exception) -> NoScore:
    return NoScore(kind="exception", reason=_last_lines(error))


def _last_lines(error: BaseException) -> str:
    """The error with the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
