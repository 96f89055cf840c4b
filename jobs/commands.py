"""The command `vrm`: every job by one name, with help and tab completion.

    vrm recipes
    vrm run tiny --dry-run
    eval "$(register-python-argcomplete vrm)"       # tab completion in this shell

The files of the jobs stay the ones to submit to a cluster. A command and its job's file share one `Command`, so they
take the same options.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.command_line import Command, new_parser
from pipeline.config.load import first_comment, recipe_names

COMPLETION = "_ARGCOMPLETE"
"""Set by the shell while it completes; COMP_LINE then holds what the user has typed."""
NEEDS = " Needs "
"""Separates what a recipe is from what it needs, in the first comment of its file."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One command of `vrm`."""

    summary: str
    load: Callable[[], Command]
    """Imports the job; the other jobs stay unread."""


def _run() -> Command:
    from jobs import full_pipeline
    from jobs.run_job import job_command

    return job_command(full_pipeline.__doc__ or "", full_pipeline.run_pipeline, recipe_flag="recipe")


def _status() -> Command:
    from jobs.status import status_command

    return status_command


def _preview() -> Command:
    from jobs.preview_data import preview_command

    return preview_command


def _rollouts() -> Command:
    from jobs.show_rollouts import show_rollouts_command

    return show_rollouts_command


def _scale() -> Command:
    from jobs.scale_rollouts import scale_rollouts_command

    return scale_rollouts_command


def _serve() -> Command:
    from jobs.serve_reward_model import serve_reward_model_command

    return serve_reward_model_command


def _evaluate() -> Command:
    from jobs.evaluate_reward_model import evaluate_reward_model_command

    return evaluate_reward_model_command


def _push() -> Command:
    from jobs.push_reward_model import push_reward_model_command

    return push_reward_model_command


def _experiment() -> Command:
    from jobs.experiments import experiment_command

    return experiment_command


def _methods() -> Command:
    from jobs.compare_methods import compare_methods_command

    return compare_methods_command


def _generate() -> Command:
    from jobs.generate_answers import generate_answers_command

    return generate_answers_command


def _judge() -> Command:
    from jobs.judge_benchmark import judge_benchmark_command

    return judge_benchmark_command


def _score() -> Command:
    from jobs.score_benchmark import score_benchmark_command

    return score_benchmark_command


def _compare() -> Command:
    from jobs.compare_policies import compare_policies_command

    return compare_policies_command


def _launch_kubernetes() -> Command:
    from jobs.launch import kubernetes_command

    return kubernetes_command


def _launch_slurm() -> Command:
    from jobs.launch import slurm_command

    return slurm_command


def _launch_ssh() -> Command:
    from jobs.launch import ssh_command

    return ssh_command


def _explain() -> Command:
    from jobs.explain_settings import explain_command

    return explain_command


def _recipes() -> Command:
    return recipes_command


COMMANDS: Mapping[str, Entry] = {
    "run": Entry(summary="run the whole pipeline on a recipe, or resume it", load=_run),
    "recipes": Entry(summary="list the recipes, and what each needs", load=_recipes),
    "explain": Entry(summary="say what a setting of a recipe means", load=_explain),
    "preview": Entry(summary="show the data of a recipe as its models will see it", load=_preview),
    "status": Entry(summary="show what a workspace holds", load=_status),
    "rollouts": Entry(summary="look into the rollouts that an alignment kept", load=_rollouts),
    "scale": Entry(summary="give a running job more or fewer rollout workers", load=_scale),
    "serve": Entry(summary="serve a trained reward model over HTTP", load=_serve),
    "evaluate": Entry(summary="evaluate a reward model on comparisons, RewardBench, RM-Bench", load=_evaluate),
    "push": Entry(summary="put a reward model on the Hugging Face hub", load=_push),
    "experiment": Entry(summary="run every variant of an experiment with every seed", load=_experiment),
    "methods": Entry(summary="compare alignment methods as policies and as reward models", load=_methods),
    "launch kubernetes": Entry(summary="write a RayJob or a RayService for KubeRay", load=_launch_kubernetes),
    "launch slurm": Entry(summary="write a batch script for Slurm", load=_launch_slurm),
    "launch ssh": Entry(summary="write a file for `ray up` over ssh", load=_launch_ssh),
    "benchmark generate": Entry(summary="answer AlpacaEval, Arena-Hard or MT-Bench", load=_generate),
    "benchmark judge": Entry(summary="let a judge compare or grade the answers", load=_judge),
    "benchmark score": Entry(summary="compute the scores of a judge's verdicts", load=_score),
    "benchmark compare": Entry(summary="write a page that compares policies", load=_compare),
}
"""The words of a command -> its job, in the order of `vrm --help`."""

GROUPS = {
    "launch": "write what starts a recipe on Kubernetes, Slurm or machines over ssh",
    "benchmark": "generate, judge, score or compare answers to benchmarks",
}
"""First words that several commands share."""


def list_recipes(options: argparse.Namespace) -> None:
    rows = []
    for name in recipe_names():
        what, _, needs = first_comment(name).removesuffix(".").partition(NEEDS)
        rows.append((name, what.removesuffix("."), needs))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, what, needs in rows:
        print(f"{name:<{widths[0]}}  {what:<{widths[1]}}  {needs}")


recipes_command = Command(
    documentation="The recipes that come with the package: name, what it is, what it needs.",
    add_options=lambda parser: None,
    run=list_recipes,
)


def named_command(words: Sequence[str]) -> str | None:
    """The command that the first words name."""
    return next((name for name in COMMANDS if list(words[: len(name.split())]) == name.split()), None)


def command_tree(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """All commands with their summaries, and the options of the one that the words name.

    It answers for help, mistakes and completion. The command itself parses its arguments.
    """
    tree = new_parser("Variational reward modeling as a distributed RLHF pipeline.", "vrm")
    tree.epilog = "`vrm COMMAND --help` lists the options of a command."
    commands = tree.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    named = named_command(words)
    for name, entry in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if group and group not in groups:
            parser = commands.add_parser(group, help=GROUPS[group], formatter_class=tree.formatter_class)
            groups[group] = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
        options = [entry.load().parser()] if name == named else []
        # "resolve": the options bring their own --help.
        (groups[group] if group else commands).add_parser(
            word, help=entry.summary, parents=options, conflict_handler="resolve"
        )
    return tree


def vrm_command(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that the arguments name, or says which there are."""
    if COMPLETION in os.environ:
        import argcomplete

        typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
        argcomplete.autocomplete(command_tree(_words(typed)[1:]))
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    name = named_command(words)
    if name is None:
        command_tree().parse_args(words)
    else:
        COMMANDS[name].load()(words[len(name.split()) :], prog=f"vrm {name}")


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # a quote that is still open
        return line.split()
