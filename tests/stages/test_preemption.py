import os
import signal
import threading
import time

import pytest

from pipeline.errors import Preempted
from pipeline.stages.preemption import PreemptionNotice, WaitCutShort
from pipeline.stages.runner import StageRunner
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import Workspace


def test_sigterm_is_remembered_within_the_block_and_handled_as_before_after_it():
    before = signal.getsignal(signal.SIGTERM)
    notice = PreemptionNotice()
    with notice.watching():
        assert not notice.is_given()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.is_given()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_wait_declared_as_such_ends_with_the_notice_and_nothing_else_does():
    notice = PreemptionNotice()
    with notice.watching():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(WaitCutShort), notice.cutting_short():
            assert threading.Event().wait(60), "the wait went on"
        signal.raise_signal(signal.SIGTERM)  # outside of a wait
        with pytest.raises(WaitCutShort), notice.cutting_short():
            raise AssertionError("a wait is not begun after the notice")


def test_a_process_that_is_not_done_shortly_before_the_grace_ends_is_told_so_and_one_that_is_hears_nothing():
    told = threading.Event()
    notice = PreemptionNotice(1.0, told.set)
    with notice.watching():
        assert not told.wait(1.5)  # the time runs from the signal
        signal.raise_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert told.wait(30)
        assert time.monotonic() - asked >= 0.8
    told.clear()
    notice = PreemptionNotice(1.0, told.set)
    with notice.watching():
        signal.raise_signal(signal.SIGTERM)
    assert not told.wait(1.5)


def test_after_the_notice_no_stage_is_begun_and_a_finished_one_is_still_found(tmp_path):
    notice = PreemptionNotice()
    with (
        notice.watching(),
        Workspace.open(str(tmp_path), job="mine", needs_bytes=0, notice=notice) as workspace,
    ):
        stages = StageRunner(workspace)
        done = stages.run(StageSpec(name="done", version=1, config={}), lambda stage: {"x": 1.0})
        signal.raise_signal(signal.SIGTERM)
        assert stages.run(StageSpec(name="done", version=1, config={}), lambda stage: {"x": 2.0}) == done
        with pytest.raises(Preempted, match="next was not started"):
            stages.run(StageSpec(name="next", version=1, config={}), lambda stage: {})


def test_a_stage_that_saves_nothing_on_its_way_leaves_where_it_asks_and_begins_anew(tmp_path):
    notice = PreemptionNotice()
    with (
        notice.watching(),
        Workspace.open(str(tmp_path), job="mine", needs_bytes=0, notice=notice) as workspace,
    ):
        stage = workspace.stage("generate_benchmark", "0" * 64)
        stage.leave_if_preempted()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(
            Preempted, match=r"generate_benchmark starts again from its beginning\. The same command resumes"
        ):
            stage.leave_if_preempted()
