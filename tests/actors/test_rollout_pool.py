"""The pool's own work, with real Ray actors that hold no engine: order, replacement, deadlines, resizing."""

import os
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from actors.rollout_pool import RolloutPool
from pipeline.config.schema import DeadlinesConfig, RolloutConfig
from pipeline.errors import ConfigError, DataError, DeadlineExceeded, StaleEngineError, WorkerDied
from pipeline.records import PolicyWeights, Prompt, Rollout, SamplingParams

pytestmark = [pytest.mark.components, pytest.mark.usefixtures("local_ray")]

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, samples_per_prompt=2, seed=0)
PROMPTS = [Prompt(id=f"prompt {n}", messages=(), token_ids=(n,)) for n in range(7)]


class ScriptedWorker:
    """Answers each request with its seed; misbehaves once for every marker file it finds in its model directory."""

    def __init__(self, name):
        self._name = name
        self._open = {}

    def start(self, directory, config, dtype, max_model_len, seed):
        self._directory = Path(directory)
        if self._told("refuse to start"):
            raise ConfigError(f"{self._name} cannot serve this model")

    def load_weights(self, weights, tolerance):
        if self._told("die while loading"):
            os._exit(1)
        if self._told("be stale"):
            raise StaleEngineError(f"{self._name} is stale")
        self._version = weights.version
        return {"gate/mean": 1e-6, "gate/max": 2e-6, "weights/seconds": 0.5, "weights/gb_per_s": 2.0}

    def sample(self, requests, sampling):
        if self._told("die while sampling"):
            os._exit(1)
        if self._told("hang"):
            time.sleep(60)
        return [
            Rollout(
                prompt=request.prompt,
                sample_index=request.sample_index,
                response_ids=(request.seed,),
                response_text="",
                logprobs=(0.0,),
                policy_version=self._version,
                finish_reason="stop",
            )
            for request in requests
        ]

    def advance(self, submitted, seconds):
        """Finishes the latest of its requests first, two a call."""
        if self._told("die while sampling"):
            os._exit(1)
        if self._told("hang"):
            time.sleep(60)
        self._open |= submitted
        finished = {number: self._open.pop(number) for number in sorted(self._open, reverse=True)[:2]}
        return {
            number: rollout
            for number, (request, sampling) in finished.items()
            for rollout in self.sample([request], sampling)
        }

    def _told(self, what):
        try:
            (self._directory / what).unlink()
        except FileNotFoundError:
            return False
        return True


@pytest.fixture
def open_pool(tmp_path):
    """Opens pools of scripted workers whose script lies in `tmp_path`."""
    pools = []

    def open_pool(*, generate_s=30.0, requested_workers=lambda: None, **config):
        config = RolloutConfig(**{"workers": 2, "cpus_per_worker": 0.1, "chunk_size": 3} | config)
        deadlines = DeadlinesConfig(start_s=120, generate_s=generate_s, weights_s=120)
        pools.append(
            RolloutPool(
                str(tmp_path),
                config,
                deadlines,
                dtype="float32",
                max_model_len=16,
                gate_tolerance=1e-4,
                seed=0,
                worker=ScriptedWorker,
                requested_workers=requested_workers,
            )
        )
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()


def weights(version):
    return PolicyWeights(version=version, location="", probes=())


def test_any_number_of_workers_gives_the_same_rollouts_in_order(open_pool):
    pool = open_pool(workers=1)
    metrics = pool.load_weights(weights(3))
    alone = pool.generate(PROMPTS, SAMPLING)
    pool.resize(3)
    together = pool.generate(PROMPTS, SAMPLING)
    pool.resize(2)

    assert metrics == {
        "rollout/workers": 1.0,
        "gate/mean": 1e-6,
        "gate/max": 2e-6,
        "weights/seconds": 0.5,
        "weights/gb_per_s": 2.0,
    }
    assert [(r.prompt.id, r.sample_index) for r in alone] == [(p.id, i) for p in PROMPTS for i in range(2)]
    assert {r.policy_version for r in alone} == {3}
    assert together == alone == pool.generate(PROMPTS, SAMPLING)
    assert pool.num_workers == 2


@pytest.mark.parametrize("misfortune", ["die while sampling", "die while loading"])
def test_a_dead_worker_is_replaced_and_nothing_is_lost(open_pool, tmp_path, misfortune):
    pool = open_pool()
    pool.load_weights(weights(0))
    untroubled = pool.generate(PROMPTS, SAMPLING)

    (tmp_path / misfortune).touch()
    pool.load_weights(weights(0))

    assert pool.generate(PROMPTS, SAMPLING) == untroubled
    assert pool.num_workers == 2
    assert not (tmp_path / misfortune).exists()


def test_a_worker_that_dies_past_the_budget_ends_the_job_with_its_name(open_pool, tmp_path):
    pool = open_pool(workers=1, max_restarts=0)
    pool.load_weights(weights(0))

    (tmp_path / "die while sampling").touch()
    with pytest.raises(WorkerDied, match=r"rollout worker 0 died during sample\(\), and the budget of 0 restarts"):
        pool.generate(PROMPTS, SAMPLING)


