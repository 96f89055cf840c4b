"""How many steps engines decode for a batch, by the sampler's own threads and ledger, without Ray."""

from collections import deque
from types import SimpleNamespace

import pytest

from actors import rollout_sampler
from actors.rollout_sampler import BatchSampler
from actors.worker_handle import WorkerHandle
from pipeline.columns import Rollouts
from pipeline.records import Prompt, SamplingParams
from pipeline.rollouts import engine_sampler
from pipeline.rollouts.engine_sampler import EngineSampler

SLOTS = 4
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=256, samples_per_prompt=1, seed=0)


class SlotEngine:
    """Decodes so many responses at a time; a prompt's first token says how long its response is."""

    def __init__(self):
        self.waiting, self.running, self.steps = deque(), {}, 0

    def submit(self, number, prompt, seed, sampling):
        self.waiting.append((number, prompt[0], seed))

    def step(self):
        while self.waiting and len(self.running) < SLOTS:
            number, length, seed = self.waiting.popleft()
            self.running[number] = [length, seed]
        self.steps += 1
        for left in self.running.values():
            left[0] -= 1
        finished = {number: seed for number, (left, seed) in self.running.items() if left == 0}
        self.running = {number: left for number, left in self.running.items() if left[0] > 0}
        return {
            number: SimpleNamespace(token_ids=(seed % 2**31,), logprobs=(0.0,), finish_reason="stop")
            for number, seed in finished.items()
        }

    def abort(self, numbers):
        self.waiting = deque(request for request in self.waiting if request[0] not in numbers)
        for number in numbers:
            self.running.pop(number, None)
        return self.step()


class Method:
    """Answers a remote call at once."""

    def __init__(self, method, answers):
        self._method, self._answers = method, answers

    def remote(self, *arguments, **named):
        answer = self._method(*arguments, **named)
        self._answers.append(answer if isinstance(answer, int) else Rollouts.of(answer))
        return len(self._answers) - 1


class Actor:
    """An engine's sampler in the place of a Ray actor."""

    def __init__(self, engine, answers):
        sampler = EngineSampler(engine, lambda token_ids: "", name="an engine")
        sampler.accept_policy(0)
        self.sample = Method(sampler.sample, answers)
        self.continue_sampling = Method(sampler.continue_sampling, answers)


class Cluster:
    """In the place of the fleet, and of Ray."""

    def __init__(self, num_workers):
        self.engines = [SlotEngine() for _ in range(num_workers)]
        self._answers = []
        self.workers = [
            WorkerHandle(name=f"worker {n}", actor=Actor(engine, self._answers), started=None)
            for n, engine in enumerate(self.engines)
        ]

    def wait(self, replies, num_returns, timeout):
        return replies[:num_returns], replies[num_returns:]

    def answer(self, worker, reply, doing, deadline_s):
        return self._answers[reply]


@pytest.fixture
def sample(monkeypatch):
    """Samples responses of these lengths in chunks of as many as an engine decodes: the rollouts, and the engines."""

    def sample(lengths, *, num_workers):
        cluster = Cluster(num_workers)
        steps = SimpleNamespace(monotonic=lambda: sum(engine.steps for engine in cluster.engines))
        monkeypatch.setattr(engine_sampler, "time", steps)
        monkeypatch.setattr(rollout_sampler, "ray", cluster)
        monkeypatch.setattr(rollout_sampler, "SLICE_S", 2)
        sampler = BatchSampler(cluster, chunk_size=SLOTS, generate_s=60.0, weights_s=60.0)
        prompts = [Prompt(id=str(n), messages=(), token_ids=(length,)) for n, length in enumerate(lengths)]
        sampler.begin(prompts, SAMPLING, resample_unfinished=False)
        rollouts, _ = sampler.collect()
        sampler.close()
        return [r.response_ids for r in rollouts], cluster.engines

    return sample


def test_an_engine_stays_full_beside_the_longest_response_of_a_chunk(sample):
    lengths = [120, *[6] * 59]
    _, [engine] = sample(lengths, num_workers=1)
    assert sum(lengths) / SLOTS == 118.5
    assert engine.steps <= 124  # three slots have decoded the 59 others when the long response ends


def test_chunks_that_stream_into_several_engines_leave_every_sample_as_it_was(sample):
    lengths = [*[3, 9, 40, 1, 1, 14, 2] * 11]
    alone, _ = sample(lengths, num_workers=1)
    together, engines = sample(lengths, num_workers=3)
    assert together == alone
    assert len({*alone}) == len(lengths)
    assert min(engine.steps for engine in engines) > 0
