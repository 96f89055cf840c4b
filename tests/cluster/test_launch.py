"""The launcher file is one that Ray's cluster launcher accepts."""

from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "cluster" / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_ray_accepts_the_launch_file(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(path.read_text())))
