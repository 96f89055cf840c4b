"""What processors can do: the numbers that a roofline is drawn from."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.config.cluster import CPU, GPU_NAMES
from pipeline.errors import ConfigError
from pipeline.models.native_dtype import CPU_INFO, multiplies_bfloat16

NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""The driver's description of each GPU, readable without nvidia-smi."""

PROBE_SIZE, PROBE_BYTES, PROBES = 512, 2**25, 4
"""The product and the copy that measure a CPU: 30 ms of one core in all."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU; or one core of a CPU, whose memory and links the node's cores share."""

    name: str
    flops_per_s: Mapping[str, float]
    """Peak of dense matrix products, by dtype of the operands."""
    memory_bytes_per_s: float
    """Of its own memory; of a CPU what one core reads and writes."""
    memory_bytes: float | None
    """None: the host's."""
    link_bytes_per_s: float
    """Between two of them in a node, in one direction."""
    host_link_bytes_per_s: float
    """Between it and the host's memory, in one direction."""
    source: str
    training_share: float = 0.45
    """Share of the peak that forward and backward passes reach. Llama 3 reports 38% to 43% on 8,192 to 16,384 H100
    (arXiv 2407.21783, Table 4); a single node has less to wait for."""
    decoding_share: float = 0.4
    """The same in decoding, whose products are narrow."""
    bandwidth_share: float = 0.7
    """Share of the bandwidth of memory and links that kernels reach."""


ACCELERATORS: Mapping[str, Accelerator] = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator(
            name="h200",
            flops_per_s={"bfloat16": 989e12, "float32": 67e12},
            memory_bytes_per_s=4.8e12,
            memory_bytes=141e9,
            link_bytes_per_s=450e9,
            host_link_bytes_per_s=64e9,
            source="NVIDIA H200 data sheet, SXM, without sparsity",
        ),
        Accelerator(
            name="h100",
            flops_per_s={"bfloat16": 989e12, "float32": 67e12},
            memory_bytes_per_s=3.35e12,
            memory_bytes=80e9,
            link_bytes_per_s=450e9,
            host_link_bytes_per_s=64e9,
            source="NVIDIA H100 data sheet, SXM, without sparsity",
        ),
        Accelerator(
            name="a100",
            flops_per_s={"bfloat16": 312e12, "float32": 19.5e12},
            memory_bytes_per_s=2.04e12,
            memory_bytes=80e9,
            link_bytes_per_s=300e9,
            host_link_bytes_per_s=32e9,
            source="NVIDIA A100 80GB data sheet, SXM, without sparsity or TF32",
        ),
        Accelerator(
            name="l40s",
            flops_per_s={"bfloat16": 362e12, "float32": 91.6e12},
            memory_bytes_per_s=0.864e12,
            memory_bytes=48e9,
            link_bytes_per_s=32e9,
            host_link_bytes_per_s=32e9,
            source="NVIDIA L40S data sheet, without sparsity; no NVLink",
        ),
    )
}
"""By the name that `cluster.accelerator` takes."""

NETWORK_BYTES_PER_S = 400e9
"""Between two nodes of eight GPUs: 400 Gbit/s a GPU, as in DGX H100 and most cloud nodes of its kind. A ring of ranks
enters and leaves a node by all of its cards."""

HOST_BYTES_PER_S_PER_CORE = 8e9
"""What one core of a server reads and writes when all cores do: some 400 GB/s of two sockets over their cores."""


@cache
def this_cpu() -> Accelerator:
    """One core of this machine, measured: a product of two matrices and a copy, by processor time.

    A bfloat16 product does twice the work of a float32 one where the processor has an instruction for it
    (VDPBF16PS multiplies pairs), and a tenth where it has none (measured, docs/LOG.md).
    """
    import numpy as np

    rng = np.random.default_rng(0)
    a = rng.random((PROBE_SIZE, PROBE_SIZE), dtype=np.float32)
    source = np.ones(PROBE_BYTES, dtype=np.uint8)
    target = source.copy()
    float32 = 2 * PROBE_SIZE**3 / _best_of(lambda: a @ a)
    bandwidth = 2 * PROBE_BYTES / _best_of(lambda: np.copyto(target, source))
    native = multiplies_bfloat16(CPU_INFO.read_text()) if CPU_INFO.exists() else False
    return Accelerator(
        name=CPU,
        flops_per_s={"float32": float32, "bfloat16": float32 * (2.0 if native else 0.1)},
        memory_bytes_per_s=bandwidth,
        memory_bytes=None,
        link_bytes_per_s=bandwidth / 4,  # gloo copies into and out of a socket
        host_link_bytes_per_s=bandwidth,
        source="measured on one core of this machine",
        training_share=0.6,
        decoding_share=0.3,
        bandwidth_share=0.8,
    )


def _best_of(work) -> float:  # type: ignore[no-untyped-def]
    """Seconds of processor time of the fastest of a few runs, after one to warm up."""
    best = float("inf")
    for _ in range(1 + PROBES):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return best


def known_accelerator(name: str) -> Accelerator:
    """
    Raises:
        ConfigError: nobody knows it.
    """
    if name not in ACCELERATORS:
        raise ConfigError(
            f"cluster.accelerator = {name}: the plan knows no such accelerator. Known are {', '.join(GPU_NAMES)} and "
            f"{CPU}; auto takes what this machine has."
        )
    return ACCELERATORS[name]


def accelerator_in(words: str) -> str | None:
    """The name of the accelerator that a driver or Ray describes, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    parts = re.findall(r"[a-z]+[0-9]+[a-z]?", words.lower())
    return next((name for name in GPU_NAMES if name in parts), None)


def gpus_of_this_machine() -> tuple[str, ...]:
    """How the driver describes each GPU; empty without one."""
    if not NVIDIA_GPUS.is_dir():
        return ()
    texts = [(NVIDIA_GPUS / entry / "information").read_text() for entry in sorted(os.listdir(NVIDIA_GPUS))]
    models = [re.search(r"^Model:\s*(.+)$", text, re.MULTILINE) for text in texts]
    return tuple(model[1].strip() for model in models if model)


def host_memory_bytes() -> float:
    """Of this machine: what a container may take, else all of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    written = limit.read_text().strip() if limit.is_file() else "max"
    return float(total if written == "max" else min(total, int(written)))
