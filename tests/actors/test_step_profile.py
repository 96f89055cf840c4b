"""Which calls of an alignment are recorded, under which names, and that a failed record ends nothing."""

import itertools
import json
from types import SimpleNamespace

from ray.exceptions import GetTimeoutError

import actors.step_profile
from actors.step_profile import StepProfile, profiled
from pipeline.loops.align_policy import AlignmentPorts
from pipeline.rewards.opened import OpenedSource


class Port:
    """Every method of every port; returns its own name."""

    def __getattr__(self, name):
        return lambda *arguments, **settings: name


class Process:
    """An actor's handle: the calls are written down, and `stop_profile` returns a reference."""

    def __init__(self, calls, name):
        self.start_profile = SimpleNamespace(remote=lambda: calls.append((name, "start")))
        self.stop_profile = SimpleNamespace(remote=lambda place, file: calls.append((name, "stop", file)))


def run(tmp_path, monkeypatch, *, steps, get=lambda references, timeout: None):
    """Three steps of the calls that `align` makes."""
    calls = []
    ray = SimpleNamespace(get=get, timeline=lambda path: open(path, "w").close())
    monkeypatch.setattr(actors.step_profile, "ray", ray)
    processes = {name: Process(calls, name) for name in ("rank-0.json.gz", "engine-0.json.gz")}
    source = OpenedSource(config=None, source=Port(), scale=None)
    profile = StepProfile(steps, str(tmp_path), "align_policy", processes)
    ports = profiled(AlignmentPorts(rollouts=Port(), sources=(source,), learner=Port()), profile)
    rollouts, learner = ports.rollouts, ports.learner
    learner.publish_weights(0)
    rollouts.load_weights(SimpleNamespace(version=0))
    for step in range(3):
        assert rollouts.generate([], None) == "generate"
        rollouts.sleep()
        assert ports.sources[0].source.score(None) == "score"
        assert learner.evaluate([]) == "evaluate"
        assert learner.build_experience(None, None, kl_coefficient=0.0) == "build_experience"
        assert learner.update(None, step) == "update"
        learner.publish_weights(step + 1)
        assert rollouts.load_weights(SimpleNamespace(version=step + 1)) == "load_weights"
    return calls


def test_the_named_steps_are_recorded_from_their_policy_to_the_next(tmp_path, monkeypatch, capsys):
    calls = run(tmp_path, monkeypatch, steps=[1])
    assert calls == [
        ("rank-0.json.gz", "start"),
        ("engine-0.json.gz", "start"),
        ("rank-0.json.gz", "stop", "rank-0.json.gz"),
        ("engine-0.json.gz", "stop", "engine-0.json.gz"),
    ]
    place = tmp_path / "profile" / "step-000001"
    events = json.loads((place / "driver.json").read_text())["traceEvents"]
    assert [event["name"] for event in events] == ["rollout", "score", "evaluate", "update", "weights", "weights"]
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(events))
    assert (tmp_path / "profile" / "ray_timeline.json").exists()
    assert capsys.readouterr().out == f"align_policy        profile of step 1: {place}\n"


def test_every_named_step_has_a_record_of_its_own(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, steps=[0, 2])
    assert sorted(path.name for path in (tmp_path / "profile").glob("step-*")) == ["step-000000", "step-000002"]


def test_a_process_that_does_not_answer_ends_nothing(tmp_path, monkeypatch, capsys):
    def late(references, timeout):
        raise GetTimeoutError("late")

    run(tmp_path, monkeypatch, steps=[1], get=late)
    assert "step-000001, not complete (GetTimeoutError: late)" in capsys.readouterr().out
