"""What a recipe's stages hold at the same time, and whether a cluster has it. Imports no ray: a dry run must be quick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.schema import ClusterConfig, RanksConfig
from pipeline.errors import ResourceError

TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Demand:
    """`count` actors of one role, each with the same share of a node."""

    role: str
    setting: str
    """The recipe's key that sets the count."""
    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class StageDemand:
    """All that one stage holds together."""

    stage: str
    demands: tuple[Demand, ...]

    def total(self, resource: str) -> float:
        return sum(d.count * (d.cpus if resource == "CPU" else d.gpus) for d in self.demands)


def plan_resources(cluster: ClusterConfig) -> tuple[StageDemand, ...]:
    """Stage by stage, in order. Rollout workers and scoring replicas stay up from alignment through the benchmark."""
    rollout = Demand(
        role="rollout worker",
        setting="cluster.rollout.workers",
        count=cluster.rollout.workers,
        cpus=cluster.rollout.cpus_per_worker,
        gpus=cluster.rollout.gpus_per_worker,
    )
    scoring = Demand(
        role="scoring replica",
        setting="cluster.scoring.replicas",
        count=cluster.scoring.replicas,
        cpus=cluster.scoring.cpus_per_replica,
        gpus=cluster.scoring.gpus_per_replica,
    )
    return (
        StageDemand(stage="prepare_policy", demands=(_ranks("policy_training", cluster.policy_training),)),
        StageDemand(stage="train_reward_model", demands=(_ranks("reward_training", cluster.reward_training),)),
        StageDemand(stage="align_policy", demands=(_ranks("alignment", cluster.alignment), rollout, scoring)),
        StageDemand(stage="generate_benchmark", demands=(rollout, scoring)),
    )


def _ranks(section: str, ranks: RanksConfig) -> Demand:
    return Demand(
        role="training rank",
        setting=f"cluster.{section}.ranks",
        count=ranks.ranks,
        cpus=ranks.cpus_per_rank,
        gpus=ranks.gpus_per_rank,
    )


def as_table(plan: Sequence[StageDemand]) -> str:
    """The plan for a terminal."""
    lines = [f"{'stage':<20}{'role':<18}{'count':>6}{'CPU each':>10}{'GPU each':>10}"]
    for stage in plan:
        for demand in stage.demands:
            lines.append(
                f"{stage.stage:<20}{demand.role:<18}{demand.count:>6}{demand.cpus:>10g}{demand.gpus:>10g}"
            )
        lines.append(f"{'':<20}{'together':<18}{'':>6}{stage.total('CPU'):>10g}{stage.total('GPU'):>10g}")
    return "\n".join(lines)


def check_plan(plan: Sequence[StageDemand], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises unless every stage fits the nodes, before any actor starts.

    Args:
        plan: from `plan_resources`.
        nodes: each node's total {"CPU": ..., "GPU": ...}.

    Raises:
        ResourceError: names stage, need, have, and what would fit.
    """
    for stage in plan:
        placed = _place(stage.demands, nodes)
        if placed is None:
            continue
        culprit, fits = placed
        have = {r: sum(node.get(r, 0.0) for node in nodes) for r in ("CPU", "GPU")}
        cure = (
            f"{culprit.setting}={fits} would fit"
            if fits
            else f"not even one {culprit.role} ({culprit.cpus:g} CPU, {culprit.gpus:g} GPU) fits beside the others"
        )
        raise ResourceError(
            f"stage {stage.stage} needs {stage.total('CPU'):g} CPU and {stage.total('GPU'):g} GPU at once; the cluster has "
            f"{have['CPU']:g} CPU and {have['GPU']:g} GPU on {len(nodes)} node(s). "
            f"{cure}: lower it or the share of each, or add a node."
        )


def _place(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> tuple[Demand, int] | None:
    """First fit, largest actors first. None when all fit, else the demand that did not and how many of it did."""
    free = [{"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0)} for node in nodes]
    for demand in sorted(demands, key=lambda d: (-d.gpus, -d.cpus)):
        for placed in range(demand.count):
            home = next(
                (
                    n
                    for n in free
                    if n["CPU"] + TOLERANCE >= demand.cpus and n["GPU"] + TOLERANCE >= demand.gpus
                ),
                None,
            )
            if home is None:
                return demand, placed
            home["CPU"] -= demand.cpus
            home["GPU"] -= demand.gpus
    return None
