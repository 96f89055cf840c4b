"""The serving job, in a process of its own: whether Ray runs is a fact of the whole process."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.learners import reward_card, statistics_of

SERVE = """
import os, sys
import ray
from actors import vrm_service
from jobs.serve_reward_model import main
from ray._private.utils import read_ray_address

def start_service(*settings, **named):
    assert read_ray_address() == "127.0.0.1:9", "the test lays it there"
    assert ray.is_initialized(), "Serve would look for the cluster that ran last"
    assert ray.get_runtime_context().gcs_address != "127.0.0.1:9"
    assert ray.get_runtime_context().namespace.startswith("local-")
    print("served", flush=True)
    raise KeyboardInterrupt

vrm_service.start_service = start_service
vrm_service.stop_service = lambda: None
main()
assert not ray.is_initialized(), "what was started must be shut down"
"""


@pytest.mark.components
def test_the_address_of_a_cluster_that_ended_does_not_mislead_the_job(world, tmp_path):
    """Ray leaves it behind when a head node goes; `ray.init()` without an address waits a minute for it."""
    (tmp_path / "reward_model.json").write_text(reward_card("vrm", statistics_of(world)).model_dump_json())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray's own folder is everybody's; and the path of a socket must be short.
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "ray").mkdir()
        (Path(directory) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        run = subprocess.run(
            [sys.executable, "-c", SERVE, "--model", str(tmp_path), "--port", "0"],
            env=environment | {"RAY_TMPDIR": directory},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
    assert (run.returncode, run.stdout.count("served")) == (0, 1), run.stderr
