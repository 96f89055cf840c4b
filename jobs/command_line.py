"""The command line all jobs share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.resources import as_table, plan_resources
from pipeline.config.load import load_recipe
from pipeline.config.schema import Recipe
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from jobs.rooms import Rooms

BAD_INPUT = 2


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
    parser.add_argument("--workspace", help="directory or pyarrow.fs URI; default ~/vrm-runs/<recipe>, or VRM_WORKSPACE")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and the resource plan, and stop")
    parser.add_argument("--take-over", action="store_true", help="take a workspace whose owner is dead")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="as in alignment.num_steps=50")
    parsed = parser.parse_args(arguments)
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    default = os.environ.get("VRM_WORKSPACE") or os.path.join(os.path.expanduser("~"), "vrm-runs", recipe.name)
    workspace = parsed.workspace or default
    if "://" not in workspace:
        workspace = os.path.abspath(workspace)
    return Options(recipe=recipe, workspace=workspace, dry_run=parsed.dry_run, take_over=parsed.take_over)


def dry_run(options: Options) -> str:
    """The resolved recipe as YAML, and the resource plan."""
    import yaml

    recipe = yaml.safe_dump(options.recipe.model_dump(mode="json"), sort_keys=False)
    return f"{recipe}\nworkspace: {options.workspace}\n\n{as_table(plan_resources(options.recipe.cluster))}"


def run_job(description: str, body: Callable[[Rooms], None]) -> None:
    """Parses, opens workspace and cluster, runs `body`; a pipeline error ends the process with its message alone."""
    try:
        options = parse(description)
        if options.dry_run:
            print(dry_run(options))
            return
        # Ray and torch are imported behind the dry run.
        from jobs.rooms import open_rooms

        with open_rooms(options) as rooms:
            body(rooms)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(BAD_INPUT)
