"""Imports point down: vrm -> jobs -> actors -> cluster -> pipeline, and down the floors of pipeline."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter

import pytest

from tests.support.paths import ROOT

FLOORS = [
    "vrm",
    "jobs",
    "actors",
    "cluster",
    "pipeline.experiments",
    "pipeline.loops",
    "pipeline.learning",
    "pipeline.reporting",
    "pipeline.rewards",
    "pipeline.benchmark",
    "pipeline.serving",
    "pipeline.evaluation",
    "pipeline.rollouts",
    "pipeline.models",
    "pipeline.data",
    "pipeline.stages",
    "pipeline.tracking",
    "pipeline.objectives",
    "pipeline.config",
    "pipeline.ports",
    "pipeline.columns",
    "pipeline.records",
    "pipeline.repetition",
    "pipeline.ragged",
    "pipeline.errors",
    "vrm.own_packages",
]
"""Top to bottom, one floor a room. A room imports from itself and from the floors below it. `vrm.own_packages` stands
below all: nothing can be imported safely before it has run."""

HEAVY = {"torch", "transformers", "ray", "deepspeed", "vllm"}

ONLY_IN = {
    "deepspeed": {"actors/deepspeed_engine.py"},
    "vllm": {
        "actors/engine_processes.py",
        "actors/engine_weights.py",
        "actors/vllm_engine.py",
        "actors/weight_sender.py",
        "actors/weight_transfer.py",
    },
}

SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("pipeline", "actors", "cluster", "jobs", "vrm")
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


def imported_modules(source):
    """As `imports`, with the file behind `from room import file` named."""
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module):
    """The floor a module stands on, None for other people's."""
    parts = module.split(".")
    room = ".".join(parts[:2]) if ".".join(parts[:2]) in FLOORS else parts[0]
    return FLOORS.index(room) if room in FLOORS else None


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


def test_init_files_are_empty_but_that_of_the_public_package():
    assert [s for s in SOURCES if s.endswith("__init__.py") and (ROOT / s).read_text()] == ["vrm/__init__.py"]


def test_importing_the_light_modules_loads_nothing_heavy():
    modules = (
        "pipeline.config.recipe",
        "pipeline.config.load",
        "pipeline.data.run_data",
        "pipeline.models.checkpoint_files",
        "pipeline.serving.client",
        "pipeline.serving.trl_reward",
        "pipeline.stages.workspace",
        "cluster.engine_build",
        "cluster.planning.plan_text",
        "cluster.resources",
        "cluster.rollout_plan",
        "cluster.submission",
        "actors.rollout_worker",
        "jobs.command_line",
        "jobs.compare_policies",
        "jobs.evaluate_reward_model",
        "jobs.experiments",
        "jobs.full_pipeline",
        "jobs.generate_answers",
        "jobs.judge_benchmark",
        "jobs.score_benchmark",
        "jobs.pac_bayes",
        "jobs.scale_rollouts",
        "jobs.serve_reward_model",
        "jobs.status",
        "jobs.commands",
        "jobs.push_reward_model",
        "vrm",
        "vrm.command_line",
    )
    code = (
        f"import importlib, sys\nfor module in {modules}:\n"
        f"    importlib.import_module(module); print(module, *sorted({HEAVY!r} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.splitlines() == [*modules]


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("pipeline/config/")])
def test_a_recipe_does_not_depend_on_the_machine_that_reads_it(source):
    assert set(imports(source)) & {"importlib.metadata", "multiprocessing", "os", "platform", "psutil", "sys"} == set()


def test_the_jobs_end_in_one_way():
    """Errors become exit codes in one file. A judge that leaves requests unanswered has a code of its own."""
    leaving = {s for s in SOURCES if s.startswith("jobs/") and "sys.exit(" in (ROOT / s).read_text()}
    assert leaving == {"jobs/exit_codes.py", "jobs/judge_benchmark.py"}


def test_no_files_import_each_other_in_a_circle():
    """Deferred and type-only imports count too: a circle hides which file stands below which."""
    modules = {source.removesuffix(".py").replace("/", "."): source for source in SOURCES}
    graph = {
        module: {name for name in imported_modules(source) if name in modules and name != module}
        for module, source in modules.items()
    }
    with_circles = TopologicalSorter(graph)
    with_circles.prepare()  # raises CycleError, which names the circle


def test_no_room_holds_more_than_a_sixth_of_the_lines():
    lines = Counter()
    for source in SOURCES:
        parts = source.split("/")
        lines["/".join(parts[:2]) if parts[0] == "pipeline" else parts[0]] += (ROOT / source).read_text().count("\n")
    total = lines.total()
    assert {room: count for room, count in lines.items() if count > 0.16 * total} == {}
