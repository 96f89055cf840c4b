"""Stage 5: report.html and the table of results.

    python jobs/write_report.py --recipe tiny

Runs the stages before it when their results are not in the workspace.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.align_policy import align_policy
from jobs.generate_benchmark import generate_benchmark
from jobs.run_job import run_job
from jobs.sft import sft
from jobs.train_reward_model import train_judge, train_reward_model
from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.config.recipe import Recipe
from pipeline.records import StageResult
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.stages.workspace import Workspace

if TYPE_CHECKING:
    from jobs.open_job import Job


def write_report(
    workspace: Workspace,
    recipe: Recipe,
    policy: StageResult,
    reward_model: StageResult,
    aligned: StageResult,
    benchmark: StageResult,
    judge: StageResult | None,
) -> str:
    """Writes <workspace>/report.html from the finished stages, prints the results. Cheap: always made anew."""
    from pipeline.loops.benchmark import ALIGNED, BASE, answers_file
    from pipeline.reporting.report import ReportData, StageSummary, report_page, results_table

    results = (policy, reward_model, aligned, benchmark, *([] if judge is None else [judge]))
    stages = [workspace.stage(result.name, result.fingerprint) for result in results]
    with storage.reading(benchmark.location) as directory:
        answers = {name: read_scored_answers(answers_file(directory, name)) for name in (BASE, ALIGNED)}
        planted_file = Path(directory) / "planted.json"
        planted = json.loads(planted_file.read_text()) if planted_file.exists() else {"kinds": {}, "weights": {}}
    with storage.reading(reward_model.location) as directory:
        reward_model_fingerprint = directory_fingerprint(directory)
    manifests = [stage.manifest() for stage in stages]
    data = ReportData(
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        objectives=recipe.objectives,
        stages=[
            StageSummary(
                name=manifest["name"],
                seconds=manifest["seconds"],
                node_peak_gib=manifest["node_peak_gib"],
                metrics=result.metrics,
                versions=manifest["versions"],
            )
            for manifest, result in zip(manifests, results, strict=True)
        ],
        reward_rows=stages[1].metrics_rows(),
        alignment_rows=stages[2].metrics_rows(),
        reward_metrics=reward_model.metrics,
        reward_model_fingerprint=reward_model_fingerprint,
        benchmark_metrics=benchmark.metrics,
        base=answers[BASE],
        aligned=answers[ALIGNED],
        kinds=planted["kinds"],
        planted_weights=planted["weights"],
    )
    location = storage.join(workspace.uri, "report.html")
    storage.write_text(location, report_page(data))
    table = results_table(data)
    width = max(len(what) for what, _ in table)
    print("\n" + "\n".join(f"{what:<{width}}  {value}" for what, value in table))
    print(f"\nreport: {location}", flush=True)
    return location


def main(job: Job) -> None:
    stages, recipe, read_data, actors = job.stages, job.recipe, job.read_data, job.actors
    policy = sft(stages, recipe, read_data)
    reward_model = train_reward_model(stages, recipe, read_data, policy)
    aligned = align_policy(stages, recipe, read_data, actors, policy, reward_model)
    judge = train_judge(stages, recipe, read_data, policy)
    benchmark = generate_benchmark(stages, recipe, read_data, actors, policy, aligned, reward_model, judge)
    write_report(stages.workspace, recipe, policy, reward_model, aligned, benchmark, judge)


if __name__ == "__main__":
    run_job(__doc__, main)
