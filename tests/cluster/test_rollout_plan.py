"""Where rollout engines stand, how weights reach them, and what is refused before any actor starts."""

import pytest

from cluster.resources import check_plan, plan_resources, plan_table
from cluster.rollout_plan import THROUGH_FILES, RolloutPlan, plan_rollouts
from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError

OWN_GPUS = RolloutPlan(placement="disaggregated", weight_transfer="nccl")
SHARED_GPUS = RolloutPlan(placement="colocated", weight_transfer="ipc")
WORKERS = "cluster.rollout.workers"


def on_gpus(*overrides):
    """Four ranks and four engines, a GPU each, and one GPU for the scoring service: nine."""
    apart = ["cluster.alignment.ranks=4", f"{WORKERS}=4", "cluster.rollout.placement=null"]
    return load_recipe("paper_qwen2.5_7b", [*apart, *overrides])


def node(gpus, cpus=96):
    return {"CPU": cpus, "GPU": gpus}


def test_engines_without_a_gpu_read_files():
    assert plan_rollouts(load_recipe("tiny"), [node(0, cpus=2)]) == THROUGH_FILES


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node(9)], OWN_GPUS),
        ([node(8), node(1)], OWN_GPUS),
        ([node(8)], SHARED_GPUS),
        ([node(4)], OWN_GPUS),  # nothing fits, and that is said of the usual placement
        ([], OWN_GPUS),
    ],
)
def test_engines_share_gpus_where_they_cannot_have_their_own(nodes, expected):
    assert plan_rollouts(on_gpus(), nodes) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.rollout.placement=colocated"], SHARED_GPUS),
        (["cluster.rollout.weight_transfer=ipc"], SHARED_GPUS),
        (["cluster.rollout.weight_transfer=shm"], RolloutPlan(placement="disaggregated", weight_transfer="shm")),
        (
            ["cluster.rollout.placement=colocated", "cluster.rollout.weight_transfer=shm"],
            RolloutPlan(placement="colocated", weight_transfer="shm"),
        ),
    ],
)
def test_what_the_recipe_says_is_what_is_done(overrides, expected):
    assert plan_rollouts(on_gpus(*overrides), [node(9)]) == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.rollout.placement=disaggregated"],
        ["cluster.rollout.weight_transfer=nccl"],
        ["alignment.prefetch=continue", "alignment.ppo.tis_cap=2"],  # engines must not sleep
        [f"{WORKERS}=5"],  # one too many for four GPUs
    ],
)
def test_gpus_are_not_shared_against_the_recipe(overrides):
    assert plan_rollouts(on_gpus(*overrides), [node(8)]) == OWN_GPUS


def test_shared_gpus_are_counted_once():
    plan = plan_resources(on_gpus().cluster, "colocated")
    check_plan(plan, [node(8)])
    assert [stage.total("GPU") for stage in plan if stage.stage in ("align_policy", "generate_benchmark")] == [5, 5]
    assert "align_policy        rank and engine        4         8         1" in plan_table(plan).splitlines()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster.rollout.placement=colocated", "cluster.rollout.weight_transfer=nccl"],
            r"NCCL knows one process a GPU; set weight_transfer=ipc",
        ),
        (
            ["cluster.rollout.placement=disaggregated", "cluster.rollout.weight_transfer=ipc"],
            r"within one GPU, .* set weight_transfer=nccl",
        ),
        (
            ["cluster.rollout.weight_transfer=nccl", "cluster.rollout.gpus_per_worker=0.5"],
            r"rollout.weight_transfer = nccl needs a whole GPU .*gpus_per_worker = 0.5 .*leave rollout.weight_tr",
        ),
        (
            ["cluster.rollout.placement=colocated", "cluster.alignment.gpus_per_rank=0"],
            r"rollout.placement = colocated needs a whole GPU .* alignment.gpus_per_rank = 0; set both to 1",
        ),
        (
            ["cluster.rollout.placement=colocated", f"{WORKERS}=5"],
            r"workers = 5 exceeds cluster.alignment.ranks = 4, .* set cluster.rollout.workers=4",
        ),
        (
            ["cluster.rollout.weight_transfer=ipc", "alignment.prefetch=continue", "alignment.ppo.tis_cap=2"],
            r"sleep while it works, but alignment.prefetch = continue samples while the learner works; set it to null",
        ),
    ],
)
def test_what_no_cluster_could_do_is_refused_with_the_cure(overrides, message):
    with pytest.raises(ConfigError, match=message):
        on_gpus(*overrides)


def test_the_plan_says_itself_in_a_sentence():
    assert str(SHARED_GPUS) == (
        "Rollout engines share the learner's GPUs and sleep while it works (colocated); weights reach them by CUDA "
        "IPC, within each GPU (ipc)."
    )
