"""What a recipe's stages hold at the same time, and whether a cluster has it.

Imports no ray: a dry run must be quick.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.engine_build import resolve_rollout
from pipeline.config.cluster import ClusterConfig, RanksConfig, RolloutPlacement
from pipeline.errors import ResourceError

TOLERANCE = 1e-6
TRAIN_REWARD_MODEL = "train_reward_model"
MOST_WORKERS = 1024
"""Nobody asks for more rollout workers."""


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


def plan_resources(
    cluster: ClusterConfig,
    placement: RolloutPlacement = "disaggregated",
    *,
    judge: bool = False,
    reward_model: bool = True,
    other_models: int = 0,
    functions: int = 0,
    samples: bool = True,
) -> tuple[StageDemand, ...]:
    """What each stage holds, in the order of the stages.

    Rollout workers and scoring replicas stay up from alignment through the benchmark; an alignment that samples nothing
    does not start them.

    Args:
        placement: where the rollout workers stand (`cluster/rollout_plan.py`). Workers that share the learner's GPUs
            keep them reserved for both.
        judge: whether a judge scores beside the reward model in the benchmark.
        reward_model: whether the run trains a reward model and serves it.
        other_models: further reward models that are served while the policy is aligned.
        functions: rewards that run in processes of their own.
        samples: whether the alignment samples responses and has them scored (`AlignmentConfig.samples_prompts`).
    """
    scoring, learning = _scoring(cluster), _ranks("alignment", cluster.alignment)
    services = replace(scoring, count=scoring.count * (reward_model + other_models))
    processes = Demand(
        role="reward function",
        setting="cluster.reward_functions.processes",
        count=cluster.reward_functions.processes * functions,
        cpus=cluster.reward_functions.cpus_per_process,
        gpus=0.0,
    )
    rewards = tuple(demand for demand in (services, processes) if demand.count)
    if placement == "colocated":
        shared = Demand(
            role="rank and engine",
            setting="cluster.alignment.ranks",
            count=cluster.alignment.ranks,
            cpus=cluster.alignment.cpus_per_rank + cluster.rollout.cpus_per_worker,
            gpus=cluster.alignment.gpus_per_rank,
        )
        aligning = sampling = [shared]
    else:
        rollout = _rollout(cluster)
        aligning, sampling = [learning, rollout], [rollout]
    return (
        StageDemand(stage="sft", demands=(_ranks("sft", cluster.sft),)),
        *([StageDemand(stage=TRAIN_REWARD_MODEL, demands=(_ranks("reward", cluster.reward),))] if reward_model else []),
        StageDemand(stage="align_policy", demands=(*aligning, *rewards) if samples else (learning,)),
        StageDemand(
            stage="generate_benchmark",
            demands=(*sampling, *rewards, *([replace(scoring, role="judge's replica")] if judge else [])),
        ),
    )


def room_for_workers(cluster: ClusterConfig, placement: RolloutPlacement, nodes: Sequence[Mapping[str, float]]) -> int:
    """The most rollout workers that an alignment can have beside the rest of it, as the nodes are now."""
    if placement == "colocated":
        return cluster.alignment.ranks
    [aligning] = [stage for stage in plan_resources(cluster) if stage.stage == "align_policy"]
    workers = _rollout(cluster)
    others = [demand for demand in aligning.demands if demand.role != workers.role]
    return _largest_count(others, workers, nodes, below=MOST_WORKERS + 1)


def plan_generation(cluster: ClusterConfig) -> tuple[StageDemand, ...]:
    """Rollout workers alone, for answers that nothing scores."""
    return (StageDemand(stage="generate_benchmark", demands=(_rollout(cluster),)),)


def plan_serving(cluster: ClusterConfig) -> tuple[StageDemand, ...]:
    """Scoring replicas alone, for a reward model that users ask."""
    return (StageDemand(stage="serve", demands=(_scoring(cluster),)),)


def _scoring(cluster: ClusterConfig) -> Demand:
    return Demand(
        role="scoring replica",
        setting="cluster.scoring.replicas",
        count=max(1, cluster.scoring.replicas),
        cpus=cluster.scoring.cpus_per_replica,
        gpus=cluster.scoring.gpus_per_replica,
    )


def _rollout(cluster: ClusterConfig) -> Demand:
    return Demand(
        role="rollout worker",
        setting="cluster.rollout.workers",
        count=cluster.rollout.workers,
        cpus=cluster.rollout.cpus_per_worker,
        gpus=resolve_rollout(cluster.rollout).gpus_per_worker,
    )


def _ranks(section: str, ranks: RanksConfig) -> Demand:
    return Demand(
        role="training rank",
        setting=f"cluster.{section}.ranks",
        count=ranks.ranks,
        cpus=ranks.cpus_per_rank,
        gpus=ranks.gpus_per_rank,
    )


def plan_table(plan: Sequence[StageDemand]) -> str:
    """The plan for a terminal."""
    lines = [f"{'stage':<20}{'role':<18}{'count':>6}{'CPU each':>10}{'GPU each':>10}"]
    for stage in plan:
        for demand in stage.demands:
            lines.append(f"{stage.stage:<20}{demand.role:<18}{demand.count:>6}{demand.cpus:>10g}{demand.gpus:>10g}")
        lines.append(f"{'':<20}{'together':<18}{'':>6}{stage.total('CPU'):>10g}{stage.total('GPU'):>10g}")
    peak = {resource: max(stage.total(resource) for stage in plan) for resource in ("CPU", "GPU")}
    lines.append(f"{'at most at once':<20}{'':<18}{'':>6}{peak['CPU']:>10g}{peak['GPU']:>10g}")
    return "\n".join(lines)


def fits(plan: Sequence[StageDemand], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether the nodes have what every stage needs at once."""
    return all(_fits(stage.demands, nodes) for stage in plan)


