"""Which processor a script measures on: its figures mean nothing on another."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Instructions that matter to matrix products, as Linux names them."""
LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that forbid the libraries to use some of them."""


def processor() -> str:
    """One line for the head of a table: the processor, its instructions, its cores, and what else it does."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{described(text, os.environ)}; {len(os.sched_getaffinity(0))} cores, load {load}"


def described(cpu_info: str, environment: Mapping[str, str]) -> str:
    """The model and its instructions, with the limits that the environment sets."""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in _lines(cpu_info))}
    model = fields.get("model name") or platform.machine()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    known = [flag for flag in FLAGS if flag in flags]
    limits = [f"{name}={environment[name]}" for name in LIMITS if name in environment]
    return f"{model} ({', '.join([*known, *limits]) or 'no vector instructions named'})"


def _lines(cpu_info: str) -> list[str]:
    """Of the first core."""
    return re.split(r"\n\s*\n", cpu_info, maxsplit=1)[0].splitlines()
