"""Processes find compiled modules. Without them a job's dozen processes compile the same libraries, each up to 25 s."""

import importlib.util
import struct
from pathlib import Path

import pytest

IMPORTED = {
    "torch": ("nn/modules/module.py", "_dynamo/convert_frame.py", "distributed/tensor/_api.py"),
    "transformers": ("modeling_utils.py", "models/auto/modeling_auto.py", "models/qwen3/modeling_qwen3.py"),
    "vllm": (
        "entrypoints/llm.py",
        "v1/engine/llm_engine.py",
        "v1/core/sched/scheduler.py",
        "model_executor/models/qwen3.py",
    ),
    "deepspeed": ("runtime/engine.py", "runtime/zero/stage3.py"),
    "ray": ("_private/worker.py", "serve/api.py", "dashboard/agent.py"),
    "trl": ("trainer/grpo_trainer.py",),
    "sympy": (),
    "sklearn": (),
}
"""By package, files that a process imports; beside the `__init__.py` of each."""


def is_compiled(source):
    """Whether Python will take the bytecode it has of this file."""
    bytecode = Path(importlib.util.cache_from_source(source))
    if not bytecode.exists():
        return False
    flags, modified, size = struct.unpack("<4xIII", bytecode.read_bytes()[:16])
    now = source.stat()
    # Flags say that a hash of the source stands in place of its time and size; Python compares the hash itself.
    return flags != 0 or (modified, size) == (int(now.st_mtime) & 0xFFFFFFFF, now.st_size & 0xFFFFFFFF)


@pytest.mark.parametrize("package", IMPORTED)
def test_the_environment_holds_the_bytecode_of_what_processes_import(package):
    root = Path(importlib.util.find_spec(package).origin)
    sources = [root, *(root.parent / name for name in IMPORTED[package])]
    missing = [str(source) for source in sources if not is_compiled(source)]
    assert not missing, (
        f"no bytecode of {', '.join(missing)}, so every process compiles it anew. "
        "Run `bash install/install.sh`, which writes it, also where PYTHONDONTWRITEBYTECODE is set."
    )
