import os
import signal

import pytest

from pipeline.errors import Preempted
from pipeline.stages.preemption import PreemptionNotice
from pipeline.stages.runner import StageRunner
from pipeline.stages.workspace import Workspace


def test_sigterm_is_remembered_within_the_block_and_handled_as_before_after_it():
    before = signal.getsignal(signal.SIGTERM)
    notice = PreemptionNotice()
    with notice.watching():
        assert not notice.is_given()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.is_given()
    assert signal.getsignal(signal.SIGTERM) is before


def test_after_the_notice_no_stage_is_begun_and_a_finished_one_is_still_found(tmp_path):
    given = []
    with Workspace.open(str(tmp_path), job="mine", needs_bytes=0, preempted=lambda: bool(given)) as workspace:
        stages = StageRunner(workspace)
        done = stages.run("done", 1, lambda stage: {"x": 1.0}, config={})
        given.append("SIGTERM")
        assert stages.run("done", 1, lambda stage: {"x": 2.0}, config={}) == done
        with pytest.raises(Preempted, match="next was not begun"):
            stages.run("next", 1, lambda stage: {}, config={})


def test_a_stage_that_saves_nothing_on_its_way_leaves_where_it_asks_and_begins_anew(tmp_path):
    given = []
    with Workspace.open(str(tmp_path), job="mine", needs_bytes=0, preempted=lambda: bool(given)) as workspace:
        stage = workspace.stage("generate_benchmark", "0" * 64)
        stage.leave_if_preempted()
        given.append("SIGTERM")
        with pytest.raises(Preempted, match=r"generate_benchmark begins anew\. The same command resumes"):
            stage.leave_if_preempted()
