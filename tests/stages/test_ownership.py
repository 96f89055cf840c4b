"""One job at a time, and a dead job holds nothing."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from pipeline.errors import CorruptManifest, WorkspaceLocked
from pipeline.stages import storage
from pipeline.stages.ownership import Owner, read_owner
from pipeline.stages.workspace import Workspace

HOLD = """
import sys, time
from pipeline.stages.workspace import Workspace
workspace = Workspace.open(sys.argv[1], job="raysubmit_other", needs_bytes=0)
print("holds", flush=True)
time.sleep(60)
"""


RACE = """
import sys
from pipeline.errors import WorkspaceLocked
from pipeline.stages.workspace import Workspace
print("ready", flush=True)
sys.stdin.readline()
try:
    workspace = Workspace.open(sys.argv[1], job="racer", needs_bytes=0)
    print("holds", flush=True)
    sys.stdin.readline()
except WorkspaceLocked:
    print("WorkspaceLocked", flush=True)
"""


@pytest.fixture
def other(tmp_path):
    """Another living process that holds the workspace."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def open_workspace(path, **options):
    return Workspace.open(str(path), job="mine", needs_bytes=0, **options)


def write_owner(path, owner):
    (path / "owner.json").write_text(json.dumps(asdict(owner)))


def test_a_second_job_is_refused_and_told_who_has_it(tmp_path, other):
    since = time.strftime("%Y-%m-%d")
    with pytest.raises(WorkspaceLocked) as refusal:
        open_workspace(tmp_path)
    letter = str(refusal.value)
    assert re.search(
        rf"held by job raysubmit_other \(process {other.pid} on {os.uname().nodename}, since {since}", letter
    )
    assert "--take-over" in letter


def test_a_killed_owner_is_replaced_silently_even_before_it_is_reaped(tmp_path, other):
    other.kill()
    deadline = time.monotonic() + 10
    while not read_owner(str(tmp_path)).is_gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    with open_workspace(tmp_path):
        assert read_owner(str(tmp_path)).job == "mine"


def test_a_reused_process_id_does_not_hold_the_workspace(tmp_path):
    write_owner(tmp_path, replace(Owner.here("long ago"), start_ticks=1))
    open_workspace(tmp_path).close()


def test_an_owner_on_another_machine_is_never_presumed_dead(tmp_path):
    elsewhere = replace(Owner.here("elsewhere"), machine="another boot", pid=2**22, start_ticks=1)
    write_owner(tmp_path, elsewhere)
    with pytest.raises(WorkspaceLocked, match="job elsewhere"):
        open_workspace(tmp_path)


def test_the_same_process_cannot_hold_it_twice(tmp_path):
    with open_workspace(tmp_path), pytest.raises(WorkspaceLocked, match="job mine"):
        open_workspace(tmp_path)


def test_closing_releases(tmp_path):
    open_workspace(tmp_path).close()
    assert read_owner(str(tmp_path)) is None
    open_workspace(tmp_path).close()


def test_take_over_takes_it_from_a_living_owner(tmp_path, other):
    with open_workspace(tmp_path, take_over=True):
        assert read_owner(str(tmp_path)).job == "mine"


def test_a_former_owner_cannot_commit_nor_release(tmp_path):
    former = open_workspace(tmp_path)
    stage = former.stage("align_policy", "0123")
    write_owner(tmp_path, replace(Owner.here("theirs"), pid=1))
    with pytest.raises(WorkspaceLocked, match="was taken over by job theirs"):
        stage.checkpoints.commit(9, {})
    with pytest.raises(WorkspaceLocked, match="job mine stops here without committing"):
        stage.finish({}, {})
    assert stage.result() is None
    former.close()
    assert read_owner(str(tmp_path)).job == "theirs"


@pytest.mark.parametrize("text", ["", "{", '{"job": "x"}', "[]"])
def test_a_corrupt_owner_file_says_how_to_go_on(tmp_path, text):
    (tmp_path / "owner.json").write_text(text)
    with pytest.raises(CorruptManifest, match=r"owner\.json cannot be read .*--take-over"):
        open_workspace(tmp_path)
    open_workspace(tmp_path, take_over=True).close()


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3").new_place()


@pytest.mark.parametrize("before", ["nobody", "a dead job", "a job that left"])
def test_of_three_jobs_that_start_together_one_gets_it(place, before):
    if before == "a dead job":
        dead = replace(Owner.here("long ago"), start_ticks=1)
        storage.write_text(storage.join(place, "owner.json"), json.dumps(asdict(dead)))
    elif before == "a job that left":
        open_workspace(place).close()
    processes = [
        subprocess.Popen([sys.executable, "-c", RACE, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        assert [p.stdout.readline() for p in processes] == ["ready\n"] * 3
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert sorted(p.stdout.readline() for p in processes) == ["WorkspaceLocked\n"] * 2 + ["holds\n"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_workspace_on_an_object_store_is_left_and_taken_again(s3):
    place = s3.new_place()
    with open_workspace(place) as workspace:
        stage = workspace.stage("align_policy", "0123")
        stage.checkpoints.commit(9, {})
        with pytest.raises(WorkspaceLocked, match="job mine"):
            open_workspace(place)
        with open_workspace(place, take_over=True):
            with pytest.raises(WorkspaceLocked, match="was taken over by job mine"):
                stage.finish({}, {})
            workspace.close()
            assert read_owner(place) is not None, "a former owner does not release"
    assert read_owner(place) is None
    assert stage.result() is None
