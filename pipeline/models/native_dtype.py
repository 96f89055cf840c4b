"""Which dtype a recipe's "auto" is on this machine.

A CPU without bfloat16 instructions multiplies bfloat16 some ten times slower than float32: minutes become an hour.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pipeline.config.recipe import ExperimentConfig

Experiment = TypeVar("Experiment", bound=ExperimentConfig)

CPU_INFO = Path("/proc/cpuinfo")

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of x86 with AVX-512, of x86 with AMX, and of Arm, as the Linux kernel names them."""


def multiplies_bfloat16(cpu_info: str) -> bool:
    """Whether the processor that `cpu_info` describes has instructions for bfloat16 products.

    Args:
        cpu_info: the text of /proc/cpuinfo.
    """
    lines = (line.partition(":") for line in cpu_info.splitlines())
    flags = {flag for name, _, flags in lines if name.strip() in ("flags", "Features") for flag in flags.split()}
    return not flags.isdisjoint(BFLOAT16_FLAGS)


def with_native_dtype(experiment: Experiment) -> Experiment:
    """The experiment with `reward.backbone_dtype: auto` replaced by what this processor multiplies natively.

    The job asks once, before it computes an identity or starts a rank, so all ranks train in one dtype.
    """
    if experiment.reward.backbone_dtype != "auto":
        return experiment
    cpu_info = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    dtype = "bfloat16" if multiplies_bfloat16(cpu_info) else "float32"
    return experiment.model_copy(update={"reward": experiment.reward.model_copy(update={"backbone_dtype": dtype})})
