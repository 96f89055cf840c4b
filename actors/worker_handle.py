"""How a rollout worker's Ray actor is started, and what the driver holds of it afterwards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.rollout_worker import RolloutWorker
from cluster.engine_build import ResolvedRolloutConfig
from cluster.placement import Placement
from cluster.rollout_plan import THROUGH_FILES, RolloutPlan
from cluster.running_jobs import actor_name


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What every engine is started with, beside `cluster.rollout`."""

    model_uri: str
    """Config and tokenizer files; weights there are not read. Every node must reach it."""
    dtype: str
    max_model_len: int
    """Tokens of prompt and response together."""
    gate_tolerance: float
    """Largest mean absolute logprob difference to the learner, nats."""
    seed: int
    plan: RolloutPlan = THROUGH_FILES
    """How weights reach the engines beside a published file, and whether the engines sleep."""


@dataclass(frozen=True, kw_only=True)
class WorkerActors:
    """Which Ray actors hold the engines."""

    worker: type = RolloutWorker
    """What runs in each Ray actor."""
    placement: Placement | None = None
    """Bundles that the workers share with the learner, one each; None asks the cluster for room."""
    workspace: str | None = None
    """The job's, which the actors' names carry (`cluster/running_jobs.py`); None leaves the actors nameless."""

    @property
    def most(self) -> int | None:
        """How many workers there can be: one a bundle; None where the cluster sets the limit."""
        return None if self.placement is None else self.placement.num_bundles


UNSHARED_ACTORS = WorkerActors()
"""Rollout workers that ask the cluster for room of their own, and have no names."""


@dataclass(frozen=True, kw_only=True)
class WorkerHandle:
    """The driver's hold on one rollout worker."""

    name: str
    actor: Any
    started: Any
    """Reference that resolves when the engine is up, or raises why it is not."""
    bundle: int | None = None
    """Bundle of the placement that the worker shares with a rank of the learner."""
    requested_at: float = field(default_factory=time.monotonic)

    @property
    def has_started(self) -> bool:
        """The engine is up, or has failed to start. Does not wait."""
        ready, _ = ray.wait([self.started], timeout=0)
        return bool(ready)

    def end(self) -> None:
        """Kills the process; a dead one stays dead."""
        ray.kill(self.actor, no_restart=True)


def start_worker(
    name: str, bundle: int | None, engine: EngineSettings, config: ResolvedRolloutConfig, actors: WorkerActors
) -> WorkerHandle:
    """Asks Ray for a worker and returns at once; `WorkerHandle.started` tells when its engine is up.

    Args:
        bundle: the bundle of `actors.placement` that the worker gets; None without a placement.
    """
    place: dict[str, Any] = {"num_gpus": config.gpus_per_worker, "scheduling_strategy": "DEFAULT"}
    if actors.placement is not None and bundle is not None:
        place = {
            "num_gpus": config.gpus_per_worker / actors.placement.tenants,
            "scheduling_strategy": actors.placement.strategy(bundle),
        }
    actor: Any = (
        ray.remote(actors.worker)
        .options(
            num_cpus=config.cpus_per_worker,
            runtime_env={"env_vars": engine_environment(config)},
            name=None if actors.workspace is None else actor_name(name, actors.workspace),
            **place,
        )
        .remote(name)
    )
    started = actor.start.remote(engine.model_uri, config, engine.plan, engine.dtype, engine.max_model_len, engine.seed)
    return WorkerHandle(name=name, actor=actor, started=started, bundle=bundle)


def engine_environment(config: ResolvedRolloutConfig) -> dict[str, str]:
    """Environment variables of a worker's process."""
    environment = {
        # New weights come as large tensors in fresh memory: a huge page is one fault for 2 MiB instead of 512.
        # glibc before 2.35 takes no notice.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        # The engine in the actor's own process: seconds to start instead of minutes.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Triton's attention, which vLLM takes for float32, would otherwise round to 10 bits: TF32.
        "TRITON_F32_DEFAULT": "ieee",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.gpus_per_worker == 0:
        threads = config.threads_per_worker or max(1, int(config.cpus_per_worker))
        environment |= {"OMP_NUM_THREADS": str(max(1, threads // config.shards)), "CUDA_VISIBLE_DEVICES": ""}
    if config.shards > 1:
        # vLLM would bind the shards to cores of its own choice, which other workers on the node use too.
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return environment
