"""Looks at every reward of a recipe before anything starts. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from pipeline.benchmark.judges.judging_account import read_price
from pipeline.config.rewards import JudgeReward, ModelReward, PythonReward, RewardSourceConfig
from pipeline.errors import ConfigError, DataError, PipelineError, WorkerError
from pipeline.models.reward_model_card import read_card
from pipeline.records import Message, Prompt, Rollout
from pipeline.rewards.endpoints import Endpoint
from pipeline.rewards.function_spec import UserFunction
from pipeline.rewards.judge_reward import api_key, template_of
from pipeline.rewards.math_answers import require_math_verify
from pipeline.rewards.rows import NoScore, RewardRows
from pipeline.serving.client import VRMScorer
from pipeline.stages import storage

IMPORT_S = 300.0
"""A user's file may import torch."""
ANSWER_S = 20.0
"""How long an endpoint may take for the one question of the preflight."""
QUESTION: tuple[Message, ...] = ({"role": "user", "content": "What is 2 + 2?"},)


def check_rewards(rewards: Sequence[RewardSourceConfig]) -> list[str]:
    """What was looked at, in words.

    Raises:
        ConfigError, DataError, CheckpointError, WorkerError: a reward cannot be used; names it, and the cure.
    """
    seen = []
    for source in rewards:
        if source.model is not None and not (source.model.is_of_this_run or source.model.is_served):
            check_model(source.name, source.model)
        elif source.python is not None:
            check_function(source.python)
        elif source.math is not None:
            require_math_verify()
        elif source.judge is not None:
            check_judge(source.name, source.judge)
        else:
            continue
        seen.append(f"reward {source.name}")
    return seen


def check_function(config: PythonReward) -> None:
    """Imports the function in a process of its own: what its file does at import stays there.

    Raises:
        ConfigError: the file cannot be read or run, has no such function, or its arguments are others.
    """
    function = UserFunction.read(config)
    command = [sys.executable, "-m", "pipeline.rewards.import_function", function.path, function.name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=IMPORT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"alignment.rewards: python: {config.function} was not imported within {IMPORT_S:g} s. What does its file "
            "do at import?"
        ) from error
    if done.returncode:
        raise ConfigError((done.stderr.strip().splitlines() or [f"{config.function} ended its process"])[-1])


def check_model(name: str, config: ModelReward) -> None:
    """Reads the card of a checkpoint, or asks an endpoint one question."""
    if config.is_checkpoint:
        if storage.is_local(config.place):
            _require_objectives(name, config, read_card(storage.local_path(config.place)).objectives)
        return
    quickly = config.model_copy(update={"deadline_s": min(ANSWER_S, config.deadline_s)})
    try:
        if config.form == "vrm":
            with VRMScorer(quickly.place, deadline_s=quickly.deadline_s) as client:
                objectives = client.model().objectives
            _require_objectives(name, config, objectives)
            return
        endpoint = Endpoint(quickly)
        [answer] = endpoint.score(one_row())
        endpoint.close()
    except (WorkerError, DataError) as error:
        raise _no_answer(name, config.place, str(error)) from error
    if isinstance(answer, NoScore):
        raise _no_answer(name, config.place, answer.reason)


def check_judge(name: str, config: JudgeReward) -> None:
    """Reads template, prices and key, and opens a connection. No judgment is asked for: it may cost money."""
    template_of(config)
    if config.prices is not None:
        read_price(Path(config.prices), config.model)
    key = api_key(config)
    try:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        httpx.get(f"{config.url.rstrip('/')}/models", headers=headers, timeout=ANSWER_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _no_answer(name, config.url, repr(error)) from error


def one_row() -> RewardRows:
    """A question with its answer."""
    answered = Rollout(
        prompt=Prompt(id="preflight", messages=QUESTION, token_ids=(0,)),
        sample_index=0,
        response_ids=(0,),
        response_text="4",
        logprobs=(0.0,),
        policy_version=0,
        finish_reason="stop",
    )
    return RewardRows.of([answered], {})


def _require_objectives(name: str, config: ModelReward, objectives: Sequence[str]) -> None:
    unknown = sorted(config.weights.keys() - {*objectives})
    if unknown:
        raise ConfigError(
            f"alignment.rewards: {name!r} re-weighs {unknown[0]!r}, which is no objective of {config.place}; its "
            f"objectives are {', '.join(objectives)}"
        )


def _no_answer(name: str, place: str, reason: str) -> PipelineError:
    return WorkerError(
        f"alignment.rewards: {name!r}: {place} gives no usable answer: {reason} Start the endpoint, or correct its URL "
        "and form."
    )
