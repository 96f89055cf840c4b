"""Shards that do not divide a model never come as far as Ray."""

import pytest

from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.errors import ConfigError


def test_shards_that_do_not_divide_the_heads_are_refused_before_any_actor_starts(tiny_policy, monkeypatch):
    monkeypatch.setattr("actors.rollout_fleet.start_worker", lambda *_: pytest.fail("a worker was asked for"))
    settings = EngineSettings(model_uri=tiny_policy, dtype="float32", max_model_len=8, gate_tolerance=1e-4, seed=0)
    with pytest.raises(ConfigError, match=r"= 3 shards cannot divide .* 2 attention heads, 1 .*Possible are 1, 2\."):
        RolloutPool(settings, RolloutConfig(tensor_parallel_size=3), DeadlinesConfig())
