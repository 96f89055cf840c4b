"""Imports what this project's processes import, so that Python writes the bytecode of it beside the packages.

uv writes no bytecode, and many images set PYTHONDONTWRITEBYTECODE: every process that Ray starts would compile torch,
transformers and vLLM anew. An import compiles a third of the installed source, which is what a job and the tests need.

    env -u PYTHONDONTWRITEBYTECODE .venv/bin/python install/compile_bytecode.py cpu
"""

from __future__ import annotations

import compileall
import importlib
import pkgutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

REQUIRED = ("deepspeed", "ray", "torch", "transformers", "vllm")
"""What does not import here breaks the installation."""

ENGINE = (
    "vllm.v1.core.sched.scheduler",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.entrypoints.openai.api_server",
)
"""What an engine imports when it starts, beside the worker of its device."""

LEARNER = ("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3", "tensorboardX")

CLUSTER = ("ray.serve", "ray.train", "ray.dashboard.dashboard", "ray.scripts.scripts")

TESTS = ("datasets", "pytest", "trl.trainer.grpo_trainer", "trl.trainer.reward_trainer")

FOLDERS = (
    *(f"ray/{name}" for name in ("_private", "autoscaler", "core", "dashboard", "serve", "util")),
    *("anyio", "compressed_tensors", "deepspeed", "httptools", "opencensus", "uvicorn", "websockets"),
)
"""Of which files are imported by name, when a process needs them: these are compiled whole."""


def own_modules() -> Iterator[str]:
    """Every module of this project: each imports at its top what its process needs."""
    for name in ("pipeline", "cluster", "actors", "jobs", "vrm"):
        package = importlib.import_module(name)
        yield from (module.name for module in pkgutil.walk_packages(package.__path__, f"{name}."))


def main(accelerator: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    missing = {}
    with redirect_stdout(sys.stderr):  # some packages greet whoever imports them
        for name in REQUIRED:
            importlib.import_module(name)
        worker = "vllm.v1.worker.cpu_worker" if accelerator == "cpu" else "vllm.v1.worker.gpu_worker"
        for name in (*own_modules(), worker, *ENGINE, *LEARNER, *CLUSTER, *TESTS):
            try:
                importlib.import_module(name)
            except Exception as error:  # an import may raise anything, and a node without its GPU can be installed
                missing[name] = error
    for name, error in missing.items():
        print(f"install: no bytecode of {name}, which does not import here: {error!r}")
    for folder in FOLDERS:
        compileall.compile_dir(Path(sysconfig.get_path("purelib"), folder), quiet=2)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1])
