"""Engines that share the learner's GPUs are asleep whenever it works on them, and what a step waits for is timed."""

from types import SimpleNamespace

import pytest

import pipeline.loops.alignment_run
from pipeline.data.prompts import PromptStream
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.alignment import align
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.learners import ALIGNMENT, ppo_learner, prompts_of
from tests.support.rewards import rewards_of


def recording(events, target, *names):
    """Writes down every call of these methods before it is made."""

    def recorded(name, method):
        def record(*arguments):
            events.append(name)
            return method(*arguments)

        return record

    for name in names:
        setattr(target, name, recorded(name, getattr(target, name)))
    return target


def test_engines_sleep_from_the_last_sample_to_the_new_weights(tiny_policy, world, tokenizer, tmp_path):
    events = []
    config = ALIGNMENT.model_copy(update={"num_steps": 2, "checkpoint_every": 5})
    align(
        recording(events, FakeRollouts(tokenizer), "load_weights", "generate", "sleep"),
        rewards_of(FakeScorer()),
        recording(
            events,
            ppo_learner(tiny_policy, world, tokenizer, tmp_path / "published", config=config),
            "evaluate",
            "update",
            "publish_weights",
        ),
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        StageDirectory(str(tmp_path), "align_policy", "0" * 64),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    step = ["generate", "sleep", "evaluate", "update", "publish_weights", "load_weights"]
    assert events == ["publish_weights", "load_weights", *step, *step]


def test_every_phase_of_a_step_is_timed_and_the_save_that_it_waited_for(
    tiny_policy, world, tokenizer, tmp_path, monkeypatch
):
    now = 0.0

    def taking(target, **seconds):
        """Every call of these methods takes so long."""

        def slow(method, duration):
            def call(*arguments):
                nonlocal now
                now += duration
                return method(*arguments)

            return call

        for name, duration in seconds.items():
            setattr(target, name, slow(getattr(target, name), duration))
        return target

    monkeypatch.setattr(pipeline.loops.alignment_run, "time", SimpleNamespace(perf_counter=lambda: now))
    config = ALIGNMENT.model_copy(update={"num_steps": 4, "checkpoint_every": 2})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path / "published", config=config)
    align(
        taking(FakeRollouts(tokenizer), generate=1.0),
        rewards_of(taking(FakeScorer(), score=2.0)),
        taking(learner, evaluate=4.0, update=8.0, publish_weights=16.0, snapshot=32.0),
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        StageDirectory(str(tmp_path), "align_policy", "0" * 64),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    rows = read_metrics(tmp_path / METRICS_FILE)
    phases = {"rollout": 1.0, "score": 2.0, "evaluate": 4.0, "update": 8.0, "weights": 16.0}
    saved = phases | {"save": 32.0}  # behind step 1; step 3 is the last and needs no commit
    timed = [{name.removeprefix("seconds/"): row[name] for name in row if name.startswith("seconds/")} for row in rows]
    assert timed == [phases, phases, saved, phases]
    # 31 seconds a step, and 63 with the save.
    slowdown = [row["tokens_per_s/rollout"] / row["tokens_per_s/step"] for row in rows]
    assert slowdown == pytest.approx([31.0, 31.0, 63.0, 31.0])
