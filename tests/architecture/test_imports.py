"""Imports point down: jobs -> actors -> cluster -> pipeline, and down the floors of pipeline."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FLOORS = [
    {"jobs"},
    {"actors"},
    {"cluster"},
    {"pipeline.experiments"},
    {"pipeline.loops", "pipeline.serving"},
    {"pipeline.learning", "pipeline.data", "pipeline.benchmark", "pipeline.stages"},
    {"pipeline.models", "pipeline.objectives"},
    {"pipeline.records", "pipeline.ports", "pipeline.errors", "pipeline.config"},
]
"""Top to bottom; a room imports from its own floor or a lower one."""

HEAVY = {"torch", "transformers", "ray", "deepspeed", "vllm"}

ONLY_IN = {
    "deepspeed": {"actors/deepspeed_engine.py"},
    "vllm": {
        "actors/engine_weights.py",
        "actors/vllm_engine.py",
        "actors/weight_sender.py",
        "actors/weight_transfer.py",
    },
}

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("pipeline", "actors", "cluster", "jobs")
    for path in (ROOT / package).rglob("*.py")
)


def imports(source, *, deferred=True):
    """Modules a file imports; without `deferred`, only those that importing the file itself loads."""
    nodes = [ast.parse((ROOT / source).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            yield str(node.module)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if deferred or not (typing_only or in_function):
            nodes += ast.iter_child_nodes(node)


def floor(module):
    """The floor a module stands on, None for other people's."""
    parts = module.split(".")
    room = ".".join(parts[:2]) if parts[0] == "pipeline" else parts[0]
    return next((n for n, rooms in enumerate(FLOORS) if room in rooms), None)


def test_every_file_stands_on_a_floor():
    modules = [source.removesuffix(".py").replace("/", ".") for source in SOURCES]
    homeless = [m for m in modules if floor(m) is None and not m.endswith("__init__")]
    assert homeless == []
    assert len(SOURCES) > 50


@pytest.mark.parametrize("source", SOURCES)
def test_imports_point_down(source):
    here = floor(source.removesuffix(".py").replace("/", "."))
    upward = [m for m in imports(source) if (there := floor(m)) is not None and here is not None and there < here]
    assert upward == []


@pytest.mark.parametrize("source", SOURCES)
def test_pipeline_knows_neither_ray_nor_engines_and_cluster_knows_no_torch(source):
    found = {module.split(".")[0] for module in imports(source)}
    forbidden = {"pipeline": {"ray", "deepspeed", "vllm"}, "cluster": {"torch", "transformers", "deepspeed", "vllm"}}
    assert found & forbidden.get(source.split("/")[0], set()) == set()


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_an_engine_library_is_imported_by_its_adapter_alone(library):
    users = {source for source in SOURCES if library in {module.split(".")[0] for module in imports(source)}}
    assert users == ONLY_IN[library]


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith(("actors/", "jobs/"))])
def test_a_head_node_imports_no_engine(source):
    """Engines are imported inside the worker, so that a machine without them can submit and report."""
    adapters = {source.removesuffix(".py").replace("/", ".") for source in ONLY_IN["deepspeed"] | ONLY_IN["vllm"]}
    if source.removesuffix(".py").replace("/", ".") in adapters:
        return
    assert set(imports(source, deferred=False)) & (adapters | set(ONLY_IN)) == set()


def test_init_files_are_empty():
    assert [s for s in SOURCES if s.endswith("__init__.py") and (ROOT / s).read_text()] == []


def test_importing_the_light_modules_loads_nothing_heavy():
    modules = (
        "pipeline.config.schema",
        "pipeline.config.load",
        "pipeline.data.source",
        "pipeline.serving.client",
        "pipeline.serving.trl_reward",
        "pipeline.stages.workspace",
        "cluster.resources",
        "cluster.submission",
        "actors.rollout_worker",
        "jobs.command_line",
        "jobs.evaluate_reward_model",
        "jobs.experiments",
        "jobs.full_pipeline",
        "jobs.judge_benchmark",
        "jobs.score_benchmark",
        "jobs.pac_bayes",
        "jobs.status",
    )
    code = (
        f"import importlib, sys\nfor module in {modules}:\n"
        f"    importlib.import_module(module); print(module, *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.splitlines() == [*modules]
