"""How many rollout workers find room beside the rest of an alignment."""

import pytest

from cluster.rollout_plan import THROUGH_FILES, RolloutPlan
from cluster.rollout_room import RolloutRoom
from pipeline.config.load import load_recipe

ONE_CPU_EACH = (
    "cluster.alignment.ranks=2",
    "cluster.alignment.cpus_per_rank=1",
    "cluster.scoring.cpus_per_replica=1",
    "cluster.rollout.workers=1",
    "cluster.rollout.cpus_per_worker=1",
    "cluster.rollout.gpus_per_worker=0",
)


@pytest.mark.parametrize(("nodes", "workers"), [([5], 2), ([4, 2], 3), ([3], 0), ([2.5, 1.5], 0), ([64], 61)])
def test_workers_have_what_learner_and_scorer_leave(nodes, workers):
    recipe = load_recipe("tiny", ONE_CPU_EACH)
    room = RolloutRoom.of(recipe, THROUGH_FILES, [{"CPU": cpus} for cpus in nodes])
    assert room.workers == workers
    assert room.remark(workers) == ""
    assert room.remark(workers + 1).startswith(
        f"{workers + 1} rollout workers asked, room for {workers}: each takes 1 CPU and 0 GPU beside the learner"
    )


def test_workers_that_share_the_learners_gpus_are_as_many_as_its_ranks():
    plan = RolloutPlan(placement="colocated", weight_transfer="ipc")
    room = RolloutRoom.of(load_recipe("tiny", ONE_CPU_EACH), plan, [{"CPU": 64.0, "GPU": 8.0}])
    assert room.workers == 2
    assert "shares a GPU with a rank" in room.remark(3)
