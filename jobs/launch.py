"""Writes what starts a recipe on other machines: manifests for KubeRay, a script for Slurm, a file for `ray up`.

    vrm launch kubernetes paper_qwen3_8b --image REGISTRY/vrm:1 --workspace s3://bucket/run > run.yaml
    vrm launch kubernetes paper_qwen3_8b --image REGISTRY/vrm:1 --secret vrm --serve s3://bucket/model > reward.yaml
    vrm launch slurm paper_qwen3_8b --workspace /shared/run --out run.sbatch
    vrm launch ssh paper_qwen3_8b --workspace /shared/run --hosts 192.0.2.10 192.0.2.11 --out run.yaml

The numbers are those of `vrm run RECIPE --dry-run`; the file repeats them in its first lines. The number of nodes is
the smallest on which every stage fits.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.launch.kubernetes import VOLUME_PATH, PodSettings, as_yaml, ray_job, ray_service
from cluster.launch.launch_plan import LaunchPlan, plan_launch, plan_service
from cluster.launch.machines import MACHINES, Machine, machine
from cluster.launch.slurm import SlurmSettings, sbatch_script
from cluster.launch.ssh import cluster_file
from cluster.planning.plan_text import check_memory
from cluster.rollout_plan import plan_rollouts
from jobs.command_line import Command, absolute_place, add_overrides, add_recipe
from pipeline.config.load import load_recipe, recipe_names
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError
from pipeline.serving.protocol import TOKEN_VARIABLE
from pipeline.stages import storage

TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
"""What sbatch takes: minutes, hours and minutes, days and hours, ..."""

SLURM_NAME = re.compile(r"[\w.,@:-]+")
SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)($|_)", re.IGNORECASE)
"""In the name of a variable that holds a credential."""

Write = Callable[[argparse.Namespace, Recipe], str]
"""Makes the text of a file."""


def write_launch(options: argparse.Namespace, write: Write) -> None:
    """Writes the file to --out, or to standard output."""
    recipe = load_recipe(options.recipe, options.overrides)
    text = write(options, recipe)
    if options.out is None:
        print(text, end="")
    else:
        storage.write_text(str(options.out.absolute()), text)
        print(f"wrote {options.out}", file=sys.stderr)


def plan_of(options: argparse.Namespace, recipe: Recipe) -> LaunchPlan:
    """The plan of a run, which all forms share.

    Raises:
        ConfigError: an option makes no sense.
        WorkspaceError: the workspace carries credentials, or is none.
        ResourceError: an actor does not fit one machine, or the memory does not suffice.
    """
    workspace = absolute_place(options.workspace or os.environ.get("VRM_WORKSPACE") or f"~/vrm-runs/{recipe.name}")
    launched_on = machine_of(options, recipe, needs_gpu=recipe.cluster.needs_gpus)
    plan = plan_launch(
        recipe,
        command=("vrm", "run", options.recipe, "--workspace", workspace, *options.overrides),
        environment=_environment(options.env),
        machine=launched_on,
    )
    if launched_on.gpus:
        check_memory(recipe, plan_rollouts(recipe, []), machine=launched_on)
    return plan


def machine_of(options: argparse.Namespace, recipe: Recipe, *, needs_gpu: bool) -> Machine:
    """The machine that the options name, else the recipe, else the usual one.

    Raises:
        ConfigError: the recipe is planned for another accelerator, or as `machine`.
    """
    named = recipe.cluster.accelerator
    planned = named if named != "auto" and needs_gpu else None
    if planned and options.accelerator and options.accelerator.lower() != planned:
        raise ConfigError(
            f"--accelerator {options.accelerator}, but the recipe is planned for cluster.accelerator = {planned}. "
            f"Leave the option out, or add cluster.accelerator={options.accelerator}."
        )
    return machine(
        options.accelerator or planned or ("h100" if needs_gpu else "cpu"),
        cpus=options.cpus_per_node,
        gpus=options.gpus_per_node,
        memory_gib=options.memory_gib_per_node,
    )


def _environment(given: list[str]) -> dict[str, str]:
    wrong = [pair for pair in given if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", pair)]
    if wrong:
        raise ConfigError(f"--env {wrong[0]} is not of the form NAME=VALUE.")
    secret = next((pair.partition("=")[0] for pair in given if SECRET.search(pair.partition("=")[0])), None)
    if secret is not None:
        raise ConfigError(
            f"--env {secret}: its value would stand in the file. On Kubernetes, name a Secret that has {secret} with "
            "--secret. Elsewhere set the variable in the shell that calls sbatch, or on every node before `ray start`."
        )
    return {name: value for name, _, value in (pair.partition("=") for pair in given)}


# ----------------------------------------------------------------------------- Kubernetes


def kubernetes_manifest(options: argparse.Namespace, recipe: Recipe) -> str:
    """
    Raises:
        ConfigError: a pod would not find what an option names.
    """
    pods = PodSettings(image=options.image, secret=options.secret, volume_claim=options.volume_claim)
    ray_version = _ray_version()
    if options.serve is not None:
        _require_reachable(options.serve, "--serve", pods)
        if pods.secret is None:
            raise ConfigError(
                f"--serve needs --secret NAME, a Secret with {TOKEN_VARIABLE}: without a token the service refuses "
                f"nobody. kubectl create secret generic NAME --from-literal={TOKEN_VARIABLE}=..."
            )
        storage.check_uri(options.serve)
        scoring = recipe.cluster.scoring
        plan = plan_service(
            recipe,
            environment=_environment(options.env),
            machine=machine_of(options, recipe, needs_gpu=scoring.gpus_per_replica > 0),
        )
        return as_yaml(ray_service(plan, pods, ray_version=ray_version, model=options.serve, scoring=scoring), plan)
    if options.recipe not in recipe_names():
        raise ConfigError(
            f"{options.recipe} is a file of this machine, which a pod does not have. Add it to jobs/recipes of the "
            "image and give its name."
        )
    plan = plan_of(options, recipe)
    _require_reachable(plan.command[plan.command.index("--workspace") + 1], "--workspace", pods)
    return as_yaml(ray_job(plan, pods, ray_version=ray_version), plan)


def _require_reachable(place: str, option: str, pods: PodSettings) -> None:
    if not storage.is_local(place):
        return
    path = os.path.normpath(storage.local_path(place))
    if pods.volume_claim is None or not path.startswith(f"{VOLUME_PATH}/"):
        raise ConfigError(
            f"{option} {place} is inside a pod, and lost with it. Give a URI, or name a PersistentVolumeClaim with "
            f"--volume-claim and a path below {VOLUME_PATH}/, where it is mounted."
        )


def _ray_version() -> str:
    """
    Raises:
        ConfigError: ray is not installed here, so nobody knows which version the image has.
    """
    try:
        return version("ray")
    except PackageNotFoundError as error:
        raise ConfigError("ray is not installed here; the manifest names the version that the image has.") from error


def _kubernetes_options(parser: argparse.ArgumentParser) -> None:
    _shared_options(parser)
    parser.add_argument("--image", required=True, help="of the Dockerfile, as the cluster pulls it")
    parser.add_argument("--secret", metavar="NAME", help="Secret with credentials; its keys become variables")
    parser.add_argument("--volume-claim", metavar="NAME", help=f"claim to mount at {VOLUME_PATH} on every node")
    parser.add_argument("--serve", metavar="MODEL", help="write a RayService of this reward model instead")


# ----------------------------------------------------------------------------- Slurm


def slurm_script(options: argparse.Namespace, recipe: Recipe) -> str:
    """
    Raises:
        ConfigError: time, partition or account is none.
    """
    if not TIME.fullmatch(options.time):
        raise ConfigError(f"--time {options.time} is no time for sbatch. Write HH:MM:SS, or D-HH:MM:SS.")
    for option in ("partition", "account"):
        name = getattr(options, option)
        if name is not None and not SLURM_NAME.fullmatch(name):
            raise ConfigError(f"--{option} {name!r} is no name for sbatch. Write one word.")
    settings = SlurmSettings(time=options.time, partition=options.partition, account=options.account)
    return sbatch_script(plan_of(options, recipe), settings)


def _slurm_options(parser: argparse.ArgumentParser) -> None:
    _shared_options(parser)
    parser.add_argument("--time", default="24:00:00", help="wall time for sbatch (24:00:00)")
    parser.add_argument("--partition", help="Slurm's partition; the site's default without it")
    parser.add_argument("--account", help="Slurm's account; the user's default without it")


# ----------------------------------------------------------------------------- ssh


def ssh_file(options: argparse.Namespace, recipe: Recipe) -> str:
    file = "FILE" if options.out is None else str(options.out)
    return cluster_file(plan_of(options, recipe), hosts=options.hosts, user=options.user, file=file)


def _ssh_options(parser: argparse.ArgumentParser) -> None:
    _shared_options(parser)
    parser.add_argument("--hosts", nargs="+", required=True, metavar="HOST", help="addresses; the first is the head")
    parser.add_argument("--user", default="ray", help="to log in as (ray)")


# ----------------------------------------------------------------------------- commands


def _shared_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "recipe", help="a name (`vrm recipes` lists them), or a path to a .yaml file")
    parser.add_argument("--workspace", help="place that every node sees (VRM_WORKSPACE, or ~/vrm-runs/<recipe>)")
    parser.add_argument("--accelerator", help=f"{', '.join(MACHINES)} (by the recipe: h100 or cpu)")
    for resource, unit in (("cpus", "CPUs"), ("gpus", "GPUs"), ("memory-gib", "memory, GiB")):
        parser.add_argument(f"--{resource}-per-node", type=int, metavar="N", help=f"{unit} of a node (as usual)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every node; repeatable")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write (standard output)")
    add_overrides(parser, "as in alignment.num_steps=50")


def _command(
    what: str,
    add_options: Callable[[argparse.ArgumentParser], None],
    write: Callable[[argparse.Namespace, Recipe], str],
) -> Command:
    return Command(
        documentation=f"Writes {what}, from the plan that --dry-run shows.",
        add_options=add_options,
        run=partial(write_launch, write=write),
        check_options=_check_options,
    )


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name in ("cpus_per_node", "memory_gib_per_node"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: a node has at least one")
    if options.gpus_per_node is not None and options.gpus_per_node < 0:
        parser.error(f"--gpus-per-node {options.gpus_per_node}: a node cannot have less than none")


kubernetes_command = _command("a KubeRay RayJob that runs a recipe", _kubernetes_options, kubernetes_manifest)
slurm_command = _command("a batch script for Slurm", _slurm_options, slurm_script)
ssh_command = _command("a file for Ray's cluster launcher", _ssh_options, ssh_file)
