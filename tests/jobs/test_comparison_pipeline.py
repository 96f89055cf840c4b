"""A cell of the comparison as the pipeline's own stages, on real Ray, DeepSpeed, Serve and vLLM, reduced."""

import json
import os
import subprocess
import sys

import pytest

from tests.jobs.test_full_pipeline import FEWER_PROCESSES, REDUCED
from tests.support.paths import ROOT

CELL = (
    "comparison.cells=pipeline",
    "comparison.kl_samples=32",
    "alignment.samples_per_prompt=4",
    "alignment.policy_pairs.rounds=2",
    "alignment.policy_pairs.prompts_per_round=16",
    "alignment.direct.num_steps=4",
    "alignment.direct.batch_pairs=8",
    "alignment.direct.eval_every=2",
)


@pytest.mark.e2e
def test_a_cell_of_the_pipeline_samples_ranks_trains_answers_and_is_measured(tmp_path):
    """Both rounds sample with vLLM, are ranked by the scoring service and train over DeepSpeed ranks."""
    command = [sys.executable, "jobs/compare_methods.py", "--recipe", "tiny", "--out", str(tmp_path)]
    run = subprocess.run(
        [*command, "--methods", "online_dpo", "--seeds", "0", *REDUCED, *FEWER_PROCESSES, *CELL],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    tables = json.loads((tmp_path / "comparison.json").read_text())
    row = tables["table1"]["online_dpo"]
    assert row["budget"]["budget/sampled_tokens"] > 0
    assert row["budget"]["budget/steps"] == 8
    assert set(row["win_rates"]) == {"gold", "reward"}
    assert "held-out pairs/accuracy" in tables["table2"]["online_dpo"]
    assert "round 2" in run.stdout
    stages = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "workspace" / "stages").iterdir())
    assert stages.count("align_policy") == 2
