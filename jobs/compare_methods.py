"""Tables 1 and 2: alignment methods as policies, and their rewards as reward models, on equal data.

    python jobs/compare_methods.py --recipe table1_tiny --out runs/table1 --seeds 0 1 2
    python jobs/compare_methods.py --out runs/table1 --methods dpo vrm_ppo alignment.direct.beta=0.2

A seed has one fine-tuned policy and one data set. Every method starts from that policy, and answers the same held-out
prompts. Judges are the truth, where the world is planted, and a VRM reward model. A method's reward is the one that its
policy implies; for ppo and vrm_ppo it is the reward model that they were aligned against.

A cell (a method with a seed) is one process; with comparison.cells=pipeline it is the pipeline's stages, over ranks and
engines. The same command computes only the cells that are missing, so a method can be added later. A killed cell goes
on after its last committed step.

Writes runs/<cell>.json, comparison.md, comparison.json and learning_curves.png. Policies and answers lie in
cells/<cell>/, and what cells share in shared/. Any other judge adds a column: let `vrm benchmark judge --benchmark
alpaca_eval` compare the aligned answers of every cell with those of the base, write cells/<cell>/NAME, and run this
command again with --judgments NAME.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cluster.resources import StageDemand, plan_table
from cluster.rollout_plan import plan_of_stages, plan_rollouts
from jobs.command_line import Command, absolute_place, add_overrides, add_recipe
from jobs.experiments import Compute, demand_of, finish_runs, seeds_and_overrides
from pipeline.config.comparison import Method
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import PipelineError, WorkerError
from pipeline.experiments.grid import Run
from pipeline.experiments.methods import plan_cells
from pipeline.stages import storage

if TYPE_CHECKING:
    from pipeline.experiments.findings import FinishedRun

PAPERS_METHODS = ("dpo", "ipo", "kto", "simpo", "wpo", "selective_dpo", "ppo", "vrm_ppo")
"""The rows of the paper's Table 1."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, default="table1_tiny", help="a name, or a path to a .yaml file (%(default)s)")
    parser.add_argument("--out", required=True, help="directory for results")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(PAPERS_METHODS),
        metavar="METHOD",
        help=f"of {', '.join(get_args(Method))}; default those of the paper",
    )
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], metavar="SEED", help="0 1 2")
    parser.add_argument("--judgments", metavar="NAME", help="annotations of another judge, cells/<cell>/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and what each of them holds, and stop")
    add_overrides(parser, "of the recipe")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a seed is no number.
    """
    # argparse takes overrides that stand behind the methods for methods.
    options.overrides += [word for word in options.methods if "=" in word]
    options.methods = [word for word in options.methods if "=" not in word]
    unknown = [word for word in options.methods if word not in get_args(Method)]
    if unknown:
        parser.error(f"--methods {' '.join(unknown)}: unknown; there are {', '.join(get_args(Method))}")
    options.seeds = seeds_and_overrides(options)


def compute_on_the_cluster(cells: Sequence[Run], out: str) -> Iterable[tuple[int, dict[str, Any] | PipelineError]]:
    """Computes cells on the cluster this job was submitted to, or on its own."""
    if cells[0].recipe.comparison.cells == "pipeline":
        from jobs.comparison_pipeline import compute_with_the_pipeline

        yield from compute_with_the_pipeline(cells, out)
        return
    from actors.comparison_tasks import compare_everywhere
    from cluster.session import open_cluster

    cluster = cells[0].recipe.cluster
    demand = demand_of(cells[0].recipe)
    with open_cluster(cluster, [StageDemand(stage="comparison", demands=(demand,))]):
        yield from compare_everywhere(cells, demand, out, max_restarts=cluster.reward.max_restarts)


def plan_of(recipe: Recipe) -> Sequence[StageDemand]:
    """What one cell holds."""
    if recipe.comparison.cells == "pipeline":
        return plan_of_stages(recipe, plan_rollouts(recipe, []))
    return [StageDemand(stage="one cell", demands=(demand_of(recipe),))]


def report(finished: Sequence[FinishedRun], out: str) -> str:
    """Writes tables and figures, returns the markdown."""
    from pipeline.experiments.method_figures import write_learning_curves
    from pipeline.experiments.method_tables import as_markdown, comparison_tables

    tables = comparison_tables(finished)
    text = as_markdown(tables)
    with storage.writing(out) as directory:
        Path(directory, "comparison.json").write_text(json.dumps(tables, indent=1) + "\n")
        Path(directory, "comparison.md").write_text(text)
        write_learning_curves(finished, Path(directory, "learning_curves.png"))
    return text


def judged(f: FinishedRun, directory: str, file: str) -> FinishedRun:
    """The cell with the verdicts of another judge.

    Args:
        directory: of the cell.
        file: the verdicts, below it.

    Raises:
        DataError: they cannot be read, or lack a prompt of the cell.
    """
    from pipeline.benchmark.alpaca_eval.annotations import read_annotations
    from pipeline.experiments.method_tables import with_judgments

    with storage.reading(directory) as local:
        annotations = read_annotations(Path(local, file))
    return with_judgments(f, annotations)


def compare_methods(options: argparse.Namespace, compute: Compute = compute_on_the_cluster) -> str:
    """Plans, computes what is missing, reports.

    Raises:
        ConfigError: the recipe, an override or the data settings do not make sense.
        WorkerError: some cells failed; the others are committed and reported.
    """
    from pipeline.data.run_data import data_fingerprints

    recipe = load_recipe(options.recipe, options.overrides)
    out = absolute_place(options.out, option="--out")
    cells = plan_cells(options.recipe, options.overrides, options.methods, options.seeds, data_fingerprints(recipe))
    if options.dry_run:
        listed = "\n".join(f"{cell.config_hash}  seed {cell.seed}  {cell.variant.name}" for cell in cells)
        return f"{listed}\n\n{plan_table(plan_of(recipe))}"
    finished, failures = finish_runs(cells, out, compute)
    if options.judgments:
        finished = [judged(f, storage.join(out, f"cells/{f.run.config_hash}"), options.judgments) for f in finished]
    text = report(finished, out) if finished else ""
    if failures:
        print(text, flush=True)
        raise WorkerError(
            f"{len(failures)} of {len(cells)} cells failed; the others are committed in {out}, and the same command "
            "tries these again:\n  " + "\n  ".join(failures)
        )
    return f"{text}\n{out}: comparison.md, comparison.json, learning_curves.png"


compare_methods_command = Command(
    documentation=__doc__,
    add_options=_add_options,
    check_options=_check_options,
    run=lambda options: print(compare_methods(options)),
)

if __name__ == "__main__":
    compare_methods_command()
