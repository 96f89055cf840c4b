"""What a wish for more rollout workers comes to: said when the wish is heard, not when it has failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.engine_build import resolve_rollout
from cluster.resources import room_for_workers
from cluster.rollout_plan import RolloutPlan
from pipeline.config.recipe import Recipe
from pipeline.stages.scaling_requests import published_room


@dataclass(frozen=True, kw_only=True)
class RolloutRoom:
    """How many rollout workers a job can have, as its cluster is now."""

    workers: int
    reason: str
    """What one more would need, and what becomes of those that find no room."""

    @classmethod
    def of(cls, recipe: Recipe, plan: RolloutPlan, nodes: Sequence[Mapping[str, float]]) -> RolloutRoom:
        """
        Args:
            nodes: each node's total {"CPU": ..., "GPU": ...}.
        """
        rollout = resolve_rollout(recipe.cluster.rollout)
        if plan.placement == "colocated":
            reason = "each shares a GPU with a rank of the learner. The others are not started."
        else:
            reason = (
                f"each takes {rollout.cpus_per_worker:g} CPU and {rollout.gpus_per_worker:g} GPU beside the learner "
                f"and the scoring service. The others wait {recipe.cluster.deadlines.start_s:g} s for another node, "
                "and are then given up."
            )
        return cls(workers=room_for_workers(recipe.cluster, plan.placement, nodes), reason=reason)

    def remark(self, asked: int) -> str:
        """What to tell whoever asks for so many workers; empty where there is room."""
        if asked <= self.workers:
            return ""
        return f"{asked} rollout workers asked, room for {self.workers}: {self.reason}"


def room_of_running_job(workspace: str) -> RolloutRoom | None:
    """As the job last wrote it down; None before it is on its cluster."""
    room = published_room(workspace)
    return None if room is None else RolloutRoom(**room)
