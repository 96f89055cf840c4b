"""What a recipe holds at once, and what would fit when it does not."""

import pytest

from cluster.resources import Demand, StageDemand, check_plan, plan_resources, plan_table, this_machine
from pipeline.config.cluster import ClusterConfig, RanksConfig, RolloutConfig, ScoringConfig
from pipeline.config.load import load_recipe
from pipeline.errors import ResourceError

CLUSTER = ClusterConfig(
    sft=RanksConfig(ranks=2, cpus_per_rank=1),
    reward=RanksConfig(ranks=4, cpus_per_rank=1),
    alignment=RanksConfig(ranks=2, cpus_per_rank=1, gpus_per_rank=1),
    rollout=RolloutConfig(workers=3, cpus_per_worker=2, gpus_per_worker=1),
    scoring=ScoringConfig(replicas=1, cpus_per_replica=0.5),
)


def node(cpus, gpus=0):
    return {"CPU": cpus, "GPU": gpus}


def refusal(nodes, cluster=CLUSTER):
    with pytest.raises(ResourceError) as error:
        check_plan(plan_resources(cluster), nodes)
    return str(error.value)


def test_alignment_holds_ranks_engines_and_scorers_together():
    totals = {stage.stage: (stage.total("CPU"), stage.total("GPU")) for stage in plan_resources(CLUSTER)}
    assert totals == {
        "sft": (2, 0),
        "train_reward_model": (4, 0),
        "align_policy": (2 * 1 + 3 * 2 + 0.5, 5),
        "generate_benchmark": (3 * 2 + 0.5, 3),
    }


def test_a_service_that_sleeps_is_planned_with_the_replica_that_will_wake():
    scoring = ScoringConfig(replicas=0, max_replicas=4, cpus_per_replica=0.5)
    *_, benchmark = plan_resources(CLUSTER.model_copy(update={"scoring": scoring}))
    assert benchmark.total("CPU") == 3 * 2 + 0.5


def test_a_plan_that_fits_exactly_is_accepted():
    check_plan(plan_resources(CLUSTER), [node(8.5, 5)])
    check_plan(plan_resources(CLUSTER), [node(4, 2), node(4.5, 3)])


def test_fractions_that_add_up_to_the_whole_fit():
    demand = Demand(role="rank", setting="cluster.alignment.ranks", count=10, cpus=0.1, gpus=0.0)
    check_plan([StageDemand(stage="align_policy", demands=(demand,))], [node(1.0)])


def test_the_refusal_names_need_have_and_what_would_fit():
    assert refusal([node(8.5, 4)]) == (
        "stage align_policy needs 8.5 CPU and 5 GPU at once; there are 8.5 CPU and 4 GPU on 1 node(s). "
        "cluster.alignment.ranks=1 or cluster.rollout.workers=2 would fit; or add a node."
    )


def test_what_the_refusal_proposes_does_fit():
    smaller = CLUSTER.model_copy(update={"rollout": CLUSTER.rollout.model_copy(update={"workers": 2})})
    check_plan(plan_resources(smaller), [node(8.5, 4)])


def test_when_no_single_change_fits_one_of_each_is_proposed():
    message = refusal([node(4, 2)])
    assert "cluster.alignment.ranks=1 cluster.rollout.workers=1 cluster.scoring.replicas=1 would fit" in message


def test_when_not_even_one_of_each_fits_the_shares_are_named():
    message = refusal([node(4, 1)])
    assert "Not even one of each fits: training rank 1 CPU and 1 GPU (cluster.alignment)" in message
    assert "rollout worker 2 CPU and 1 GPU (cluster.rollout)" in message


def test_an_actor_never_spans_nodes():
    cluster = ClusterConfig(rollout=RolloutConfig(workers=1, cpus_per_worker=3))
    message = refusal([node(2), node(2)], cluster)
    assert "takes 3 CPU and 0 GPU and never spans nodes; the largest node has 2 CPU and 0 GPU" in message
    wide = ClusterConfig(rollout=RolloutConfig(workers=1, gpus_per_worker=16))
    assert "Set cluster.rollout.gpus_per_worker=8 and more workers, or add a larger node" in refusal([node(9, 8)], wide)


def test_the_first_stage_that_does_not_fit_is_named():
    assert refusal([node(3, 8)]).startswith("stage train_reward_model needs 4 CPU")


def test_thousands_of_workers_are_refused_quickly():
    cluster = CLUSTER.model_copy(update={"rollout": RolloutConfig(workers=100_000, cpus_per_worker=0.5)})
    assert "cluster.rollout.workers=11 would fit" in refusal([node(8, 2)], cluster)


def test_the_table_shows_every_role_and_the_peak():
    lines = plan_table(plan_resources(CLUSTER)).splitlines()
    assert "align_policy        rollout worker         3         2         1" in lines
    assert lines[-1].split() == ["at", "most", "at", "once", "8.5", "5"]


@pytest.mark.parametrize("name", ["paper_qwen2.5_7b", "paper_qwen3_8b"])
def test_the_paper_recipes_fill_one_node_of_eight_gpus(name):
    plan = plan_resources(load_recipe(name).cluster, "colocated")
    check_plan(plan, [node(96, 8)])
    assert max(stage.total("GPU") for stage in plan) == 8


@pytest.mark.parametrize("name", ["tiny", "smollm2_cpu"])
def test_the_cpu_recipes_fit_two_cores(name):
    check_plan(plan_resources(load_recipe(name).cluster), [node(2)])


def test_this_machine_has_a_core():
    assert this_machine()["CPU"] >= 1
