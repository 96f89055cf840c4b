"""The table of a workspace."""

import json
import re
from dataclasses import asdict, replace

import pytest

from jobs.status import describe_workspace
from pipeline.errors import WorkspaceError
from pipeline.stages import storage
from pipeline.stages.ownership import Owner
from pipeline.stages.runner import StageRunner
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import Workspace


def finish_one_and_interrupt_the_next(path):
    def prepare(stage):
        with stage.metrics_log(num_steps=2, first_step=0) as log:
            log.write(0, {"loss": 2.0})
            log.write(1, {"loss": 1.0})
        storage.write_text(storage.join(stage.result_uri, "model"), "x" * 2**20)
        return {}

    def train(stage):
        with stage.metrics_log(num_steps=40, first_step=0) as log:
            for step in range(12):
                log.write(step, {"loss": 1.0})
        storage.write_text(storage.join(stage.checkpoints.uri(9), "state"), "x")
        stage.checkpoints.commit(9, {})
        raise KeyboardInterrupt

    with Workspace.open(str(path), job="job-1", needs_bytes=0) as workspace:
        stages = StageRunner(workspace)
        stages.run(StageSpec(name="sft", version=1, config={}), prepare)
        with pytest.raises(KeyboardInterrupt):
            stages.run(StageSpec(name="train_reward_model", version=1, config={}), train)


def test_every_stage_has_its_line_in_order(tmp_path):
    finish_one_and_interrupt_the_next(tmp_path)
    header, prepared, trained, aligned, benchmark, ownership = describe_workspace(str(tmp_path)).splitlines()
    assert header.split() == ["stage", "fingerprint", "state", "steps", "time", "size", "MiB"]
    assert re.fullmatch(r"sft +[0-9a-f]{12} +finished +2/2 +0:00 +1\.0", prepared)
    assert re.fullmatch(r"train_reward_model +[0-9a-f]{12} +unfinished +12/40 +0:00 +0\.0  committed step 10", trained)
    assert aligned.split() == ["align_policy", "not", "started"]
    assert benchmark.split() == ["generate_benchmark", "not", "started"]
    assert ownership == "No job holds it."


def test_the_owner_is_named_and_whether_it_lives(tmp_path):
    with Workspace.open(str(tmp_path), job="raysubmit_1", needs_bytes=0):
        assert re.search(r"Held by job raysubmit_1 \(process \d+ on ", describe_workspace(str(tmp_path)))
    dead = replace(Owner.here("raysubmit_1"), start_ticks=1)
    (tmp_path / "owner.json").write_text(json.dumps(asdict(dead)))
    assert "is dead; the next job takes it" in describe_workspace(str(tmp_path))


def test_a_place_without_a_workspace_is_named(tmp_path):
    with pytest.raises(WorkspaceError, match=r"nowhere holds no workspace"):
        describe_workspace(str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []
