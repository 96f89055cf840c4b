"""The manifest is the commit: whatever has none does not exist."""

import json
import os
import re
import subprocess
import sys
import uuid

import pytest

from pipeline.errors import CorruptManifest, WorkspaceError
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory, Workspace


@pytest.fixture(params=["local", "memory", "s3"])
def uri(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if request.param == "s3":
        return request.getfixturevalue("s3").new_place()
    return str(tmp_path / "ws") if request.param == "local" else f"fsspec+memory://{uuid.uuid4().hex}/ws"


@pytest.fixture
def workspace(uri):
    with Workspace.open(uri, job="job-1", needs_bytes=0) as workspace:
        yield workspace


@pytest.fixture
def stage(workspace):
    return workspace.stage("align_policy", "0123456789abcdef")


def save(stage, step, text="state"):
    """What the ranks of a learner do."""
    with storage.writing(stage.checkpoints.uri(step)) as directory, open(f"{directory}/rank-0", "w") as stream:
        stream.write(text)


def test_a_finished_stage_is_found_again(uri, workspace, stage):
    assert stage.result() is None
    result = stage.finish({"reward": 1.5}, {"seconds": 2.0})
    again = workspace.stage("align_policy", "0123456789abcdef")
    assert again.result() == result
    assert again.manifest()["seconds"] == 2.0
    assert result.location == storage.join(uri, "stages/align_policy-0123456789ab/result")
    assert workspace.stage("align_policy", "another fingerprint").result() is None


def test_metrics_are_seen_from_other_machines_commit_by_commit(uri, tmp_path, monkeypatch):
    writer, reader = (
        StageDirectory(storage.join(uri, "stages/align-0"), "align", fingerprint) for fingerprint in ("0" * 64, "0")
    )

    def steps_seen_by(stage, machine):
        monkeypatch.setenv("HOME", str(tmp_path / machine))
        return [row["step"] for row in stage.metrics_rows()]

    monkeypatch.setenv("HOME", str(tmp_path / "writes"))
    with writer.metrics_log(num_steps=9, first_step=0) as log:
        for step in range(6):
            log.write(step, {"reward": 1.0})
            if step in (2, 4):
                save(writer, step)
                writer.checkpoints.commit(step, {})
                assert steps_seen_by(reader, "reads") == steps_seen_by(writer, "writes") == list(range(step + 1))
    assert steps_seen_by(reader, "reads") == list(range(5 if "://" in uri else 6))
    assert steps_seen_by(writer, "writes") == list(range(6))


def test_two_remote_workspaces_with_one_recipe_have_metrics_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    one, other = (
        Workspace(f"fsspec+memory://{name}", owner=None).stage("align", "0" * 64) for name in ("one", "other")
    )
    with one.metrics_log(num_steps=1, first_step=0) as log:
        log.write(0, {"reward": 1.0})
    assert (len(one.metrics_rows()), len(other.metrics_rows())) == (1, 0)


def test_only_committed_checkpoints_exist(stage):
    assert stage.checkpoints.latest() is None
    save(stage, 9)
    assert stage.checkpoints.latest() is None
    stage.checkpoints.commit(9, {"kl_coefficient": 0.02})
    save(stage, 19)
    latest = stage.checkpoints.latest()
    assert (latest.step, latest.state) == (9, {"kl_coefficient": 0.02})
    with storage.reading(latest.uri) as directory, open(f"{directory}/rank-0") as stream:
        assert stream.read() == "state"


def test_only_the_newest_checkpoints_are_kept(stage):
    for step in (9, 19, 29):
        save(stage, step)
        stage.checkpoints.commit(step, {})
    checkpoints = storage.join(stage.uri, "checkpoints")
    assert storage.list_directories(checkpoints) == ["step-000019", "step-000029"]
    assert storage.read_text(storage.join(checkpoints, "step-000009.json")) is None


def test_the_rests_of_a_killed_run_are_cleaned(stage):
    save(stage, 9)
    stage.checkpoints.commit(9, {})
    save(stage, 19, "half a state")
    storage.write_text(storage.join(stage.result_uri, "model.safetensors"), "half a model")
    stage.delete_uncommitted()
    assert storage.list_directories(storage.join(stage.uri, "checkpoints")) == ["step-000009"]
    assert storage.read_text(storage.join(stage.result_uri, "model.safetensors")) is None
    assert stage.checkpoints.latest().step == 9


def test_finishing_drops_the_checkpoints(stage):
    save(stage, 9)
    stage.checkpoints.commit(9, {})
    stage.finish({}, {})
    assert storage.list_directories(storage.join(stage.uri, "checkpoints")) == []


@pytest.mark.parametrize("text", ["", "{", '{"step": 9', "[1]", '{"step": 9}', "\x00\x00"])
def test_a_corrupt_commit_names_file_and_cure(stage, text):
    save(stage, 9)
    commit = stage.checkpoints.commit_uri(9)
    storage.write_text(commit, text)
    with pytest.raises(CorruptManifest, match=rf"{re.escape(commit)} .*Delete .* to resume from the checkpoint before"):
        stage.checkpoints.latest()


@pytest.mark.parametrize("text", ["", "not json", '"text"', '{"name": "align_policy"}'])
def test_a_corrupt_manifest_names_file_and_cure(stage, text):
    manifest = storage.join(stage.uri, "manifest.json")
    storage.write_text(manifest, text)
    with pytest.raises(CorruptManifest, match=rf"{re.escape(manifest)} .*Delete .* to compute the stage again"):
        stage.result()


def test_metrics_follow_the_stage_to_another_machine(uri, stage, tmp_path, monkeypatch):
    with stage.metrics_log(num_steps=3, first_step=0) as log:
        log.write(0, {"reward": 1.0})
        log.write(1, {"reward": 2.0})
        save(stage, 1)
        stage.checkpoints.commit(1, {})
        log.write(2, {"reward": 3.0})
    monkeypatch.setenv("HOME", str(tmp_path / "another machine"))
    with stage.metrics_log(num_steps=3, first_step=2) as log:
        log.write(2, {"reward": 4.0})
    assert [(row["step"], row["reward"]) for row in stage.metrics_rows()] == [(0, 1.0), (1, 2.0), (2, 4.0)]
    stage.finish({}, {})
    monkeypatch.setenv("HOME", str(tmp_path / "a third machine"))
    assert [row["reward"] for row in stage.metrics_rows()] == [1.0, 2.0, 4.0]
    assert stage.num_steps() == 3


def test_a_workspace_with_too_little_space_is_refused(tmp_path):
    with pytest.raises(WorkspaceError, match="the run needs about"):
        Workspace.open(str(tmp_path), job="job-1", needs_bytes=2**60)


KILL_AT_EVERY_LINE = '''
"""Commits a second checkpoint, or finishes the stage, in children that die at line 1, 2, 3, ... of stages code."""
import json, os, sys
from pipeline.stages import ownership, storage
from pipeline.stages.workspace import Workspace, StageDirectory

root, action = sys.argv[1], sys.argv[2]

def stage():
    return StageDirectory(root + "/stages/align-0123", "align", "0123", keep_checkpoints=1)

def save(s, step):
    with storage.writing(s.checkpoints.uri(step)) as d:
        for part in ("a", "b"):
            with open(f"{d}/{part}", "w") as f:
                f.write(str(step))

def act():
    s = stage()
    if action == "commit":
        save(s, 19)
        s.checkpoints.commit(19, {"n": 19})
    else:
        with storage.writing(s.result_uri) as d, open(d + "/model", "w") as f:
            f.write("model")
        s.finish({"reward": 1.0}, {})

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def prepare():
    s = stage()
    storage.delete_directory(s.uri)
    save(s, 9)
    s.checkpoints.commit(9, {"n": 9})

def die_at(n):
    left = n
    def trace(frame, event, arg):
        nonlocal left
        if "/pipeline/stages/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os._exit(9)
        return trace
    sys.settrace(trace)
    act()
    sys.settrace(None)

def look():
    s = stage()
    s.delete_uncommitted() if s.result() is None else None
    finished, latest = s.result() is not None, s.checkpoints.latest()
    parts = sorted(os.listdir(latest.uri)) if latest else []
    contents = [open(f"{latest.uri}/{p}").read() for p in parts] if latest else []
    model = os.path.exists(s.result_uri + "/model")
    print(json.dumps([finished, latest.step if latest else None, contents, model]), flush=True)

n, code = 0, 9
while code == 9:
    n += 1
    child(prepare)
    code = child(lambda: die_at(n))
    child(look)
assert code == 0, code
'''


def states_after_every_kill(tmp_path, action):
    run = subprocess.run(
        [sys.executable, "-c", KILL_AT_EVERY_LINE, str(tmp_path), action],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]


def test_a_commit_killed_at_any_line_leaves_the_old_state_or_the_new(tmp_path):
    states = states_after_every_kill(tmp_path, "commit")
    old, new = (False, 9, ["9", "9"], False), (False, 19, ["19", "19"], False)
    assert len(states) > 30
    assert states[0] == old
    assert states[-1] == new
    assert all(state in (old, new) for state in states)


def test_finishing_killed_at_any_line_leaves_the_checkpoint_or_the_result(tmp_path):
    states = states_after_every_kill(tmp_path, "finish")
    assert states[0] == (False, 9, ["9", "9"], False)
    assert states[-1] == (True, None, [], True)
    for finished, step, contents, model in states:
        assert (finished and model) or (step, contents, model) == (9, ["9", "9"], False)


def test_a_stage_directory_reads_without_writing(tmp_path):
    stage = StageDirectory(str(tmp_path / "ws" / "stages" / "x-1"), "x", "1")
    assert (stage.result(), stage.checkpoints.latest(), stage.num_steps(), stage.metrics_rows()) == (
        None,
        None,
        None,
        [],
    )
    assert not os.path.exists(tmp_path / "ws")
