"""Every variant of an experiment with every seed, over the whole cluster, in one table and figures.

    python jobs/experiments.py heads --recipe experiments_tiny --out runs/heads --seeds 0 1 2
    python jobs/experiments.py overoptimization --out runs/overoptimization --seeds 0 1 2

`supervision` compares supervision losses, `heads` vrm with its baselines, `supervision_weight` its weight, `collapse`
draws the collapse over KL weights, `label_noise` flips labels. A run is one process with the same trainer, budget, data
order and seeds for every variant. The backbone is the recipe's checkpoint, or a tiny model from scratch.
`overoptimization` aligns policies against bt, gate, vrm and vrm's lower confidence bound, with and without KL, and
holds the reward against the planted truth. `supervised_alignment` aligns policies with and without supervision of
weights and scores (Figure 6 of the paper). Runs of one seed start from one fine-tuned policy. The same command
computes only the runs that are missing, and experiments that share a run share its result.

A backbone that does not train (trainable_layers: 0) is run once over the pairs, for all runs and later experiments.

Writes runs/<config hash>.json, <experiment>*.csv, <experiment>.txt and <experiment>*.png. States of frozen backbones go
to states/. Policies and reward models that several alignments share go to shared/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.resources import Demand, StageDemand, plan_table
from jobs.command_line import Command, absolute_place, add_overrides, add_recipe
from jobs.preflight import check_recipe
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError, CorruptManifest, PipelineError, WorkerError
from pipeline.experiments.grid import EXPERIMENTS, Run, plan_runs
from pipeline.stages import storage

if TYPE_CHECKING:
    from pipeline.experiments.findings import FinishedRun

Compute = Callable[[Sequence[Run], str], Iterable[tuple[int, "dict[str, Any] | PipelineError"]]]
"""Runs, and where results go -> (index, plain data of a `RunResult`, or the error that ended the run), as they end."""

HEADLINE = {
    "reward_model": ("accuracy", "eval/accuracy"),
    "policy": ("gold win rate", "gold/win_rate"),
    "method": ("win rate by VRM", "reward/win_rate"),
}
"""What an experiment trains -> the number on a progress line, and where the run keeps it."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", choices=sorted(EXPERIMENTS), metavar="experiment", help=", ".join(EXPERIMENTS))
    add_recipe(parser, help="a name, or a path to a .yaml file; default the experiment's own")
    parser.add_argument("--out", required=True, help="directory for results; several experiments may share it")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], metavar="SEED", help="0 1 2")
    parser.add_argument("--dry-run", action="store_true", help="print the runs and what each of them holds, and stop")
    add_overrides(parser, "of the recipe")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a seed is no number.
    """
    options.recipe = options.recipe or EXPERIMENTS[options.experiment].recipe
    options.seeds = seeds_and_overrides(options)


def seeds_and_overrides(options: argparse.Namespace) -> list[int]:
    """The seeds; argparse takes overrides that stand behind them for seeds, and they are added to the overrides.

    Raises:
        ConfigError: a seed is no number.
    """
    options.overrides = [*options.overrides, *(word for word in options.seeds if "=" in word)]
    seeds = [word for word in options.seeds if "=" not in word]
    if not all(word.isdecimal() for word in seeds):
        raise ConfigError(f"--seeds {' '.join(seeds)}: seeds are whole numbers from 0, as in --seeds 0 1 2")
    return [int(word) for word in seeds]


def demand_of(recipe: Recipe) -> Demand:
    """What one run holds: a single process that takes the place of all ranks of reward training."""
    ranks = recipe.cluster.reward
    return Demand(
        role="training run",
        setting="cluster.reward.ranks",
        count=1,
        cpus=ranks.ranks * ranks.cpus_per_rank,
        gpus=min(1.0, ranks.ranks * ranks.gpus_per_rank),
    )


def compute_on_the_cluster(runs: Sequence[Run], out: str) -> Iterable[tuple[int, dict[str, Any] | PipelineError]]:
    """Computes runs on the cluster this job was submitted to, or on its own. Frozen backbones run once for all runs."""
    from actors.alignment_tasks import align_everywhere
    from actors.experiment_tasks import train_everywhere
    from actors.frozen_state_tasks import keep_states
    from cluster.session import open_cluster

    cluster = runs[0].recipe.cluster
    demand = demand_of(runs[0].recipe)
    recipes, restarts = [run.recipe for run in runs], cluster.reward.max_restarts
    with open_cluster(cluster, [StageDemand(stage="experiment", demands=(demand,))]):
        if runs[0].trains == "policy":
            yield from align_everywhere(recipes, demand, storage.join(out, "shared"), max_restarts=restarts)
            return
        states_uri = storage.join(out, "states")
        keep_states(recipes, demand, states_uri, max_restarts=restarts, name="experiments")
        yield from train_everywhere(recipes, demand, states_uri, max_restarts=restarts)


def finish_runs(runs: Sequence[Run], out: str, compute: Compute) -> tuple[list[FinishedRun], list[str]]:
    """Computes and commits what `out` lacks, run by run.

    Returns:
        Every finished run, and an error message for every run that failed.
    """
    from pipeline.experiments.findings import FinishedRun

    missing: dict[str, Run] = {}
    for run in runs:
        if storage.read_text(_place_of(run, out)) is None:
            missing.setdefault(run.config_hash, run)
    todo, failures = list(missing.values()), []
    print(f"{len(runs)} runs, {len(runs) - len(todo)} finished before, {len(todo)} to do", flush=True)
    for count, (index, outcome) in enumerate(compute(todo, out) if todo else (), start=1):
        run = todo[index]
        progress = f"{count:>4}/{len(todo)}  {run.variant.name}, seed {run.seed}"
        if isinstance(outcome, PipelineError):
            failures.append(f"{run.variant.name}, seed {run.seed}: {type(outcome).__name__}: {outcome}")
            print(f"{progress}  failed", flush=True)
            continue
        _commit(run, outcome, out)
        what, metric = HEADLINE[run.trains]
        print(f"{progress}  {what} {outcome['metrics'][metric]:.3f}  {outcome['seconds']:.0f} s", flush=True)
    results = ((run, _read(run, out)) for run in runs)
    return [FinishedRun(run=run, result=result) for run, result in results if result is not None], failures


def _place_of(run: Run, out: str) -> str:
    return storage.join(out, "runs", f"{run.config_hash}.json")


def _commit(run: Run, result: Mapping[str, Any], out: str) -> None:
    from pipeline.stages.runner import installed_versions

    record = {
        "config_hash": run.config_hash,
        "variant": run.variant.name,
        "seed": run.seed,
        "config": run.recipe.model_dump(mode="json", exclude={"cluster"}),
        "versions": installed_versions(),
        **result,
    }
    storage.write_text(_place_of(run, out), json.dumps(record, allow_nan=False) + "\n")


def _read(run: Run, out: str) -> Mapping[str, Any] | None:
    """The committed result; None where there is none.

    Raises:
        CorruptManifest: it cannot be read.
    """
    text = storage.read_text(_place_of(run, out))
    if text is None:
        return None
    try:
        record = json.loads(text)
        return {name: record[name] for name in ("metrics", "curve", "prompts", "margins", "seconds")}
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptManifest(
            f"{_place_of(run, out)} is no result of a run ({error!r}). Delete it to run {run.variant.name}, seed "
            f"{run.seed} again."
        ) from error


def report(name: str, finished: Sequence[FinishedRun], out: str) -> str:
    """Writes table and figures, returns the findings in words."""
    from pipeline.experiments.figures import write_figures
    from pipeline.experiments.findings import POLICY_COLUMNS, findings_text, paired_differences, results_csv
    from pipeline.experiments.policy_findings import curves_csv, policy_findings_text

    experiment = EXPERIMENTS[name]
    if experiment.trains == "policy":
        words = policy_findings_text(experiment, finished)
        tables = {name: results_csv(finished, (*POLICY_COLUMNS,)), f"{name}_curves": curves_csv(finished)}
    else:
        comparisons = paired_differences(finished, experiment.compare_with) if experiment.compare_with else []
        words = findings_text(experiment, finished, comparisons)
        tables = {name: results_csv(finished)}
    with storage.writing(out) as directory:
        for table, text in tables.items():
            Path(directory, f"{table}.csv").write_text(text)
        Path(directory, f"{name}.txt").write_text(words + "\n")
        write_figures(name, experiment, finished, Path(directory))
    return words


def run_experiment(options: argparse.Namespace, compute: Compute = compute_on_the_cluster) -> str:
    """Plans, computes what is missing, reports.

    Raises:
        ConfigError: the recipe, an override or the data settings do not make sense.
        WorkerError: some runs failed; the others are committed and reported.
    """
    from pipeline.data.run_data import data_fingerprints

    recipe = load_recipe(options.recipe, options.overrides)
    out = absolute_place(options.out, option="--out")
    experiment = EXPERIMENTS[options.experiment]
    runs = plan_runs(experiment, options.recipe, options.overrides, options.seeds, data_fingerprints(recipe))
    check_recipe(recipe)
    if options.dry_run:
        listed = "\n".join(f"{run.config_hash}  seed {run.seed}  {run.variant.name}" for run in runs)
        return f"{listed}\n\n{plan_table([StageDemand(stage='one run', demands=(demand_of(recipe),))])}"
    finished, failures = finish_runs(runs, out, compute)
    words = report(options.experiment, finished, out) if finished else ""
    if failures:
        print(words, flush=True)
        raise WorkerError(
            f"{len(failures)} of {len(runs)} runs failed; the others are committed in {out}, and the same command "
            "tries these again:\n  " + "\n  ".join(failures)
        )
    return f"{words}\n\n{out}: {options.experiment}.csv, {options.experiment}.png, {options.experiment}_curves.png"


experiment_command = Command(
    documentation=__doc__,
    add_options=_add_options,
    check_options=_check_options,
    run=lambda options: print(run_experiment(options)),
)

if __name__ == "__main__":
    experiment_command()
