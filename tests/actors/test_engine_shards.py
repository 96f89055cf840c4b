"""What holds for engines of several shards, without an engine."""

import subprocess
import sys

import psutil
import pytest

from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.errors import ConfigError
from tests.support.paths import ROOT

STARTS_A_SHARD = """
import multiprocessing, signal, time
from actors.process_end import end_with_the_parent

def shard(started):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_the_parent()
    started.set()
    while True:
        pass

if __name__ == "__main__":
    end_with_the_parent()  # of a process that nobody started by multiprocessing
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=shard, args=(started,), daemon=True)
    process.start()
    started.wait()
    print(process.pid, flush=True)
    time.sleep(60)
"""


def test_a_shard_that_waits_for_others_ends_with_a_killed_engine(tmp_path):
    script = tmp_path / "engine.py"
    script.write_text(STARTS_A_SHARD)
    environment = {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as engine:
        shard = psutil.Process(int(engine.stdout.readline()))
        assert shard.is_running()
        engine.kill()
    assert psutil.wait_procs([shard], timeout=20)[1] == []


def test_shards_that_do_not_divide_the_heads_are_refused_before_any_actor_starts(tiny_policy, monkeypatch):
    monkeypatch.setattr("actors.rollout_fleet.start_worker", lambda *_: pytest.fail("a worker was asked for"))
    settings = EngineSettings(model_uri=tiny_policy, dtype="float32", max_model_len=8, gate_tolerance=1e-4, seed=0)
    with pytest.raises(
        ConfigError, match=r"of 3 shards .* cannot divide .* 2 attention heads, 1 .*Possible are 1, 2\."
    ):
        RolloutPool(settings, RolloutConfig(tensor_parallel_size=3), DeadlinesConfig())
