"""The pool's own work, with real Ray actors that hold no engine: order, replacement, deadlines, resizing, overlap."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.exceptions import RayActorError

from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings, WorkerActors
from cluster.autoscaler import Autoscaler
from cluster.placement import pack_bundles
from cluster.rollout_plan import THROUGH_FILES, RolloutPlan
from cluster.running_jobs import jobs_with_rollout_workers, workspace_of
from pipeline.columns import Rollouts
from pipeline.config.alignment import AlignmentConfig, PPOConfig
from pipeline.config.cluster import AutoscaleConfig, DeadlinesConfig, RolloutConfig
from pipeline.data.prompts import PromptStream
from pipeline.errors import (
    ConfigError,
    DataError,
    DeadlineExceeded,
    StaleEngineError,
    TransferFailed,
    WorkerDied,
    WorkspaceError,
)
from pipeline.records import PolicyWeights, Prompt, Rollout, SamplingParams
from pipeline.rollouts.prefetch import OnPolicyRollouts, PrefetchingRollouts, StepPlan
from pipeline.stages.preemption import PreemptionNotice, WaitCutShort
from pipeline.stages.scaling_requests import request_rollout_workers, requested_rollout_workers
from pipeline.stages.workspace import Workspace

pytestmark = [pytest.mark.components, pytest.mark.usefixtures("local_ray")]

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, samples_per_prompt=2, seed=0)
SLOW_S = 3.0
PROMPTS = [Prompt(id=f"prompt {n}", messages=(), token_ids=(n,)) for n in range(7)]


class ScriptedWorker:
    """Answers each request with its seed; misbehaves once for every marker file it finds in its model directory.

    A marker tells whoever finds it first, or one worker by its name: "be stale, rollout worker 1".
    """

    def __init__(self, name):
        self._name = name
        self._open = {}

    def start(self, directory, config, weight_transfer, dtype, max_model_len, seed):
        self._directory = Path(directory)
        if self._told("refuse to start"):
            raise ConfigError(f"{self._name} cannot serve this model")

    def load_weights(self, weights, tolerance):
        if self._told("die while loading"):
            os._exit(1)
        if self._told("hang while loading"):
            time.sleep(60)
        if self._told("fetch in vain"):
            raise DeadlineExceeded("fetching policy version 7 from node f00d did not end.")
        if self._told("be stale"):
            raise StaleEngineError(f"{self._name} is stale")
        return self.accept_weights(weights, tolerance)

    def accept_weights(self, weights, tolerance):
        self._asleep = False
        self._version = weights.version
        return {
            "gate/mean": 1e-6,
            "gate/max": 2e-6,
            "weights/seconds": 0.5,
            "weights/gb_per_s": 2.0,
            "weights/copy_gb_per_s": 8.0,
            "weights/copies_fetched": 1.0,
            "memory/rollout_worker_peak_gib": 0.5 + int(self._name.split()[-1]),
        }

    def sleep(self):
        if self._told("die on the way to bed"):
            os._exit(1)
        self._asleep = True

    def is_asleep(self):
        return self._asleep

    def sample(self, requests, sampling, ahead=(), *, seconds=None, resample_unfinished=False):
        if self._told("die while sampling"):
            os._exit(1)
        if self._told("hang"):
            time.sleep(60)
        if self._told("be slow"):
            time.sleep(SLOW_S)
        self._unfinished, self._begun_with = requests, self._version
        self._num_ahead = len(ahead)
        self._is_stuck = self._told("get stuck")
        return self._num_open() if self._is_busy() else self._answer(requests)

    def continue_sampling(self, ahead, *, seconds):
        if self._told("die while sampling"):
            os._exit(1)
        self._num_ahead += len(ahead)
        time.sleep(0.05)
        return self._num_open() if self._is_busy() else self._answer(self._unfinished)

    def _num_open(self):
        """All it was given; or one, while the marker is there."""
        has_one_left = (self._directory / "have one response left").exists()
        return 1 if has_one_left else len(self._unfinished) + self._num_ahead

    def _is_busy(self):
        """While the marker is there, with all prompts or this one: between slices it can be told something else."""
        marker = self._directory / "be busy"
        with_prompts = marker.read_text() if marker.exists() else "none"
        return self._is_stuck or any(with_prompts in r.prompt.id for r in self._unfinished)

    def _answer(self, requests):
        pace = self._directory / "seconds a response"
        time.sleep(len(requests) * float(pace.read_text()) if pace.exists() else 0.0)
        at_length = (self._directory / "answer at length").exists()
        (self._directory / f"{self._name} sampled").touch()
        with open(self._directory / "sampled", "a") as log:
            log.writelines(f"{r.prompt.id}, sample {r.sample_index}\n" for r in requests)
        rollouts = [
            Rollout(
                prompt=request.prompt,
                sample_index=request.sample_index,
                response_ids=(request.seed % 2**31,) * (1 + at_length * request.prompt.token_ids[0]),
                response_text=f"begun with {self._begun_with}",
                logprobs=(0.0,),
                policy_version=self._version,
                finish_reason="stop",
            )
            for request in requests
        ]
        return Rollouts.of(rollouts)

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
        for marker in (what, f"{what}, {self._name}"):
            with suppress(FileNotFoundError):
                (self._directory / marker).unlink()
                return True
        return False


@pytest.fixture
def open_pool(tmp_path):
    """Opens pools of scripted workers whose script lies in `tmp_path`."""
    pools = []

    def open_pool(
        *,
        generate_s=30.0,
        weights_s=120,
        requested_workers=lambda: None,
        autoscaler=None,
        workspace=None,
        plan=THROUGH_FILES,
        placement=None,
        **config,
    ):
        config = RolloutConfig(**{"workers": 2, "cpus_per_worker": 0.1, "chunk_size": 3} | config)
        deadlines = DeadlinesConfig(start_s=120, generate_s=generate_s, weights_s=weights_s)
        pools.append(
            RolloutPool(
                EngineSettings(
                    model_uri=str(tmp_path), dtype="float32", max_model_len=16, gate_tolerance=1e-4, seed=0, plan=plan
                ),
                config,
                deadlines,
                actors=WorkerActors(worker=ScriptedWorker, placement=placement, workspace=workspace),
                requested_workers=requested_workers,
                autoscaler=autoscaler,
            )
        )
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()


def weights(version):
    return PolicyWeights(version=version, location="", probes=(), written_gb_per_s=3.0)


def test_any_number_of_workers_gives_the_same_rollouts_in_order(open_pool):
    pool = open_pool(workers=1)
    metrics = pool.load_weights(weights(3))
    alone = pool.generate(PROMPTS, SAMPLING)
    pool.resize(3)
    together = pool.generate(PROMPTS, SAMPLING)
    pool.resize(2)

    assert metrics == {
        "rollout/workers": 1.0,
        "rollout/chunks_issued_again": 0.0,
        "rollout/answers_dropped": 0.0,
        "gate/mean": 1e-6,
        "gate/max": 2e-6,
        "weights/written_gb_per_s": 3.0,
        "weights/seconds": 0.5,
        "weights/gb_per_s": 2.0,
        "weights/copy_gb_per_s": 8.0,
        "weights/copies_fetched": 1.0,
        "memory/rollout_worker_peak_gib": 0.5,
    }
    assert [(r.prompt.id, r.sample_index) for r in alone] == [(p.id, i) for p in PROMPTS for i in range(2)]
    assert {r.policy_version for r in alone} == {3}
    assert together == alone == pool.generate(PROMPTS, SAMPLING)
    assert pool.num_workers == 2
    metrics = pool.load_weights(weights(3))
    assert metrics["memory/rollout_worker_peak_gib"] == 1.5  # of the second worker
    assert metrics["weights/copies_fetched"] == 2.0  # of both


def test_a_pool_that_grows_and_shrinks_in_the_middle_of_batches_samples_nothing_twice(open_pool, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.rollouts.chunks.STRAGGLER", math.inf)  # whose chunks are sampled twice by intent
    pool = open_pool(workers=1)
    pool.load_weights(weights(0))
    for step, num_workers in enumerate((3, 1, 2)):
        pool.begin(PROMPTS, replace(SAMPLING, seed=step))
        pool.resize(num_workers)
        pool.collect()
    sampled = Counter((tmp_path / "sampled").read_text().splitlines())
    assert sampled == {f"{p.id}, sample {i}": 3 for p in PROMPTS for i in range(2)}


def test_the_chunks_that_took_the_longest_responses_before_are_handed_out_first(open_pool, tmp_path):
    (tmp_path / "answer at length").touch()  # a prompt's number is that of its responses, less one
    pool = open_pool(workers=1)
    pool.load_weights(weights(0))
    orders = []
    for _ in range(2):
        pool.generate(PROMPTS, SAMPLING)
        orders.append("".join(line[len("prompt ")] for line in (tmp_path / "sampled").read_text().splitlines()))
        (tmp_path / "sampled").unlink()
    assert orders == ["00112233445566", "66" + "455" + "334" + "122" + "001"]


def test_an_engine_with_one_long_response_left_is_given_one_chunk_after_another(open_pool, tmp_path):
    pool = open_pool(workers=1)
    pool.load_weights(weights(0))
    untroubled = pool.generate(PROMPTS, SAMPLING)

    def wait_for_reserved_chunks(count):
        until(lambda: len(pool._sampler._batch[0].reserved.get("rollout worker 0", ())) == count)

    (tmp_path / "be busy").write_text("prompt 0")
    pool.begin(PROMPTS, SAMPLING)
    wait_for_reserved_chunks(1)  # its engine has both chunks: enough to do
    (tmp_path / "have one response left").touch()
    wait_for_reserved_chunks(4)  # all that there are beside the one with prompt 0
    (tmp_path / "be busy").unlink()
    assert pool.collect() == untroubled


@pytest.mark.parametrize("misfortune", ["die while sampling", "die while loading"])
def test_a_dead_worker_is_replaced_and_nothing_is_lost(open_pool, tmp_path, misfortune):
    pool = open_pool()
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]

    (tmp_path / misfortune).touch()
    pool.load_weights(weights(0))

    assert [*pool.generate(PROMPTS, SAMPLING)] == untroubled
    assert pool.num_workers == 2
    assert not (tmp_path / misfortune).exists()


def test_a_worker_that_dies_past_the_budget_ends_the_job_with_its_name(open_pool, tmp_path):
    pool = open_pool(workers=1, max_restarts=0)
    pool.load_weights(weights(0))

    (tmp_path / "die while sampling").touch()
    with pytest.raises(WorkerDied, match=r"rollout worker 0 died during sample\(\); the budget is 0 restarts"):
        pool.generate(PROMPTS, SAMPLING)


def test_a_hanging_worker_is_named_with_its_call_and_seconds(open_pool, tmp_path):
    pool = open_pool(workers=1, generate_s=1.5, max_restarts=0)
    pool.load_weights(weights(0))

    (tmp_path / "hang").touch()
    with pytest.raises(DeadlineExceeded, match=r"rollout worker 0: sample\(\) did not return within 1.5 s"):
        pool.generate(PROMPTS, SAMPLING)


def test_a_hanging_worker_is_replaced_within_the_budget(open_pool, tmp_path):
    pool = open_pool(workers=1, generate_s=1.5, weights_s=5.0, max_restarts=2)
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]

    (tmp_path / "hang").touch()
    assert [*pool.generate(PROMPTS, SAMPLING)] == untroubled
    (tmp_path / "hang while loading").touch()
    assert pool.load_weights(weights(0))["rollout/workers"] == 1
    assert [*pool.generate(PROMPTS, SAMPLING)] == untroubled
    assert [worker.name for worker in pool._fleet.workers] == ["rollout worker 2"]


def test_a_worker_that_cannot_fetch_the_weights_is_replaced_within_the_budget_and_its_own_words_are_told(
    open_pool, tmp_path, caplog
):
    pool = open_pool(workers=1, max_restarts=1)
    (tmp_path / "fetch in vain").touch()
    pool.load_weights(weights(7))
    assert caplog.messages == ["fetching policy version 7 from node f00d did not end. Replacing it, 0 restarts left."]

    (tmp_path / "fetch in vain").touch()
    with pytest.raises(DeadlineExceeded, match=r"^fetching policy version 7 from node f00d did not end\.$"):
        pool.load_weights(weights(7))


def test_workers_that_answered_a_batch_nobody_wanted_are_not_taken_for_hanging(open_pool):
    """Their answers lie there, read by nobody, for longer than a call may take."""
    pool = open_pool(generate_s=3.0, max_restarts=0, chunk_size=1)
    pool.load_weights(weights(0))
    pool.begin(PROMPTS * 20, SAMPLING)
    while True:
        with pool._sampler.turn:  # under which answers are taken
            if len(pool._sampler.calls) == 2:
                pool._sampler.abandon()
                break
    time.sleep(3.5)
    assert [call.deadline < time.monotonic() for call in pool._sampler.calls.values()] == [True, True]
    assert len(pool.generate(PROMPTS, SAMPLING)) == 14


def test_a_late_chunk_is_sampled_again_and_stands_in_the_batch_once(open_pool, tmp_path):
    (tmp_path / "seconds a response").write_text("0.05")  # a worker that is merely scheduled late is not a late one
    pool = open_pool()
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]
    (tmp_path / "sampled").unlink()

    (tmp_path / "be slow").touch()
    started = time.monotonic()
    assert [*pool.generate(PROMPTS, SAMPLING)] == untroubled
    assert time.monotonic() - started < SLOW_S  # nobody waited for the slow one
    # The chunk that it was asked for, and the one that it would have been asked for next.
    assert pool.load_weights(weights(1))["rollout/chunks_issued_again"] == 2
    assert [(r.prompt.id, r.response_ids) for r in pool.generate(PROMPTS, SAMPLING)] == [
        (r.prompt.id, r.response_ids) for r in untroubled
    ]
    metrics = pool.load_weights(weights(2))

    assert (metrics["rollout/chunks_issued_again"], metrics["rollout/answers_dropped"]) == (0, 1)
    times = Counter((tmp_path / "sampled").read_text().splitlines())
    assert len(times) == 14
    assert Counter(times.values()) == {2: 11, 3: 3}  # two batches, and one chunk once more


# The only worker is slow with its first of five chunks while the weights change.
@pytest.mark.parametrize(("resample", "old"), [(False, 3), (True, 0)])
def test_chunks_begun_before_an_update_go_on_or_are_sampled_again_and_those_that_wait_are_new(
    open_pool, tmp_path, resample, old
):
    pool = open_pool(workers=1)
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]

    (tmp_path / "be slow").touch()
    pool.begin(PROMPTS, SAMPLING, resample_unfinished=resample)
    assert until(lambda: not (tmp_path / "be slow").exists())
    dropped = pool.load_weights(weights(1))["rollout/answers_dropped"]
    rollouts = pool.collect()
    metrics = pool.load_weights(weights(2))

    assert [r.policy_version for r in rollouts] == [0] * old + [1] * (14 - old)
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in untroubled]
    assert dropped == (1 if resample else 0)
    assert metrics["rollout/seconds"] >= SLOW_S - 1
    learner_s = metrics["rollout/seconds"] + metrics["rollout/queue_wait_s"] - metrics["rollout/learner_wait_s"]
    assert learner_s >= SLOW_S - 1  # the load waited for the chunk that was out
    assert "rollout/seconds" not in pool.load_weights(weights(3))  # nothing was sampled since


# The only worker is in the middle of its first chunk of five when new weights come, and long after.
@pytest.mark.parametrize(("resample", "resumed", "dropped"), [(False, 3, 0), (True, 0, 1)])
def test_weights_do_not_wait_for_a_chunk_and_what_was_begun_goes_on_or_begins_anew(
    open_pool, tmp_path, resample, resumed, dropped
):
    pool = open_pool(workers=1)
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]

    (tmp_path / "be busy").touch()
    pool.begin(PROMPTS, SAMPLING, resample_unfinished=resample)
    assert until(lambda: pool._sampler.calls)
    assert pool.load_weights(weights(1))["rollout/answers_dropped"] == dropped  # it came back though nothing finished
    (tmp_path / "be busy").unlink()
    rollouts = pool.collect()

    assert [r.response_ids for r in rollouts] == [r.response_ids for r in untroubled]
    assert [r.policy_version for r in rollouts] == [1] * 14
    assert [r.response_text for r in rollouts] == ["begun with 0"] * resumed + ["begun with 1"] * (14 - resumed)


def test_of_a_chunk_that_two_workers_are_at_one_goes_on_after_an_update(open_pool, tmp_path):
    pool = open_pool()
    pool.load_weights(weights(0))
    (tmp_path / "be busy").write_text("prompt 0")
    pool.begin(PROMPTS, SAMPLING)
    assert until(lambda: [call.chunk.number for call in [*pool._sampler.calls.values()]] == [0, 0])
    metrics = pool.load_weights(weights(1))
    time.sleep(1)  # each of the other chunks took a moment, and this one would be late again
    with pool._sampler.turn:
        assert len(pool._sampler.calls) == 1
    (tmp_path / "be busy").unlink()
    rollouts = pool.collect()

    assert metrics["rollout/answers_dropped"] == 1
    assert [r.response_text for r in rollouts[:3]] == ["begun with 0"] * 3
    assert set(Counter((tmp_path / "sampled").read_text().splitlines()).values()) == {1}


def test_weights_wait_for_a_worker_that_hangs_as_long_as_for_weights_and_not_as_for_a_chunk(open_pool, tmp_path):
    pool = open_pool(generate_s=100, weights_s=3)
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]
    (tmp_path / "hang").touch()
    pool.begin(PROMPTS, SAMPLING)
    assert until(lambda: not (tmp_path / "hang").exists())
    started = time.monotonic()
    assert pool.load_weights(weights(1))["rollout/workers"] == 2
    assert time.monotonic() - started < 50  # the worker hangs for 60
    assert [r.response_ids for r in pool.collect()] == [r.response_ids for r in untroubled]


def test_what_a_worker_had_begun_is_sampled_by_another_when_it_dies_between_two_tokens(open_pool, tmp_path):
    pool = open_pool(workers=1, max_restarts=1)
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]
    (tmp_path / "be busy").touch()
    pool.begin(PROMPTS, SAMPLING)
    assert until(lambda: pool._sampler.calls)
    (tmp_path / "die while loading").touch()
    pool.load_weights(weights(1))
    (tmp_path / "be busy").unlink()
    assert [r.response_ids for r in pool.collect()] == [r.response_ids for r in untroubled]
    assert [worker.name for worker in pool._fleet.workers] == ["rollout worker 1"]


def test_a_worker_leaves_a_chunk_that_another_has_answered(open_pool, tmp_path):
    pool = open_pool()
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]
    (tmp_path / "get stuck").touch()  # one of the two, decoding on and on
    assert [*pool.generate(PROMPTS, SAMPLING)] == untroubled
    assert not (tmp_path / "get stuck").exists()
    # Long enough that either worker is asked before the other has answered everything.
    (tmp_path / "seconds a response").write_text("0.1")
    for worker in (0, 1):
        (tmp_path / f"rollout worker {worker} sampled").unlink(missing_ok=True)
    assert [*pool.generate(PROMPTS, SAMPLING)] == untroubled
    assert [(tmp_path / f"rollout worker {worker} sampled").exists() for worker in (0, 1)] == [True, True]


def test_a_batch_nobody_collects_leaves_nothing_behind(open_pool):
    pool = open_pool()
    pool.load_weights(weights(0))
    pool.begin(list(reversed(PROMPTS)), SAMPLING)
    rollouts = pool.generate(PROMPTS, SAMPLING)
    assert [(r.prompt.id, r.sample_index) for r in rollouts] == [(p.id, i) for p in PROMPTS for i in range(2)]
    with pytest.raises(StaleEngineError, match="call begin before collect"):
        pool.collect()


def test_a_notice_ends_the_wait_for_a_worker_that_hangs_and_the_pool_closes(open_pool, tmp_path):
    pool = open_pool(generate_s=100, workers=1)
    pool.load_weights(weights(0))
    (tmp_path / "hang").touch()
    notice = PreemptionNotice()
    with notice.watching():
        asked = time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(WaitCutShort), notice.cutting_short():
            pool.generate(PROMPTS, SAMPLING)
        pool.close()
    assert not (tmp_path / "hang").exists()
    assert time.monotonic() - asked < 50  # the worker hangs for 60


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
        if pool._fleet.joining:
            until(lambda: len(ray.wait([w.started for w in pool._fleet.joining], num_returns=2, timeout=0)[0]) == 2)

    assert sizes[0] == 1
    assert sizes[2:] == [3, 1]
    assert rollouts == [rollouts[0]] * 4


def test_a_prefetched_run_that_is_resized_and_loses_a_worker_has_every_sample_of_the_plain_run_once(
    open_pool, tmp_path
):
    config = AlignmentConfig(
        num_steps=8,
        prompts_per_step=7,
        samples_per_prompt=2,
        max_response_tokens=8,
        prefetch="continue",
        ppo=PPOConfig(mini_batch_size=14, tis_cap=2.0),
    )
    plan = StepPlan(prompts=PromptStream(prompts=tuple(PROMPTS), seed=0), config=config)

    def run(pool, rollouts, before_update=lambda step: None):
        samples, sizes = [], []
        for step in range(config.num_steps):
            sizes.append(pool.load_weights(weights(step))["rollout/workers"])
            batch, ages = rollouts.collect(step)
            rollouts.sample_ahead(step + 1)
            assert ages["rollout/staleness_max"] <= (1 if isinstance(rollouts, PrefetchingRollouts) else 0)
            samples.append([(r.prompt.id, r.sample_index, r.response_ids) for r in batch])
            before_update(step)
        return samples, sizes

    pool = open_pool(workers=1)
    plain, _ = run(pool, OnPolicyRollouts(pool, plan))
    pool.close()

    with Workspace.open(str(tmp_path / "run"), job="mine", needs_bytes=0) as workspace:
        pool = open_pool(
            workers=1, workspace=workspace.uri, requested_workers=lambda: requested_rollout_workers(workspace.uri)
        )

        def disturb(step):
            if step == 1:
                request_rollout_workers(workspace.uri, 3)
            if step == 2:  # the two are asked for; they join at the next load after they are up
                for worker in pool._fleet.joining:
                    ray.get(worker.started)
            if step == 3:
                (tmp_path / "die while sampling").touch()
            if step == 5:
                scale_by_job(ray.get_runtime_context().namespace, 1)

        disturbed, sizes = run(pool, PrefetchingRollouts(pool, plan), disturb)

    assert not (tmp_path / "die while sampling").exists()
    assert (sizes[:2], sizes[3:]) == ([1, 1], [3, 3, 3, 1, 1])
    assert disturbed == plain


def scale_by_job(job, workers):
    """As an operator does, who knows the submission id alone."""
    address = ray.get_runtime_context().gcs_address
    subprocess.run(
        [sys.executable, "-m", "jobs.scale_rollouts", "--job", job, "--workers", str(workers)],
        env={**os.environ, "RAY_ADDRESS": address},
        check=True,
        capture_output=True,
    )


def test_a_job_is_found_by_its_id_while_it_has_workers_and_an_unknown_one_is_answered_with_those_there_are(open_pool):
    job = ray.get_runtime_context().namespace
    assert job not in jobs_with_rollout_workers()
    pool = open_pool(workers=1, workspace="s3://bucket/in place/tiny")
    assert workspace_of(job) == "s3://bucket/in place/tiny"
    with pytest.raises(
        WorkspaceError, match=rf"'raysubmit_7' has no rollout workers .*:\n  {job}: s3://bucket/in place"
    ):
        workspace_of("raysubmit_7")
    pool.close()
    assert until(lambda: job not in jobs_with_rollout_workers())


class AlwaysTwo:
    def target_workers(self, workers, waits):
        return 2


def test_the_autoscaler_is_followed_until_an_operator_speaks(open_pool):
    operator = []
    pool = open_pool(workers=1, requested_workers=lambda: operator[-1] if operator else None, autoscaler=AlwaysTwo())
    pool.load_weights(weights(0))
    assert len(pool._fleet.joining) == 1
    operator.append(1)
    pool.load_weights(weights(1))
    assert pool._fleet.joining == []


def test_a_pool_grows_while_the_learner_waits_and_shrinks_while_rollouts_wait_for_it(open_pool, tmp_path):
    (tmp_path / "seconds a response").write_text("0.1")  # 1.4 s a batch for one worker
    pool = open_pool(workers=1, autoscaler=Autoscaler(AutoscaleConfig(max_workers=2, cooldown_s=0)))
    pool.load_weights(weights(0))

    def update_for(seconds):
        pool.begin(PROMPTS, SAMPLING)
        time.sleep(seconds)
        pool.collect()
        pool.load_weights(weights(0))
        for worker in pool._fleet.joining:  # they join at the next load after they are up
            ray.get(worker.started)
        pool.load_weights(weights(0))
        return pool.num_workers

    # 0.8 s would be balanced by ceil(1.4 / (1.1 x 0.8)) = 2 workers, 4 s by one.
    assert [update_for(seconds) for seconds in (0.8, 0.8, 4.0)] == [2, 2, 1]


def test_a_request_that_cannot_be_met_does_not_end_the_run(open_pool, tmp_path):
    wish = []
    pool = open_pool(workers=1, requested_workers=lambda: wish[-1] if wish else None)
    pool.load_weights(weights(0))  # the first worker is up before the second is asked for
    (tmp_path / "refuse to start").touch()
    wish.append(2)

    assert until(lambda: pool.load_weights(weights(0)) and pool._given_up == 2)

    assert not pool._fleet.joining
    assert pool.load_weights(weights(1))["rollout/workers"] == 1


def test_a_worker_that_fails_as_it_joins_a_run_is_given_up_and_one_that_serves_ends_it(open_pool, tmp_path, caplog):
    wish = [None]
    pool = open_pool(workers=1, max_restarts=0, requested_workers=lambda: wish[-1])
    pool.load_weights(weights(0))
    untroubled = [*pool.generate(PROMPTS, SAMPLING)]
    wish.append(4)
    pool.load_weights(weights(0))
    stale, dying, _ = joining = list(pool._fleet.joining)
    ray.get([worker.started for worker in joining], timeout=120)

    (tmp_path / "be stale, rollout worker 1").touch()
    (tmp_path / "die while loading, rollout worker 2").touch()
    sizes = [pool.load_weights(weights(0))["rollout/workers"] for _ in range(2)]

    assert sizes == [2, 2]
    assert pool._fleet.joining == []  # nor are others tried
    assert f"{stale.name}, asked for from outside, did not join: {stale.name} is stale" in caplog.text
    assert f"{dying.name}, asked for from outside, did not join: The actor died" in caplog.text
    with pytest.raises(RayActorError):  # it leaves its place to others
        ray.get(stale.actor.is_asleep.remote(), timeout=60)
    assert [*pool.generate(PROMPTS, SAMPLING)] == untroubled
    samplers = {path.name for path in tmp_path.glob("* sampled")}
    assert samplers <= {"rollout worker 0 sampled", "rollout worker 3 sampled"}

    (tmp_path / "be stale, rollout worker 0").touch()
    with pytest.raises(StaleEngineError, match="rollout worker 0 is stale"):
        pool.load_weights(weights(1))


def test_a_worker_that_finds_no_room_is_given_up_at_its_deadline(open_pool, caplog):
    wish = [None]
    pool = open_pool(workers=1, cpus_per_worker=3, requested_workers=lambda: wish[-1])  # of 4
    pool.load_weights(weights(0))
    wish.append(2)
    pool.load_weights(weights(0))
    assert len(pool._fleet.joining) == 1

    pool._deadlines = pool._deadlines.model_copy(update={"start_s": 1e-3})
    time.sleep(0.01)
    sizes = [pool.load_weights(weights(0))["rollout/workers"] for _ in range(2)]

    assert sizes == [1, 1]
    assert pool._fleet.joining == []
    assert "rollout worker 1, asked for from outside, did not join: rollout worker 1: start() did not" in caplog.text
    assert "it needs 3 CPU and 0 GPU; 1 and 0 are free" in caplog.text


def test_requests_that_cannot_be_met_are_refused_before_any_work(open_pool):
    pool = open_pool(workers=1)

    with pytest.raises(StaleEngineError, match="call load_weights before generate"):
        pool.generate(PROMPTS, SAMPLING)
    pool.load_weights(weights(0))
    with pytest.raises(DataError, match="'long' has 9 tokens"):
        pool.generate([*PROMPTS, Prompt(id="long", messages=(), token_ids=(1,) * 9)], SAMPLING)
    with pytest.raises(ConfigError, match="at least 1"):
        pool.resize(0)


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


class ScriptedSender:
    """Says whom it sent to; fails when told to."""

    def __init__(self):
        self.sent, self.fails = [], False

    def send(self, workers):
        if self.fails:
            raise TransferFailed("a cable was cut")
        self.sent.append(tuple(workers))


def test_shared_gpus_hold_one_worker_each_which_sleeps_until_the_next_weights(open_pool, tmp_path):
    """Two bundles of the learner's, in which CPUs stand for GPUs."""
    placement = pack_bundles(2, cpus=0.2, gpus=0.0, timeout_s=30, name="shared", tenants=2)
    plan = RolloutPlan(placement="colocated", weight_transfer="ipc")
    pool, sender = open_pool(workers=1, plan=plan, placement=placement, requested_workers=lambda: 5), ScriptedSender()
    [first] = pool._fleet.workers

    def asleep():
        return ray.get([worker.actor.is_asleep.remote() for worker in pool._fleet.workers], timeout=60)

    pool.sleep()  # before there are weights: the learner is about to be built
    assert asleep() == [True]
    with pool.fed_by(sender):
        # Five are asked for, and two GPUs hold one each.
        assert until(lambda: pool.load_weights(weights(0))["rollout/workers"] == 2)
        assert [worker.bundle for worker in pool._fleet.workers] == [0, 1]
        assert asleep() == [False, False]
        pool.sleep()
        assert asleep() == [True, True]
        pool.load_weights(weights(1))
        assert asleep() == [False, False]
        assert sender.sent[0] == (first.name,)
        assert sender.sent[-1] == tuple(worker.name for worker in pool._fleet.workers)

        # One dies asleep: the transfer fails, all read the file, and its successor gets its place.
        (tmp_path / "die on the way to bed").touch()
        pool.sleep()
        sender.fails = True
        metrics = pool.load_weights(weights(2))
        assert metrics["weights/sent_between_gpus"] == 0
        assert asleep() == [False, False]
        assert [worker.bundle for worker in pool._fleet.workers] == [0, 1]
    with pytest.raises(ConfigError, match=r"3 rollout workers do not fit the learner's 2 GPUs, which hold one each"):
        pool.resize(3)
    pool.close()
    placement.remove()


def test_engines_that_only_know_files_are_never_sent_to(open_pool):
    pool, sender = open_pool(workers=1), ScriptedSender()
    with pool.fed_by(sender):
        assert "weights/sent_between_gpus" not in pool.load_weights(weights(0))
        pool.sleep()  # has a GPU, or none, of its own
        [worker] = pool._fleet.workers
        assert not ray.get(worker.actor.is_asleep.remote(), timeout=60)
    assert sender.sent == []
