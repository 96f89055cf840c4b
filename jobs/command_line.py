"""The command line all jobs share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.engine_build import resolution_reasons, resolve_rollout
from cluster.resources import as_table, check_plan, plan_resources, this_machine
from cluster.rollout_plan import plan_rollouts
from cluster.submission import is_submitted_job
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError

BAD_INPUT = 2
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
CLUSTERS = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
"""Environment variables that name a cluster other than one the job would start itself."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asked for."""

    recipe: Recipe
    workspace: str
    dry_run: bool
    take_over: bool


def parse(description: str, arguments: Sequence[str] | None = None) -> Options:
    """Parses and validates; raises ConfigError before anything expensive is taken."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny", help="a name in jobs/recipes, or a path to a .yaml file")
    parser.add_argument(
        "--workspace", help="directory or pyarrow.fs URI; default ~/vrm-runs/<recipe>, or VRM_WORKSPACE"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the resource plan, and stop"
    )
    parser.add_argument("--take-over", action="store_true", help="take a workspace whose owner is dead")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as in alignment.num_steps=50")
    parsed = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    workspace = parsed.workspace or os.environ.get("VRM_WORKSPACE") or f"~/vrm-runs/{recipe.name}"
    return Options(recipe=recipe, workspace=place(workspace), dry_run=parsed.dry_run, take_over=parsed.take_over)


def place(workspace: str, *, option: str = "--workspace") -> str:
    """An absolute path, or the URI as it is.

    Raises:
        ConfigError: a relative path in a submitted job, whose working directory is a copy that Ray throws away.
    """
    path = os.path.expanduser(workspace)
    if "://" in workspace or os.path.isabs(path):
        return path
    if is_submitted_job():
        raise ConfigError(
            f"{option} {workspace} is relative, but a submitted job runs in a temporary copy of its working "
            f'directory and its results would be lost. Write {option} "$PWD/{workspace}", or give a URI.'
        )
    return os.path.abspath(path)


def dry_run(options: Options) -> None:
    """Prints the resolved recipe as YAML and the resource plan.

    Raises:
        ResourceError: this machine would run the job, and cannot.
    """
    import yaml

    recipe, here = options.recipe, this_machine()
    elsewhere = bool(CLUSTERS & os.environ.keys())
    rollouts = plan_rollouts(recipe, [] if elsewhere or not here["GPU"] else [here])
    plan = plan_resources(recipe.cluster, rollouts.placement)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    print(f"workspace: {options.workspace}\n\n{as_table(plan)}\n\n{rollouts}")
    rollout = recipe.cluster.rollout
    may_share = recipe.could_share_gpus(resolve_rollout(rollout).gpus_per_worker)
    if rollouts.placement == "disaggregated" and rollout.placement is None and may_share:
        print("Where that does not fit, they share the learner's GPUs instead.")
    for sentence in resolution_reasons(rollout):
        print(sentence)
    if elsewhere:
        print("Whether the cluster has it is checked when the job connects, before any actor starts.")
    elif not here["GPU"] and any(stage.total("GPU") for stage in plan):
        print("This machine has no GPU: the plan is for another one.")
    else:
        check_plan(plan, [here])
        print(f"This machine has it: {here['CPU']:g} CPU, {here['GPU']:g} GPU.")
