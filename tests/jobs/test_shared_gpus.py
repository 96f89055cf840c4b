"""PPO alignment where ranks and engines share GPUs: what the plan decides reaches the actors that are to do it."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
import ray

import actors.rank_group
import actors.rollout_pool
import pipeline.loops.align_policy
from cluster.rollout_plan import RolloutPlan, plan_rollouts
from cluster.rollout_room import RolloutRoom
from jobs.align_policy import align_policy
from jobs.shared_actors import SharedActors
from pipeline.config.load import load_recipe
from pipeline.data.planted import OBJECTIVES
from pipeline.data.run_data import load_data
from pipeline.models.reward_model import CARD_FILE, RewardModelCard
from pipeline.records import PolicyWeights, StageResult
from pipeline.stages.runner import StageRunner
from pipeline.stages.workspace import Workspace
from tests.jobs.idle_actors import IdleRank, IdleWorker, gpu
from tests.support.learners import HEAD
from tests.support.nodes import Node

pytestmark = pytest.mark.components

SHARED = (
    "data.planted.num_train_pairs=16",
    "data.planted.num_heldout_pairs=8",
    "data.planted.num_sft_texts=8",
    "data.planted.num_train_prompts=8",
    "data.planted.num_heldout_prompts=8",
    "alignment.ppo.critic=value_head",
    "cluster.rollout.placement=colocated",
    "cluster.alignment.ranks=2",
    "cluster.alignment.cpus_per_rank=0.75",
    "cluster.alignment.gpus_per_rank=1",
    "cluster.rollout.workers=2",
    "cluster.rollout.cpus_per_worker=0.25",
    "cluster.rollout.gpus_per_worker=1",
    "cluster.deadlines.start_s=120",
)


@pytest.fixture
def two_gpus(local_ray):
    node = Node(num_cpus=2, num_gpus=2)
    yield node.id
    node.lose_power()


def test_a_rank_and_an_engine_share_each_gpu_and_weights_pass_within_it(
    two_gpus, tiny_policy, tokenizer, tmp_path, monkeypatch
):
    """Bundles of 0.75 + 0.25 CPU and a GPU, of which either has half."""
    monkeypatch.setattr(actors.rank_group, "Rank", IdleRank)
    open_pool = actors.rollout_pool.RolloutPool

    def pool_of(*arguments, actors, **settings):
        return open_pool(*arguments, actors=replace(actors, worker=IdleWorker), **settings)

    monkeypatch.setattr(actors.rollout_pool, "RolloutPool", pool_of)
    monkeypatch.setattr(SharedActors, "scorer", lambda *_: None)
    seen = {}

    def align(rollouts, rewards, learner, prompts, stage, config, **_):
        weights = PolicyWeights(version=0, location="nowhere", probes=())
        metrics = rollouts.load_weights(weights)
        ranks, workers = learner._group._ranks, [worker.actor for worker in rollouts._fleet.workers]
        places = [actor.__ray_call__.remote(gpu) for actor in (*ranks, *workers)]
        seen["places"] = ray.get(places, timeout=60)
        seen["asked"] = ray.get([rank.asked.remote() for rank in ranks], timeout=60)
        seen["calls"] = ray.get([worker.calls.remote() for worker in workers], timeout=60)
        return metrics

    monkeypatch.setattr(pipeline.loops.align_policy, "align", align)
    recipe = load_recipe("tiny", SHARED)
    plan = plan_rollouts(recipe, [{"CPU": 2.0, "GPU": 2.0}])
    assert plan == RolloutPlan(placement="colocated", weight_transfer="ipc")
    statistics = {"score_mean": (0.0,) * 4, "score_std": (1.0,) * 4, "reward_mean": 0.0, "reward_std": 1.0}
    card = RewardModelCard(head="vrm", vrm=HEAD, objectives=OBJECTIVES, max_length=128, metrics={}, **statistics)
    (tmp_path / CARD_FILE).write_text(card.model_dump_json())
    policy, reward_model = (
        StageResult(name=name, location=str(place), fingerprint="0", metrics={})
        for name, place in (("sft", tiny_policy), ("train_reward_model", tmp_path))
    )
    with (
        Workspace.open(str(tmp_path / "run"), job="test", needs_bytes=0) as workspace,
        ExitStack() as exits,
    ):
        shared = SharedActors(recipe, plan, workspace.uri, exits, room=lambda: RolloutRoom(workers=2, reason=""))
        shared.publish_directory = str(tmp_path / "published")
        stages = StageRunner(workspace)
        result = align_policy(stages, recipe, lambda: load_data(recipe), shared, policy, reward_model)
        placement = shared.shared_gpus()
        assert placement.group.bundle_specs == [{"CPU": 1.0, "GPU": 1.0}] * 2
    ranks, engines = seen["places"][:2], seen["places"][2:]
    assert ranks == engines
    assert sorted(ranks) == [(two_gpus, "0", {0.5}), (two_gpus, "1", {0.5})]
    assert seen["asked"] == [[("ipc", 2, "float32", recipe.cluster.deadlines.weights_s)]] * 2
    # The learner is built while the engines sleep, and what its ranks sent is not read from a file.
    assert seen["calls"] == [[plan, "sleep", "accept"]] * 2
    assert result.metrics["weights/sent_between_gpus"] == 1.0
    assert result.metrics["memory/rank_peak_gib"] == 1.5
    assert result.metrics["memory/rollout_worker_peak_gib"] == 2.5
