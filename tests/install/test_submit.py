"""`make quickstart` and `make smollm2` call a script that starts a Ray head of its own where none is named."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "install" / "submit.sh"


def test_a_bad_setting_is_answered_before_a_head_is_started():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_API_SERVER_ADDRESS"}
    submitted = subprocess.run(
        ["bash", SCRIPT, "--recipe", "tiny", "alignment.num_stepz=3"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert submitted.returncode == 2
    assert "alignment.num_stepz: unknown key; did you mean alignment.num_steps?" in submitted.stderr
    assert submitted.stdout == ""
