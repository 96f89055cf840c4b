"""`alignment.algorithm=dpo` on real Ray and DeepSpeed, reduced; its successor reads the references."""

import json
import subprocess
import sys

import pytest

from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from tests.support.paths import ROOT

REDUCED = (
    "data.planted.num_train_pairs=256",
    "data.planted.num_sft_texts=640",
    "data.planted.num_heldout_pairs=64",
    "sft.num_steps=4",
    "alignment.direct.batch_pairs=16",
    "alignment.direct.num_steps=6",
    "alignment.direct.eval_every=3",
    "alignment.direct.checkpoint_every=3",
)

pytestmark = pytest.mark.e2e


def run(workspace, *settings):
    done = subprocess.run(
        [sys.executable, "jobs/align_policy.py", "--workspace", str(workspace), *REDUCED, *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_a_direct_method_on_two_ranks_and_another_one_on_its_references_on_one(tmp_path):
    workspace = tmp_path / "run"
    output = run(workspace, "alignment.algorithm=dpo", "alignment.direct.lora={rank: 8, alpha: 16}")
    assert "trains on 256 rows" in output
    [aligned] = (workspace / "stages").glob("align_policy-*")
    rows = read_metrics(aligned / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 5]
    assert rows[0]["train/loss"] == pytest.approx(0.6931, abs=1e-4)  # adapters start as the policy
    metrics = json.loads((aligned / "manifest.json").read_text())["metrics"]
    assert metrics["memory/rank_peak_gib"] > 0
    references = sorted(path.name for path in (workspace / "reference_logprobs").iterdir())
    # All parameters now, and half of the ranks: neither the references nor the earlier stage are computed again.
    output = run(workspace, "alignment.algorithm=ipo", "cluster.alignment.ranks=1")
    assert "sft                 finished before, skipped" in output
    assert sorted(path.name for path in (workspace / "reference_logprobs").iterdir()) == references
    assert len(list((workspace / "stages").glob("align_policy-*"))) == 2
