import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "jobs/full_pipeline.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_dry_run_prints_recipe_and_plan_without_torch():
    code = (
        "import sys; sys.argv = ['job', '--dry-run', 'alignment.num_steps=7']; "
        "sys.path.insert(0, 'jobs'); import runpy; runpy.run_path('jobs/full_pipeline.py', run_name='__main__'); "
        "print('torch' in sys.modules, 'ray' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "num_steps: 7" in done.stdout
    assert "rollout worker" in done.stdout
    assert done.stdout.strip().endswith("False False False")


@pytest.mark.parametrize(
    ("override", "letter"),
    [
        ("alignment.num_stps=7", "alignment.num_stps: unknown key; did you mean alignment.num_steps?"),
        ("alignment.num_steps=many", "alignment.num_steps = 'many'"),
        ("alignment.ppo.mini_batch_size=100", "is not a multiple of ppo.mini_batch_size = 100"),
        ("num_steps", "is no override; write key.path=value"),
    ],
)
def test_a_bad_override_is_a_letter_and_costs_nothing(override, letter):
    started = time.monotonic()
    done = run(override)
    assert done.returncode == 2
    assert letter in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 10


def test_an_unknown_recipe_names_its_neighbour():
    done = run("--recipe", "tinny")
    assert done.returncode == 2
    assert "Did you mean 'tiny'?" in done.stderr
