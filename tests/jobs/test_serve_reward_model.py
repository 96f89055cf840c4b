"""The serving job, in a process of its own: whether Ray runs is a fact of the whole process."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.models.reward_model_card import read_card
from pipeline.stages.fingerprint import directory_fingerprint

SERVE = """
import os, sys
import ray
from actors import reward_service
from jobs.serve_reward_model import serve_reward_model_command
from ray._private.utils import read_ray_address

def start_service(*settings, **named):
    assert read_ray_address() == "127.0.0.1:9", "the test lays it there"
    assert ray.is_initialized(), "Serve would look for the cluster that ran last"
    assert ray.get_runtime_context().gcs_address != "127.0.0.1:9"
    assert ray.get_runtime_context().namespace.startswith("local-")

reward_service.start_service = start_service
reward_service.swap_model = lambda model, previous, *settings, **named: print("swapped", previous, "for", model)
reward_service.leave_service = lambda: print("stopped", flush=True)
serve_reward_model_command()
assert not ray.is_initialized(), "what was started must be shut down"
"""


@pytest.mark.components
def test_the_job_swaps_when_told_and_stops_when_interrupted(trained_reward_model, tmp_path):
    """Beside the address of a cluster that ended: `ray.init()` without an address would wait a minute for it."""
    card = read_card(trained_reward_model)
    models = [tmp_path / name for name in ("old", "new")]
    for number, model in enumerate(models):
        shutil.copytree(trained_reward_model, model)
        (model / "reward_model.json").write_text(card.model_copy(update={"reward_mean": number}).model_dump_json())
    old, new = map(str, models)
    current = tmp_path / "current"
    current.symlink_to(old)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray's own folder is everybody's; and the path of a socket must be short.
    with tempfile.TemporaryDirectory() as directory, open(tmp_path / "log", "w+", encoding="utf-8") as log:
        (Path(directory) / "ray").mkdir()
        (Path(directory) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        job = subprocess.Popen(
            [sys.executable, "-c", SERVE, "--model", str(current), "--port", "0", "--no-token"],
            env=environment | {"RAY_TMPDIR": directory},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

        def point_to(model, *, until):
            current.unlink()
            current.symlink_to(model)
            job.send_signal(signal.SIGUSR1)
            wait_for(until)

        def wait_for(words):
            gives_up = time.monotonic() + 180
            while words not in (printed := Path(log.name).read_text(encoding="utf-8")):
                assert job.poll() is None, printed
                assert time.monotonic() < gives_up, printed
                time.sleep(0.05)

        try:
            wait_for(f"({directory_fingerprint(old)[:12]}, {old}) at http://127.0.0.1:0, process {job.pid}")
            point_to(new, until=f"({directory_fingerprint(new)[:12]}, {new})\n")
            point_to(tmp_path, until=f"still serving {new}. CheckpointError: ")
            point_to(old, until=f"swapped {new} for {old}\n")
            job.send_signal(signal.SIGTERM)  # as a supervisor ends a service; SIGINT has the same handler
            wait_for("stopped")
            assert job.wait(timeout=120) == 0
        finally:
            job.kill()
            job.wait()
        assert Path(log.name).read_text(encoding="utf-8").count("swapped") == 2
