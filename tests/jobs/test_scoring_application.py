"""What Serve's command line is given: the builder, its arguments, and the file in jobs/services."""

import inspect
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from actors.reward_service import scoring_application
from jobs import scoring_application as entry
from jobs.scoring_application import ServiceArguments, build
from pipeline.config.cluster import ScoringConfig
from pipeline.errors import CheckpointError, ConfigError

FILE = Path(entry.__file__).with_name("services") / "scoring.yaml"


def test_the_shipped_file_is_one_that_serve_and_the_service_accept():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    assert schema.http_options.host == "127.0.0.1"
    [application] = schema.applications
    assert application.import_path == "jobs.scoring_application:build"
    arguments = ServiceArguments.model_validate(application.args)
    assert arguments.scoring.max_replicas == 4
    assert not arguments.without_token


def test_serve_sees_the_type_of_the_arguments():
    """Serve validates `args` only when the annotation is the class itself, not its name."""
    [parameter] = inspect.signature(build).parameters.values()
    assert parameter.annotation is ServiceArguments


def test_a_service_that_anybody_could_use_is_refused(monkeypatch):
    monkeypatch.delenv("VRM_SERVICE_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="VRM_SERVICE_TOKEN is not set"):
        build(ServiceArguments(model="nowhere"))


def test_a_directory_without_a_model_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no reward_model\.json"):
        build(ServiceArguments(model=str(tmp_path), without_token=True))


def test_serve_build_without_a_model_is_told_how_to_name_one(monkeypatch):
    monkeypatch.delenv("VRM_MODEL", raising=False)
    with pytest.raises(ConfigError, match="VRM_MODEL is not set"):
        _ = entry.application


def deployment_of(config):
    return scoring_application("nowhere", config, token=None, deadline_s=1.0)._bound_deployment


def test_replicas_are_fixed_unless_a_maximum_is_given():
    fixed = deployment_of(ScoringConfig(replicas=3))
    assert (fixed.num_replicas, fixed._deployment_config.autoscaling_config) == (3, None)
    scaled = deployment_of(ScoringConfig(replicas=0, max_replicas=4))._deployment_config.autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas) == (0, 4)


@pytest.mark.parametrize("sizes", [{"replicas": 0}, {"replicas": 3, "max_replicas": 2}])
def test_replicas_that_could_not_serve_are_refused(sizes):
    with pytest.raises(ValidationError, match="replicas"):
        ScoringConfig(**sizes)
