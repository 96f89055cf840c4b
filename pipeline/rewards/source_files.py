"""The files behind rewards: what they hold is part of the identity of the stage that trains on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config.rewards import RewardSourceConfig
from pipeline.errors import ConfigError


def reward_files(rewards: Sequence[RewardSourceConfig]) -> Iterator[tuple[str, Path]]:
    """(setting, file) of each file of code and each template that the rewards name."""
    for source in rewards:
        if source.python is not None:
            yield f"alignment.rewards: {source.name}: python", Path(source.python.path)
        if source.judge is not None and source.judge.template is not None:
            yield f"alignment.rewards: {source.name}: judge.template", Path(source.judge.template)


def reward_fingerprints(rewards: Sequence[RewardSourceConfig]) -> list[str]:
    """SHA-256 of the content of each file.

    Raises:
        ConfigError: a file cannot be read.
    """
    prints = []
    for setting, path in reward_files(rewards):
        try:
            prints.append(hashlib.sha256(path.read_bytes()).hexdigest())
        except OSError as error:
            raise ConfigError(
                f"{setting} = {path} cannot be read ({error.strerror}). The path starts at the working directory."
            ) from error
    return prints
