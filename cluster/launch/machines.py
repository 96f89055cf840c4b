"""Machines that a recipe may be launched on, by the name of their accelerator."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One node: what Ray may give away there, and how schedulers call it."""

    accelerator: str
    cpus: int
    gpus: int
    memory_gib: int
    """Of the host."""
    kubernetes_product: str = ""
    """Label nvidia.com/gpu.product, as NVIDIA's feature discovery writes it; empty without a GPU."""
    slurm_type: str = ""
    """The type in --gpus-per-node=TYPE:COUNT, as most sites call it; empty without a GPU."""

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus), "GPU": float(self.gpus)}

    def __str__(self) -> str:
        gpus = f"{self.gpus} {self.accelerator.upper()}, " if self.gpus else ""
        return f"{gpus}{self.cpus} CPU, {self.memory_gib} GiB"


MACHINES = {
    machine.accelerator: machine
    for machine in (
        Machine(
            accelerator="h200",
            cpus=88,
            gpus=8,
            memory_gib=1400,
            kubernetes_product="NVIDIA-H200",
            slurm_type="h200",
        ),
        Machine(
            accelerator="h100",
            cpus=88,
            gpus=8,
            memory_gib=900,
            kubernetes_product="NVIDIA-H100-80GB-HBM3",
            slurm_type="h100",
        ),
        Machine(
            accelerator="a100",
            cpus=88,
            gpus=8,
            memory_gib=900,
            kubernetes_product="NVIDIA-A100-SXM4-80GB",
            slurm_type="a100",
        ),
        Machine(
            accelerator="l40s",
            cpus=88,
            gpus=8,
            memory_gib=450,
            kubernetes_product="NVIDIA-L40S",
            slurm_type="l40s",
        ),
        Machine(accelerator="cpu", cpus=16, gpus=0, memory_gib=64),
    )
}
"""What a job gets of a usual machine, which keeps a tenth for itself; the command line may say otherwise."""


def machine(
    accelerator: str, *, cpus: int | None = None, gpus: int | None = None, memory_gib: int | None = None
) -> Machine:
    """The machine of that name, with other numbers where they are given.

    Raises:
        ConfigError: nobody knows the accelerator, or a number makes no sense for it.
    """
    name = accelerator.lower()
    if name not in MACHINES:
        near = difflib.get_close_matches(name, MACHINES, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--accelerator {accelerator} is unknown.{guess} Known are {', '.join(MACHINES)}.")
    known = MACHINES[name]
    if gpus and not known.gpus:
        raise ConfigError(f"--gpus-per-node {gpus} with --accelerator {name}: name the GPU instead.")
    if gpus == 0 and known.gpus:
        raise ConfigError(f"--gpus-per-node 0 with --accelerator {name}: write --accelerator cpu.")
    return replace(
        known,
        cpus=known.cpus if cpus is None else cpus,
        gpus=known.gpus if gpus is None else gpus,
        memory_gib=known.memory_gib if memory_gib is None else memory_gib,
    )
