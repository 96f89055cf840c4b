"""Reward models that give their reasons, in Python.

    import vrm

    reward = vrm.load_reward_model("runs/tiny")
    print(reward.score("Plan my week.", ["First list what is fixed. Then fill the gaps.", "No."]))

Importing this package loads nothing: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vrm.own_packages import find_own_packages_first

if TYPE_CHECKING:
    from pipeline.reporting.hub import push_reward_model
    from pipeline.serving.client import AsyncClient, Client
    from pipeline.serving.protocol import CompareAnswer, ExplainedReward
    from vrm.reward_model import TrainedRewardModel, compare, load_reward_model
    from vrm.score_table import ScoreTable
    from vrm.training import train_reward_model

__all__ = [
    "AsyncClient",
    "Client",
    "CompareAnswer",
    "ExplainedReward",
    "ScoreTable",
    "TrainedRewardModel",
    "compare",
    "load_reward_model",
    "push_reward_model",
    "train_reward_model",
]

_FILES = {
    "AsyncClient": "pipeline.serving.client",
    "Client": "pipeline.serving.client",
    "CompareAnswer": "pipeline.serving.protocol",
    "ExplainedReward": "pipeline.serving.protocol",
    "ScoreTable": "vrm.score_table",
    "TrainedRewardModel": "vrm.reward_model",
    "compare": "vrm.reward_model",
    "load_reward_model": "vrm.reward_model",
    "push_reward_model": "pipeline.reporting.hub",
    "train_reward_model": "vrm.training",
}
"""Public name -> the file that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'vrm' has no attribute {name!r}. It has {', '.join(__all__)}.")
    find_own_packages_first()
    return getattr(import_module(_FILES[name]), name)


def __dir__() -> list[str]:
    return __all__
