"""Cells of a comparison as the pipeline's own stages: for models that do not fit in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jobs.align_policy import align_policy
from jobs.command_line import JobOptions
from jobs.generate_benchmark import generate_benchmark
from jobs.sft import sft
from jobs.train_reward_model import train_reward_model
from pipeline.config.recipe import Recipe
from pipeline.errors import PipelineError, Preempted
from pipeline.experiments.grid import Run
from pipeline.experiments.methods import judge_of
from pipeline.records import Metrics, StageResult
from pipeline.stages import storage
from pipeline.stages.runner import StageRunner
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

if TYPE_CHECKING:
    from jobs.open_job import Job


class StagesOfAMethod(StageRunner):
    """Runs stages and remembers where they lie."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.stages.workspace)
        self.directories: list[StageDirectory] = []

    def run(
        self, spec: StageSpec, compute: Callable[[StageDirectory], Metrics], *, max_restarts: int = 0
    ) -> StageResult:
        self.directories.append(self.workspace.stage(spec.name, spec.fingerprint))
        return super().run(spec, compute, max_restarts=max_restarts)


def compute_with_the_pipeline(cells: Sequence[Run], out: str) -> Iterable[tuple[int, dict[str, Any] | PipelineError]]:
    """One cell after the other, all in one workspace: stages that cells share are computed once."""
    from cluster.session import open_cluster

    with open_cluster(cells[0].recipe.cluster, ()):
        for index, cell in enumerate(cells):
            try:
                yield index, _compute(cell.recipe, out)
            except Preempted:
                raise
            except PipelineError as error:
                yield index, error


def _compute(recipe: Recipe, out: str) -> dict[str, Any]:
    from actors.comparison_tasks import measure_everywhere
    from jobs.open_job import open_job
    from pipeline.data.run_data import load_data
    from pipeline.experiments.method_run import CellInputs, cell_result
    from pipeline.experiments.shared_stages import seconds_of

    workspace = storage.join(out, "workspace")
    judge_recipe = judge_of(recipe)
    # First what the cells of a seed share, the judge among it; then the method, with engines and service of its own.
    with open_job(_options(judge_recipe, workspace)) as job:
        policy = sft(job.stages, job.recipe, job.read_data)
        judge = train_reward_model(job.stages, job.recipe, job.read_data, policy)
    with open_job(_options(recipe, workspace)) as job:
        needed = recipe.alignment.needs_reward_model
        reward_model = train_reward_model(job.stages, recipe, job.read_data, policy) if needed else judge
        stages = StagesOfAMethod(job)
        aligned = align_policy(stages, recipe, job.read_data, job.actors, policy, reward_model)
    with open_job(_options(judge_recipe, workspace)) as job:
        answers = generate_benchmark(job.stages, recipe, job.read_data, job.actors, policy, aligned, judge, None)
    inputs = CellInputs(
        policy=policy,
        judge=judge,
        reward_model=reward_model,
        reward_model_seconds=seconds_of(reward_model) if needed else 0.0,
    )
    directory = storage.join(out, f"cells/{aligned.fingerprint[:16]}")
    measured = measure_everywhere(recipe, inputs, aligned, directory)
    return asdict(cell_result(recipe, load_data(recipe), inputs, stages.directories, answers, measured))


def _options(recipe: Recipe, workspace: str) -> JobOptions:
    return JobOptions(recipe=recipe, workspace=workspace, dry_run=False, take_over=False)
