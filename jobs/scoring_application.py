"""The scoring service for Serve's own command line, on a cluster that runs already.

    export VRM_SERVICE_TOKEN=...                 # before `ray start`: the cluster's processes inherit it
    serve deploy jobs/services/scoring.yaml
    serve run jobs.scoring_application:build model=DIR
    VRM_MODEL=DIR serve build jobs.scoring_application:application -o built.yaml

Deployed again with another `model`, the service replaces it without a failed request. One replica with the new
checkpoint starts, then one with the old checkpoint ends, and so on. A checkpoint that does not load never answers;
`serve status` says why, and the old replicas continue to answer.

`serve build` writes down the options of the deployment, but not its model. Set VRM_MODEL on the cluster too, or in
`runtime_env: {env_vars: {VRM_MODEL: ...}}` of the file that it wrote. A service of that file listens on all interfaces.
"""

# No `from __future__ import annotations` here: Serve takes the type of the arguments from the annotation itself.

import os
from typing import Any

from ray.serve.deployment import Application

from actors.reward_service import scoring_application
from pipeline.config.base import Frozen, Positive
from pipeline.config.cluster import ScoringConfig
from pipeline.errors import ConfigError
from pipeline.models.reward_model_card import read_card
from pipeline.serving.protocol import TOKEN_VARIABLE
from pipeline.stages import storage

MODEL_VARIABLE = "VRM_MODEL"


class ServiceArguments(Frozen):
    """`args` of the application."""

    model: str
    """Result directory of train_reward_model, or its URI; every node must reach it."""
    scoring: ScoringConfig = ScoringConfig()
    """Its `port` is not looked at: `http_options` of the Serve file says where Serve listens."""
    deadline_s: Positive = 600.0
    without_token: bool = False
    """Answer whoever reaches the port."""


def build(arguments: ServiceArguments) -> Application:
    """The application, for `import_path`.

    Raises:
        ConfigError: VRM_SERVICE_TOKEN is not set, and `without_token` neither.
        CheckpointError: the directory holds no reward model.
    """
    token = None if arguments.without_token else os.environ.get(TOKEN_VARIABLE)
    if not token and not arguments.without_token:
        raise ConfigError(
            f"{TOKEN_VARIABLE} is not set where the application is built, so the service could refuse nobody. "
            "Set it before `ray start`, or in runtime_env.env_vars, or pass without_token: true."
        )
    if storage.is_local(arguments.model):
        read_card(storage.local_path(arguments.model))
    return scoring_application(arguments.model, arguments.scoring, token=token, deadline_s=arguments.deadline_s)


def __getattr__(name: str) -> Any:
    """Makes `application` when it is read. `serve build` takes no arguments, so VRM_MODEL names the model."""
    if name != "application":
        raise AttributeError(name)
    if MODEL_VARIABLE not in os.environ:
        raise ConfigError(f"{MODEL_VARIABLE} is not set. Set it to the result directory of train_reward_model.")
    return build(ServiceArguments(model=os.environ[MODEL_VARIABLE]))
