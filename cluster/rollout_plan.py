"""Where the rollout engines stand and how weights reach them: decided once, before any actor starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.engine_build import resolve_rollout
from cluster.resources import StageDemand, fits, plan_resources
from pipeline.config.cluster import RolloutPlacement, WeightTransfer
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RolloutPlan:
    """Where the engines stand, and the way of the weights to them."""

    placement: RolloutPlacement
    weight_transfer: WeightTransfer

    def __str__(self) -> str:
        places = {
            "disaggregated": "have resources of their own",
            "colocated": "share the learner's GPUs and sleep while it works",
        }
        ways = {"shm": "a file on each node", "nccl": "NCCL, from GPU to GPU", "ipc": "CUDA IPC, within each GPU"}
        return (
            f"Rollout engines {places[self.placement]} ({self.placement}); weights reach them by "
            f"{ways[self.weight_transfer]} ({self.weight_transfer})."
        )


@dataclass(frozen=True, kw_only=True)
class WeightReceivers:
    """What the engines have in common that take weights from the learner's GPUs."""

    weight_transfer: WeightTransfer
    dtype: str
    shards: int = 1
    """Processes of one engine, each on a GPU of its own."""


THROUGH_FILES = RolloutPlan(placement="disaggregated", weight_transfer="shm")
"""What engines without a GPU do, and those without a learner."""


def plan_rollouts(recipe: Recipe, nodes: Sequence[Mapping[str, float]]) -> RolloutPlan:
    """What the recipe says; where it leaves the choice, engines share GPUs only if they cannot have their own.

    Args:
        recipe: the schema has refused what no cluster could do.
        nodes: each node's total {"CPU": ..., "GPU": ...}; none where the cluster is not known yet.

    Raises:
        ConfigError: the recipe asks for transfers between GPUs, and the engines that are installed here have none.
    """
    cluster, rollout = recipe.cluster, recipe.cluster.rollout
    gpus_per_worker = resolve_rollout(rollout).gpus_per_worker
    message = cluster.why_gpus_do_not_suffice(gpus_per_worker)
    if message:
        raise ConfigError(f"cluster.{message}. The recipe leaves gpus_per_worker to the vLLM that is installed here.")
    shares = rollout.asks_for_shared_gpus or (
        rollout.placement is None
        and rollout.weight_transfer != "nccl"
        and recipe.could_share_gpus(gpus_per_worker)
        and not fits(plan_resources(cluster), nodes)
        and fits(plan_resources(cluster, "colocated"), nodes)
    )
    if shares:
        return RolloutPlan(placement="colocated", weight_transfer=rollout.weight_transfer or "ipc")
    default: WeightTransfer = "nccl" if cluster.takes_whole_gpus(gpus_per_worker) else "shm"
    return RolloutPlan(placement="disaggregated", weight_transfer=rollout.weight_transfer or default)


def plan_of_stages(recipe: Recipe, rollouts: RolloutPlan) -> tuple[StageDemand, ...]:
    """What each stage of the recipe holds, in the order of the stages."""
    alignment = recipe.alignment
    checkpoints = {s.model.place for s in alignment.rewards if s.model is not None and s.model.is_checkpoint}
    functions = sum(source.python is not None or source.math is not None for source in alignment.rewards)
    return plan_resources(
        recipe.cluster,
        rollouts.placement,
        judge=recipe.judge is not None,
        reward_model=recipe.scores_by_reward_model,
        other_models=len(checkpoints),
        functions=functions,
        samples=alignment.samples_prompts,
    )
