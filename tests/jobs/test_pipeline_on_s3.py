"""The main job with its workspace on a real S3 server: killed, refused while it is held, taken over, resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.stages import storage
from pipeline.stages.ownership import read_owner
from tests.support.paths import ROOT

SMALLEST = (
    "data.planted.num_train_pairs=256",
    "data.planted.num_sft_texts=256",
    "data.planted.num_heldout_prompts=16",
    "data.planted.num_heldout_pairs=64",
    "sft.num_steps=4",
    "sft.eval_every=4",
    "reward.num_steps=8",
    "reward.checkpoint_every=2",
    "reward.eval_every=4",
    "alignment.num_steps=4",
    "alignment.prompts_per_step=16",
    "alignment.ppo.mini_batch_size=16",
    "alignment.checkpoint_every=1",
    "benchmark.num_prompts=16",
    "cluster.sft.ranks=1",
    "cluster.reward.ranks=1",
    "cluster.alignment.ranks=1",
    "cluster.rollout.workers=1",
)

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def start(workspace, log, *options):
    with open(log, "a") as output:
        return subprocess.Popen(
            [sys.executable, "jobs/full_pipeline.py", "--workspace", workspace, *options, *SMALLEST],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )


def names(uri, start):
    return [name for name in storage.list_directories(uri) if name.startswith(start)]


def test_the_main_job_on_s3_is_killed_refused_and_resumed(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    workspace, log = s3.new_place("runs/smallest"), tmp_path / "log"
    driver = start(workspace, log)
    stages, deadline = storage.join(workspace, "stages"), time.monotonic() + 400
    while not any(names(storage.join(stages, align, "checkpoints"), "step-") for align in names(stages, "align_")):
        assert driver.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, f"no checkpoint of align_policy yet: {log.read_text()[-2000:]}"
        time.sleep(0.5)
    refused = start(workspace, tmp_path / "refused")
    assert refused.wait(timeout=120) == 2
    assert f"is held by job local-{driver.pid}" in (tmp_path / "refused").read_text()
    driver.send_signal(signal.SIGKILL)
    driver.wait()

    resumed = start(workspace, log)  # without --take-over: the dead owner was a process of this machine
    assert resumed.wait(timeout=400) == 0, log.read_text()[-4000:]
    text = log.read_text()
    assert text.count("train_reward_model  finished before, skipped") == 1
    assert "align_policy        resumes after step" in text
    assert read_owner(workspace) is None
    manifests = [
        json.loads(storage.read_text(storage.join(stages, name, "manifest.json")))
        for name in storage.list_directories(stages)
    ]
    finished = {manifest["name"] for manifest in manifests}
    assert finished == {"sft", "train_reward_model", "align_policy", "generate_benchmark"}
    assert storage.read_text(storage.join(workspace, "report.html"))
    [align] = names(stages, "align_")
    assert storage.list_directories(storage.join(stages, align, "checkpoints")) == []
    assert any(method == "POST" and "uploads" in path for method, path in s3.requests)  # checkpoints go by parts
