"""Finished stages are skipped, unfinished ones go on behind their last commit."""

import time

import pytest

from pipeline.errors import WorkerDied
from pipeline.stages import attempt_clock, storage
from pipeline.stages.runner import StageRunner
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import Workspace


@pytest.fixture
def stages(tmp_path):
    with Workspace.open(str(tmp_path), job="job-1", needs_bytes=0) as workspace:
        yield StageRunner(workspace)


def spec(name, version, config, **read):
    return StageSpec(name=name, version=version, config=config, **read)


class Counting:
    """A stage of `num_steps` steps that commits each, and dies before the steps it is told to."""

    def __init__(self, num_steps, dies_before=()):
        self.num_steps = num_steps
        self.dies_before = list(dies_before)
        self.steps = []

    def __call__(self, stage):
        checkpoint = stage.checkpoints.latest()
        for step in range(0 if checkpoint is None else checkpoint.step + 1, self.num_steps):
            if step in self.dies_before:
                self.dies_before.remove(step)
                raise WorkerDied(f"rank 1 died before step {step}")
            self.steps.append(step)
            storage.write_text(storage.join(stage.checkpoints.uri(step), "state"), str(step))
            stage.checkpoints.commit(step, {})
        storage.write_text(storage.join(stage.result_uri, "model"), "trained")
        return {"steps": float(self.num_steps)}


def test_a_finished_stage_is_skipped(stages, capsys):
    compute = Counting(3)
    first = stages.run(spec("train", 1, {"lr": 0.1}), compute)
    second = stages.run(spec("train", 1, {"lr": 0.1}), compute)
    assert first == second
    assert compute.steps == [0, 1, 2]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["train", "finished", "before,", "skipped"]


def test_what_a_stage_reads_decides_whether_it_runs_again(stages):
    def runs(**changed):
        compute = Counting(1)
        arguments = {"version": 1, "config": {"lr": 0.1}, "data": ("hash-a",)} | changed
        stages.run(StageSpec(name="train", **arguments), compute)
        return bool(compute.steps)

    assert runs()
    assert not runs()
    assert runs(version=2)
    assert runs(config={"lr": 0.2})
    assert runs(data=("hash-b",))
    assert not runs()


def test_another_input_is_another_result(stages):
    one = stages.run(spec("prepare", 1, {"seed": 1}), Counting(1))
    other = stages.run(spec("prepare", 1, {"seed": 2}), Counting(1))
    first = stages.run(spec("train", 1, {}, inputs=(one.fingerprint,)), Counting(1))
    second = stages.run(spec("train", 1, {}, inputs=(other.fingerprint,)), Counting(1))
    assert first.fingerprint != second.fingerprint
    assert first.location != second.location


def test_an_interrupted_stage_resumes_behind_its_last_commit(stages, capsys):
    compute = Counting(5, dies_before=[3])
    with pytest.raises(WorkerDied):
        stages.run(spec("train", 1, {}), compute)
    stages.run(spec("train", 1, {}), compute)
    assert compute.steps == [0, 1, 2, 3, 4]
    assert "resumes after step 3" in capsys.readouterr().out


def test_a_dead_worker_is_answered_by_restarts_until_the_budget_is_spent(stages):
    compute = Counting(5, dies_before=[1, 3])
    stages.run(spec("train", 1, {}), compute, max_restarts=2)
    assert compute.steps == [0, 1, 2, 3, 4]
    with pytest.raises(WorkerDied, match="before step 2"):
        stages.run(spec("train", 2, {}), Counting(5, dies_before=[1, 2]), max_restarts=1)


def test_other_errors_are_not_retried(stages):
    attempts = []

    def fail(stage):
        attempts.append(stage)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        stages.run(spec("train", 1, {}), fail, max_restarts=3)
    assert len(attempts) == 1


def test_a_restart_does_not_see_what_was_not_committed(stages):
    seen = []

    def compute(stage):
        model = storage.join(stage.result_uri, "model")
        seen.append(storage.read_text(model))
        storage.write_text(model, "half a model")
        if len(seen) == 1:
            raise WorkerDied("gone")
        return {}

    stages.run(spec("train", 1, {}), compute, max_restarts=1)
    assert seen == [None, None]


def test_the_time_of_a_stage_is_that_of_all_its_attempts_and_a_skipped_one_takes_none(stages, capsys):
    attempts = []

    def compute(stage):
        attempts.append(stage)
        time.sleep(0.2)
        if len(attempts) == 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        stages.run(spec("train", 1, {}), compute)
    assert attempts[0].seconds_spent() >= 0.2
    result = stages.run(spec("train", 1, {}), compute)
    assert stages.workspace.stage("train", result.fingerprint).manifest()["seconds"] >= 0.4
    assert "of it in earlier attempts" in capsys.readouterr().out
    assert stages.skipped == set()
    stages.run(spec("train", 1, {}), compute)
    assert stages.skipped == {"train"}


def test_the_time_is_written_down_while_a_stage_runs_so_that_a_kill_loses_little(stages, monkeypatch):
    monkeypatch.setattr(attempt_clock, "PERIOD_S", 0.01)

    def compute(stage):
        deadline = time.monotonic() + 10
        while stage.seconds_spent() < 0.02:
            assert time.monotonic() < deadline
        return {}

    stages.run(spec("train", 1, {}), compute)


def test_the_manifest_tells_what_the_result_was_made_of(stages):
    base = stages.run(spec("prepare", 1, {}), Counting(1))
    result = stages.run(spec("train", 1, {"lr": 0.1}, inputs=(base.fingerprint,), data=("hash-a",)), Counting(1))
    manifest = stages.workspace.stage("train", result.fingerprint).manifest()
    assert manifest["inputs"] == [base.fingerprint]
    assert manifest["data"] == ["hash-a"]
    assert manifest["config"] == {"lr": 0.1}
    assert manifest["metrics"] == {"steps": 1.0}
    assert manifest["seconds"] >= 0
    assert 0 < manifest["driver_peak_gib"] < 100
    assert manifest["node_peak_gib"] > 0
    assert manifest["versions"]["pyarrow"]