def test_a_hanging_worker_is_named_with_its_call_and_seconds(open_pool, tmp_path):
    pool = open_pool(workers=1, generate_s=1.5)
    pool.load_weights(weights(0))

    (tmp_path / "hang").touch()
    with pytest.raises(DeadlineExceeded, match=r"rollout worker 0: sample\(\) did not return within 1.5 s"):
        pool.generate(PROMPTS, SAMPLING)


def test_a_worker_that_cannot_start_says_why_and_is_not_tried_again(open_pool, tmp_path):
    (tmp_path / "refuse to start").touch()
    pool = open_pool(workers=1)

    with pytest.raises(ConfigError, match="rollout worker 0 cannot serve this model"):
        pool.load_weights(weights(0))


def test_a_joining_worker_that_fails_the_gate_does_not_join(open_pool, tmp_path):
    pool = open_pool(workers=1)
    pool.load_weights(weights(0))

    (tmp_path / "be stale").touch()
    with pytest.raises(StaleEngineError, match="rollout worker 1 is stale"):
        pool.resize(2)

    assert pool.num_workers == 1


def until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_a_running_job_follows_requests_up_and_down_without_waiting_for_those_who_join(open_pool):
    latest = []
    pool = open_pool(workers=1, requested_workers=lambda: latest[-1])

    sizes, rollouts = [], []
    for wish in (None, 3, 3, 1):
        latest.append(wish)
        sizes.append(pool.load_weights(weights(0))["rollout/workers"])
        rollouts.append(pool.generate(PROMPTS, SAMPLING))
        if pool._joining:
            until(lambda: len(ray.wait([w.started for w in pool._joining], num_returns=2, timeout=0)[0]) == 2)

    assert sizes[0] == 1
    assert sizes[2:] == [3, 1]
    assert rollouts == [rollouts[0]] * 4


def test_a_request_that_cannot_be_met_does_not_end_the_run(open_pool, tmp_path):
    wish = []
    pool = open_pool(workers=1, requested_workers=lambda: wish[-1] if wish else None)
    pool.load_weights(weights(0))  # the first worker is up before the second is asked for
    (tmp_path / "refuse to start").touch()
    wish.append(2)

    assert until(lambda: pool.load_weights(weights(0)) and pool._given_up == 2)

    assert not pool._joining
    assert pool.load_weights(weights(1))["rollout/workers"] == 1


def test_requests_that_cannot_be_met_are_refused_before_any_work(open_pool):
    pool = open_pool(workers=1)

    with pytest.raises(StaleEngineError, match="call load_weights before generate"):
        pool.generate(PROMPTS, SAMPLING)
    pool.load_weights(weights(0))
    with pytest.raises(DataError, match="'long' has 9 tokens"):
        pool.generate([*PROMPTS, Prompt(id="long", messages=(), token_ids=(1,) * 9)], SAMPLING)
    with pytest.raises(ConfigError, match="at least 1"):
        pool.resize(0)
    with pytest.raises(ConfigError, match="one GPU"):
        open_pool(gpus_per_worker=2)


ONE_EACH = replace(SAMPLING, samples_per_prompt=1)


def asked(*prompts):
    return deque((prompt, ONE_EACH) for prompt in prompts)


@pytest.mark.parametrize("misfortune", [None, "die while sampling"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_answers_each_prompt_once_as_generate_would(open_pool, tmp_path, workers, misfortune):
    pool = open_pool(workers=workers)
    pool.load_weights(weights(0))
    at_once = {rollout.prompt.id: rollout for rollout in pool.generate(PROMPTS, ONE_EACH)}
    if misfortune:
        (tmp_path / misfortune).touch()

    streamed = list(pool.stream(asked(*PROMPTS)))

    assert sorted(rollout.prompt.id for rollout in streamed) == sorted(at_once)
    assert all(rollout == at_once[rollout.prompt.id] for rollout in streamed)
    assert pool.num_workers == workers
    assert list(pool.stream(asked())) == []


def test_a_stream_takes_what_is_asked_while_it_is_read(open_pool):
    pool = open_pool()
    pool.load_weights(weights(0))
    waiting = asked(*PROMPTS[:3])
    seen = []
    for rollout in pool.stream(waiting):
        seen.append(rollout.prompt.id)
        if "then" not in rollout.prompt.id:
            waiting.append((replace(rollout.prompt, id=f"{rollout.prompt.id}, then"), ONE_EACH))

    first = [prompt.id for prompt in PROMPTS[:3]]
    assert sorted(seen) == sorted([*first, *(f"{name}, then" for name in first)])
    assert all(seen.index(name) < seen.index(f"{name}, then") for name in first)


def test_a_stream_that_hangs_or_has_no_room_is_named(open_pool, tmp_path):
    pool = open_pool(workers=1, generate_s=1.5)
    with pytest.raises(StaleEngineError, match="call load_weights before stream"):
        next(pool.stream(asked(PROMPTS[0])))
    pool.load_weights(weights(0))
    with pytest.raises(DataError, match=r"prompt 'long' has 9 tokens; with 8 response tokens it needs 17"):
        next(pool.stream(asked(Prompt(id="long", messages=(), token_ids=(1,) * 9))))
    (tmp_path / "hang").touch()
    with pytest.raises(DeadlineExceeded, match=r"rollout worker 0: advance\(\) did not return within 1.5 s"):
        next(pool.stream(asked(PROMPTS[0])))
