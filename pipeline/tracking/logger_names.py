"""The loggers that a recipe can name, and what each needs before a run starts. Imports none of them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoggerNeeds:
    """What a logger needs."""

    module: str
    requirement: str
    """For pip; the extra of the same name in pyproject.toml."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variable that must be set -> what to set it to."""


LOGGERS = {
    "tensorboard": LoggerNeeds(module="tensorboardX", requirement="tensorboardX"),
    "wandb": LoggerNeeds(module="wandb", requirement="wandb>=0.31,<0.32"),
    "mlflow": LoggerNeeds(
        module="mlflow",
        requirement="mlflow-skinny>=3.17,<4",
        # Its default is a file in the working directory, and that of a submitted job is thrown away.
        variables={"MLFLOW_TRACKING_URI": "the address of a tracking server, as in http://127.0.0.1:5000"},
    ),
    "trackio": LoggerNeeds(module="trackio", requirement="trackio>=0.43,<0.44"),
}


def require_loggers(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        ConfigError: a logger is not installed, or lacks a setting.
    """
    for name in names:
        needs = LOGGERS[name]
        if importlib.util.find_spec(needs.module) is None:
            raise ConfigError(
                f"logging names {name!r}, which is not installed. Install it with "
                f'{sys.executable} -m pip install "{needs.requirement}", or leave it out of logging.'
            )
        for variable, value in needs.variables.items():
            if not environment.get(variable):
                raise ConfigError(
                    f"logging names {name!r}, but {variable} is not set. Set it to {value}, or leave {name} out of "
                    "logging."
                )
