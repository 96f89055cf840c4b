"""The command lines of the jobs: one `Command` a job, for its own file and for `vrm`.

Nothing here imports torch or ray, so that help, completion and dry runs answer at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.engine_build import resolution_reasons, resolve_rollout
from cluster.planning.plan_text import memory_and_time
from cluster.resources import check_plan, plan_table, this_machine
from cluster.rollout_plan import plan_of_stages, plan_rollouts
from cluster.submission import is_submitted_job
from jobs.exit_codes import exit_codes
from jobs.preflight import check_recipe
from pipeline.config.load import load_recipe, recipe_keys, recipe_names
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError
from pipeline.models.native_dtype import with_native_dtype
from pipeline.stages import storage

CLUSTERS = {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}
"""Environment variables that name a cluster other than one the job would start itself."""


class _Help(argparse.HelpFormatter):
    """One line an option where the terminal allows, and a usage line of what must be given."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        required = [action for action in actions if action.required or not action.option_strings]
        super().add_usage(usage, required, [], prefix)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            # argparse forgets that commands are indented, and breaks the line behind the longest name.
            self._action_max_length += self._indent_increment


def new_parser(description: str, prog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=_Help)


def _nothing_to_check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What the parser accepts makes sense."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a job takes on its command line, and what it does with it."""

    documentation: str
    """The docstring of the job's file; `--help` shows its first paragraph."""
    add_options: Callable[[argparse.ArgumentParser], object]
    run: Callable[[argparse.Namespace], object]
    check_options: Callable[[argparse.ArgumentParser, argparse.Namespace], object] = _nothing_to_check
    """Checks what one option alone cannot tell; may raise ConfigError or call `parser.error`."""

    def parser(self, prog: str | None = None) -> argparse.ArgumentParser:
        """A parser with all options of the command.

        Args:
            prog: how the user called it, as in "vrm run"; None takes the name of the file.
        """
        parser = new_parser(self.documentation.partition("\n\n")[0], prog)
        self.add_options(parser)
        return parser

    def options(self, arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
        """Parses and checks. Options and overrides may be mixed.

        Raises:
            ConfigError: options that make no sense, or no sense together.
        """
        parser = self.parser(prog)
        options = parser.parse_intermixed_args(arguments)
        self.check_options(parser, options)
        return options

    def __call__(self, arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
        """Runs the job, and ends the process if it fails (`jobs/exit_codes.py`)."""
        with exit_codes():
            self.run(self.options(arguments, prog))


# ----------------------------------------------------------------------------- options that jobs share


def add_recipe(parser: argparse.ArgumentParser, flag: str = "--recipe", **settings: Any) -> None:
    """A recipe by name or path; completes the names."""
    complete_with(parser.add_argument(flag, **settings), recipe_names)


def add_overrides(parser: argparse.ArgumentParser, help_text: str) -> None:
    """`key.path=value` of the recipe; completes the keys."""
    # Without a default argparse calls them required where anything else is missing.
    action = parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value", help=help_text)
    complete_with(action, lambda: [f"{key}=" for key in recipe_keys()])


def complete_with(action: Any, words: Callable[[], Sequence[str]]) -> None:
    """Tells argcomplete, by the attribute that it reads, which words the user may mean."""
    action.completer = lambda **_: words()


def absolute_place(workspace: str, *, option: str = "--workspace") -> str:
    """An absolute path, or the URI as it is.

    Raises:
        ConfigError: a relative path in a submitted job, whose working directory is a copy that Ray throws away.
        WorkspaceError: a URI that carries credentials, or names no place.
    """
    storage.check_uri(workspace)
    path = os.path.expanduser(workspace)
    if "://" in workspace or os.path.isabs(path):
        return path
    if is_submitted_job():
        raise ConfigError(
            f"{option} {workspace} is relative, but a submitted job runs in a temporary copy of its working "
            f'directory and its results would be lost. Write {option} "$PWD/{workspace}", or give a URI.'
        )
    return os.path.abspath(path)


# ----------------------------------------------------------------------------- jobs over a workspace


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """A parsed command line of a job that works in a workspace."""

    recipe: Recipe
    workspace: str
    dry_run: bool
    take_over: bool


def add_job_options(parser: argparse.ArgumentParser, recipe_flag: str = "--recipe") -> None:
    """Adds the options that every job with a recipe has.

    Args:
        recipe_flag: "recipe" takes the recipe as the first word instead of as an option.
    """
    default = {"default": "tiny"} if recipe_flag.startswith("-") else {}
    add_recipe(parser, recipe_flag, help="a name (`vrm recipes` lists them), or a path to a .yaml file", **default)
    parser.add_argument("--workspace", help="directory or pyarrow.fs URI (VRM_WORKSPACE, or ~/vrm-runs/<recipe>)")
    parser.add_argument("--dry-run", action="store_true", help="print recipe and resource plan, and stop")
    parser.add_argument("--take-over", action="store_true", help="take a workspace whose owner is dead")
    add_overrides(parser, "as in alignment.num_steps=50")


def job_options(parsed: argparse.Namespace) -> JobOptions:
    """Validates; raises ConfigError before anything expensive is taken."""
    recipe = load_recipe(parsed.recipe, parsed.overrides)
    workspace = parsed.workspace or os.environ.get("VRM_WORKSPACE") or f"~/vrm-runs/{recipe.name}"
    return JobOptions(
        recipe=recipe,
        workspace=absolute_place(workspace),
        dry_run=parsed.dry_run,
        take_over=parsed.take_over,
    )


def print_dry_run(options: JobOptions) -> None:
    """Prints the resolved recipe as YAML and the resource plan.

    Raises:
        ResourceError: this machine would run the job, and cannot.
        ConfigError, DataError, CheckpointError: a data file or a checkpoint cannot be used.
    """
    import yaml

    recipe, here = options.recipe, this_machine()
    elsewhere = bool(CLUSTERS & os.environ.keys())
    rollouts = plan_rollouts(recipe, [] if elsewhere or not here["GPU"] else [here])
    plan = plan_of_stages(recipe, rollouts)
    print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    print(f"workspace: {options.workspace}\n\n{plan_table(plan)}\n\n{rollouts}")
    is_for_here = not elsewhere and (here["GPU"] or not any(stage.total("GPU") for stage in plan))
    # Before what is only said of the plan: a plan that cannot fit ends here.
    if is_for_here:
        check_plan(plan, [here])
    print(f"\n{memory_and_time(recipe, rollouts, is_for_here=not elsewhere)}\n")
    rollout = recipe.cluster.rollout
    may_share = recipe.could_share_gpus(resolve_rollout(rollout).gpus_per_worker)
    if rollouts.placement == "disaggregated" and rollout.placement is None and may_share:
        print("Where that does not fit, they share the learner's GPUs instead.")
    reasons = resolution_reasons(rollout)
    if reasons:
        print("\n".join([*reasons, "A job decides this by the vLLM that is installed where it runs."]))
    if recipe.reward.backbone_dtype == "auto":
        dtype = with_native_dtype(recipe).reward.backbone_dtype
        print(f"reward.backbone_dtype = {dtype}, by the instructions of this processor. A job asks where it runs.")
    if elsewhere:
        print("Whether the cluster has it is checked when the job connects, before any actor starts.")
    elif not is_for_here:
        print("This machine has no GPU: the plan is for another one.")
    else:
        print(f"This machine has it: {here['CPU']:g} CPU, {here['GPU']:g} GPU.")
    if driver_is_elsewhere():
        print("Data files and checkpoints are looked at where the job runs.")
    else:
        check_recipe(recipe, workspace=options.workspace)


def driver_is_elsewhere() -> bool:
    """Whether the environment names a dashboard, to which `ray job submit` takes the job."""
    submits = "RAY_API_SERVER_ADDRESS" in os.environ or os.environ.get("RAY_ADDRESS", "").startswith("http")
    return submits and not is_submitted_job()
