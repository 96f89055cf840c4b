"""How many machines a recipe's plan needs, and the command that they run: what all launch files are written from."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.engine_build import resolution_reasons
from cluster.launch.machines import Machine
from cluster.resources import StageDemand, fits, plan_serving, plan_table, require_node_for
from cluster.rollout_plan import plan_of_stages, plan_rollouts
from pipeline.config.cluster import ClusterConfig
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError, ResourceError

LONGEST_NAME = 47
"""Of a RayJob or a RayService: KubeRay appends to it, and a name has at most 63 characters."""
MOST_NODES = 1024
"""Nobody asks for more."""


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What a launch file says, whatever its form."""

    name: str
    """Of the launched thing: lower-case letters, digits and dashes, as Kubernetes wants it."""
    command: tuple[str, ...]
    """What the driver runs."""
    environment: Mapping[str, str]
    machine: Machine
    nodes: int
    most_nodes: int
    """With every pool as large as it may grow; equal to `nodes` where nothing grows."""
    grace_s: float
    remarks: tuple[str, ...]
    """What `--dry-run` says of the plan, line by line."""

    @property
    def shell_command(self) -> str:
        return shlex.join(self.command)

    @property
    def header(self) -> str:
        """Comment lines for the top of a file."""
        count = f"{self.nodes} node{'' if self.nodes == 1 else 's'} of {self.machine}"
        return "".join(f"# {line}".rstrip() + "\n" for line in (*self.remarks, "", f"{count}."))


def plan_launch(
    recipe: Recipe, *, command: Sequence[str], environment: Mapping[str, str], machine: Machine
) -> LaunchPlan:
    """The fewest machines on which every stage of a recipe fits.

    Args:
        command: what the driver runs.

    Raises:
        ConfigError: the recipe asks for transfers between GPUs that its engines do not have.
        ResourceError: an actor does not fit one of the machines.
    """
    rollouts = plan_rollouts(recipe, [])

    def plan_for(cluster: ClusterConfig) -> tuple[StageDemand, ...]:
        return plan_of_stages(recipe.model_copy(update={"cluster": cluster}), rollouts)

    plan = plan_for(recipe.cluster)
    return LaunchPlan(
        name=launch_name(recipe.name),
        command=tuple(command),
        environment=environment,
        machine=machine,
        nodes=nodes_for(plan, machine),
        most_nodes=nodes_for(plan_for(_grown(recipe.cluster)), machine),
        grace_s=recipe.cluster.deadlines.grace_s,
        remarks=(*plan_table(plan).splitlines(), "", str(rollouts), *resolution_reasons(recipe.cluster.rollout)),
    )


def plan_service(recipe: Recipe, *, environment: Mapping[str, str], machine: Machine) -> LaunchPlan:
    """The fewest machines that hold the scoring replicas alone."""
    plan, grown = plan_serving(recipe.cluster), plan_serving(_grown(recipe.cluster))
    return LaunchPlan(
        name=launch_name(recipe.name, suffix="-reward"),
        command=(),
        environment=environment,
        machine=machine,
        nodes=nodes_for(plan, machine),
        most_nodes=nodes_for(grown, machine),
        grace_s=recipe.cluster.deadlines.grace_s,
        remarks=tuple(plan_table(plan).splitlines()),
    )


def nodes_for(plan: Sequence[StageDemand], machine: Machine) -> int:
    """The fewest machines that hold every stage.

    Raises:
        ResourceError: an actor does not fit one machine, or more than `MOST_NODES` are needed.
    """
    for stage in plan:
        for demand in stage.demands:
            require_node_for(demand, stage.stage, [machine.resources])
    enough, too_few = 1, 0
    while not fits(plan, [machine.resources] * enough):
        if enough >= MOST_NODES:
            raise ResourceError(f"the plan does not fit {MOST_NODES} nodes of {machine}. Ask for fewer actors.")
        enough, too_few = min(2 * enough, MOST_NODES), enough
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        is_enough = fits(plan, [machine.resources] * middle)
        enough, too_few = (middle, too_few) if is_enough else (enough, middle)
    return enough


def _grown(cluster: ClusterConfig) -> ClusterConfig:
    """With every pool at its largest size."""
    rollout, scoring = cluster.rollout, cluster.scoring
    workers = rollout.workers if rollout.autoscale is None else max(rollout.workers, rollout.autoscale.max_workers)
    return cluster.model_copy(
        update={
            "rollout": rollout.model_copy(update={"workers": workers}),
            "scoring": scoring.model_copy(update={"replicas": scoring.max_replicas or scoring.replicas}),
        }
    )


def launch_name(recipe: str, *, suffix: str = "") -> str:
    """A name that Kubernetes, KubeRay, Slurm and Ray take: lower-case letters, digits, dashes, and not too many.

    Raises:
        ConfigError: nothing of the recipe's name is left.
    """
    most = LONGEST_NAME - len("vrm-") - len(suffix)
    name = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")[:most].rstrip("-")
    if not name:
        raise ConfigError(f"name: {recipe!r} of the recipe has no letter that a launch file could take.")
    return f"vrm-{name}{suffix}"
