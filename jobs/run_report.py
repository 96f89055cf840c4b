"""report.html and the table of results, from the finished stages of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.config.recipe import Recipe
from pipeline.models.reward_model_card import read_card
from pipeline.records import StageResult
from pipeline.rollouts.kept_samples import read_samples
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.stages.runner import StageRunner


def write_report(
    stages: StageRunner,
    recipe: Recipe,
    policy: StageResult,
    reward_model: StageResult | None,
    aligned: StageResult,
    benchmark: StageResult,
    judge: StageResult | None,
) -> str:
    """Writes <workspace>/report.html from the finished stages, prints the results. Cheap: always made anew.

    Args:
        reward_model, judge: None where the recipe trains none.
    """
    from pipeline.loops.benchmark import ALIGNED, BASE, answers_file
    from pipeline.reporting.report import ReportData, StageSummary, findings, report_page, results_table

    workspace = stages.workspace
    results = [result for result in (policy, reward_model, aligned, benchmark, judge) if result is not None]
    directories = [workspace.stage(result.name, result.fingerprint) for result in results]

    def rows_of(result: StageResult) -> list[dict[str, Any]]:
        return directories[results.index(result)].metrics_rows()

    with storage.reading(benchmark.location) as directory:
        answers = {name: read_scored_answers(answers_file(directory, name)) for name in (BASE, ALIGNED)}
        planted_file = Path(directory) / "planted.json"
        planted = json.loads(planted_file.read_text()) if planted_file.exists() else {"kinds": {}, "weights": {}}
    objectives, reward_model_fingerprint = recipe.objectives, None
    if reward_model is not None:
        with storage.reading(reward_model.location) as directory:
            objectives = read_card(directory).objectives
            reward_model_fingerprint = directory_fingerprint(directory)
    manifests = [directory.manifest() for directory in directories]
    data = ReportData(
        name=recipe.name,
        recipe=recipe.model_dump(mode="json"),
        objectives=objectives,
        stages=[
            StageSummary(
                name=manifest["name"],
                seconds=manifest["seconds"],
                is_skipped=manifest["name"] in stages.skipped,
                node_peak_gib=manifest["node_peak_gib"],
                metrics=result.metrics,
                versions=manifest["versions"],
            )
            for manifest, result in zip(manifests, results, strict=True)
        ],
        reward_rows=[] if reward_model is None else rows_of(reward_model),
        alignment_rows=rows_of(aligned),
        reward_metrics={} if reward_model is None else reward_model.metrics,
        reward_model_fingerprint=reward_model_fingerprint,
        benchmark_metrics=benchmark.metrics,
        base=answers[BASE],
        aligned=answers[ALIGNED],
        kinds=planted["kinds"],
        over_time=read_samples(directories[2].uri),
        planted_weights=planted["weights"],
    )
    location = storage.join(workspace.uri, "report.html")
    storage.write_text(location, report_page(data))
    table = results_table(data)
    width = max(len(what) for what, _ in table)
    print("\n" + "\n".join(f"{finding.level:<6}  {finding.text}" for finding in findings(data)))
    print("\n" + "\n".join(f"{what:<{width}}  {value}" for what, value in table))
    print(f"\nreport: {location}", flush=True)
    return location