def check_plan(plan: Sequence[StageDemand], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises unless every stage fits the nodes, before any actor starts.

    Args:
        plan: from `plan_resources`.
        nodes: each node's total {"CPU": ..., "GPU": ...}.

    Raises:
        ResourceError: names stage, need, have, and what would fit.
    """
    for stage in plan:
        for demand in stage.demands:
            require_node_for(demand, stage.stage, nodes)
        if not _fits(stage.demands, nodes):
            cpus, gpus = (sum(node.get(resource, 0.0) for node in nodes) for resource in ("CPU", "GPU"))
            raise ResourceError(
                f"stage {stage.stage} needs {stage.total('CPU'):g} CPU and {stage.total('GPU'):g} GPU at once; "
                f"there are {cpus:g} CPU and {gpus:g} GPU on {len(nodes)} node(s). {_what_fits(stage.demands, nodes)}"
            )


def require_node_for(demand: Demand, stage: str, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises ResourceError for an actor that is larger than every node: it never spans nodes."""
    if any(_fits([replace(demand, count=1)], [node]) for node in nodes):
        return
    cpus, gpus = (max((node.get(resource, 0.0) for node in nodes), default=0.0) for resource in ("CPU", "GPU"))
    section = demand.setting.rpartition(".")[0]
    remedy = f"Lower what each takes ({section})"
    if demand.setting == "cluster.rollout.workers" and demand.gpus > max(1.0, gpus):
        remedy = f"Set {section}.gpus_per_worker={max(1, int(gpus))} and more workers"
    raise ResourceError(
        f"a {demand.role} of stage {stage} takes {demand.cpus:g} CPU and {demand.gpus:g} GPU and never spans nodes; "
        f"the largest node has {cpus:g} CPU and {gpus:g} GPU. {remedy}, or add a larger node."
    )


def this_machine() -> dict[str, float]:
    """CPUs and NVIDIA GPUs of this machine, without asking Ray."""
    gpus = [name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)] if os.path.isdir("/dev") else []
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(len(gpus))}


def _what_fits(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> str:
    """The cure: one count to lower, or all of them, or the shares themselves."""
    single = []
    for n, demand in enumerate(demands):
        count = _largest_count([*demands[:n], *demands[n + 1 :]], demand, nodes, below=demand.count)
        if count:
            single.append(f"{demand.setting}={count}")
    if single:
        return f"{' or '.join(single)} would fit; or add a node."
    if _fits([replace(demand, count=1) for demand in demands], nodes):
        return f"{' '.join(f'{demand.setting}=1' for demand in demands)} would fit; or add a node."
    needs = ", ".join(f"{d.role} {d.cpus:g} CPU and {d.gpus:g} GPU ({d.setting.rpartition('.')[0]})" for d in demands)
    return f"Not even one of each fits: {needs}. Lower what each takes, or add a node."


def _largest_count(
    others: Sequence[Demand], demand: Demand, nodes: Sequence[Mapping[str, float]], *, below: int
) -> int:
    """The largest count of a demand that fits beside the others, by bisection; 0 where none does."""
    fits, too_many = 0, below
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        is_room = _fits([*others, replace(demand, count=middle)], nodes)
        fits, too_many = (middle, too_many) if is_room else (fits, middle)
    return fits


def _fits(demands: Sequence[Demand], nodes: Sequence[Mapping[str, float]]) -> bool:
    """First fit, largest actors first: an actor never spans nodes."""
    free = [{"CPU": node.get("CPU", 0.0), "GPU": node.get("GPU", 0.0)} for node in nodes]
    for demand in sorted(demands, key=lambda d: (-d.gpus, -d.cpus)):
        for _ in range(demand.count):
            homes = (n for n in free if n["CPU"] + TOLERANCE >= demand.cpus and n["GPU"] + TOLERANCE >= demand.gpus)
            home = next(homes, None)
            if home is None:
                return False
            home["CPU"] -= demand.cpus
            home["GPU"] -= demand.gpus
    return True
