"""The machines that a recipe is planned for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.launch.machines import MACHINES, Machine
from cluster.planning.accelerators import (
    Accelerator,
    accelerator_in,
    gpus_of_this_machine,
    host_memory_bytes,
    known_accelerator,
    this_cpu,
)
from pipeline.config.cluster import GPU_NAMES, ClusterConfig
from pipeline.errors import ConfigError

ASSUMED_GPU = "h100"
THIS_MACHINE = "this machine"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the actors of a recipe run on."""

    gpu: Accelerator | None
    """None for a recipe without GPUs."""
    cpu: Accelerator
    """One core."""
    cores: int
    """Of this machine; actors without a GPU share them."""
    host_bytes: float
    """Memory of one node."""
    gpus_per_node: int
    remark: str
    """Where the numbers come from."""

    def nodes_for(self, gpus: float) -> int:
        """The fewest nodes with so many GPUs; one for a plan without any."""
        return max(1, math.ceil(gpus / self.gpus_per_node)) if self.gpus_per_node else 1


def hardware_for(
    cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]] = (), machine: Machine | None = None
) -> Hardware:
    """The machines that the recipe names; else those of the cluster, or this one; else h100.

    Args:
        nodes: each node's total resources as Ray has them; empty where the cluster is not known yet.
        machine: with GPUs, of a cluster that is only written down so far: it goes before all else.

    Raises:
        ConfigError: the GPU of the machine is unknown, or the plan needs another one.
    """
    cpu = this_cpu()
    if not cluster.needs_gpus:
        return Hardware(
            gpu=None,
            cpu=cpu,
            cores=os.cpu_count() or 1,
            host_bytes=host_memory_bytes(),
            gpus_per_node=0,
            remark=f"CPU, {cpu.flops_per_s['float32'] / 1e9:.0f} GFLOP/s and {cpu.memory_bytes_per_s / 1e9:.0f} GB/s a "
            f"core in float32, {cpu.source}",
        )
    found = "as launched"
    if machine is None:
        name, found = _gpu_name(cluster, nodes)
        machine = MACHINES[name]
        most = max((int(node.get("GPU", 0)) for node in nodes), default=0)
        if most:
            machine = replace(machine, gpus=most)
        elif found == THIS_MACHINE:
            machine = replace(machine, gpus=len(gpus_of_this_machine()), memory_gib=int(host_memory_bytes() / 2**30))
    gpu = known_accelerator(machine.accelerator)
    numbers = (
        f"{gpu.flops_per_s['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16, {gpu.memory_bytes_per_s / 1e12:.2f} TB/s, "
        f"{(gpu.memory_bytes or 0) / 1e9:.0f} GB; {gpu.source}"
    )
    return Hardware(
        gpu=gpu,
        cpu=cpu,
        cores=os.cpu_count() or 1,
        host_bytes=machine.memory_gib * 2**30,
        gpus_per_node=machine.gpus,
        remark=f"{gpu.name} ({found}): {numbers}",
    )


def _gpu_name(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    """The name of the GPU, and who says so."""
    if cluster.accelerator != "auto":
        return cluster.accelerator, "cluster.accelerator"
    described = [key.partition(":")[2] for node in nodes for key in node if key.startswith("accelerator_type:")]
    where = "what Ray found on the cluster"
    if not described:
        described, where = [*gpus_of_this_machine()], THIS_MACHINE
    if not described:
        return ASSUMED_GPU, "assumed; set cluster.accelerator"
    name = accelerator_in(described[0])
    if name is None:
        raise ConfigError(
            f"the plan knows no accelerator {described[0]!r} ({where}). Set cluster.accelerator to the nearest of "
            f"{', '.join(GPU_NAMES)}."
        )
    return name, where
