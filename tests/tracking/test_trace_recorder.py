"""A trace holds what torch did between start and stop, under the names of the phases; without a start there is none."""

import gzip
import json

import pytest
import torch

from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError
from pipeline.tracking.trace_recorder import TraceRecorder


def events(path):
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_a_trace_holds_named_phases_around_the_operations_in_them(tmp_path):
    recorder = TraceRecorder()
    recorder.start()
    with recorder.phase("update"):
        torch.ones(4, 4) @ torch.ones(4, 4)
    recorder.stop(str(tmp_path / "rank-0.json.gz"))
    torch.ones(3).cumsum(0)
    found = {event["name"]: event for event in events(tmp_path / "rank-0.json.gz") if event.get("ph") == "X"}
    phase, product = found["update"], found["aten::mm"]
    assert phase["ts"] <= product["ts"] <= product["ts"] + product["dur"] <= phase["ts"] + phase["dur"]
    assert "aten::cumsum" not in found


def test_without_a_start_nothing_is_recorded_or_written(tmp_path):
    recorder = TraceRecorder()
    with recorder.phase("update"):
        pass
    recorder.stop(str(tmp_path / "rank-0.json.gz"))
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_never_ended_does_not_stand_in_the_next_trace(tmp_path):
    recorder = TraceRecorder()
    recorder.start()
    with recorder.phase("before"):
        torch.ones(2).sum()
    recorder.start()
    with recorder.phase("after"):
        torch.ones(2).sum()
    recorder.stop(str(tmp_path / "rank-0.json.gz"))
    names = {event["name"] for event in events(tmp_path / "rank-0.json.gz")}
    assert "after" in names
    assert "before" not in names


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["profile.steps=[2,24]"],
            r"profile.steps = \[2, 24\] names step 24, but alignment.num_steps = 24: the last step is 23",
        ),
        (["profile.steps=[2]", "alignment.algorithm=dpo"], r"alignment.algorithm = dpo has no such steps; set profile"),
        (["profile.steps=[-1]"], r"profile.steps\[0\] = -1"),
        (["profile.steps=3"], r"this is a list; write \[3\]"),
    ],
)
def test_steps_that_no_run_has_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", overrides)
