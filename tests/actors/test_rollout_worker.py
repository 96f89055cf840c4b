"""What a rollout worker asks of its engine; the engine here finishes the request that came first, one a step."""

import pytest

from actors.rollout_worker import RolloutWorker
from pipeline.data.sampling import rollout_requests
from pipeline.records import Prompt, SamplingParams

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, samples_per_prompt=1, seed=0)
REQUESTS = rollout_requests([Prompt(id=str(n), messages=(), token_ids=(n,)) for n in range(6)], SAMPLING)


class Engine:
    def __init__(self):
        self.waiting, self.submitted, self.aborted = {}, [], []

    def submit(self, number, prompt, seed, sampling):
        self.waiting[number] = prompt
        self.submitted.append(prompt[0])

    def step(self):
        if not self.waiting:
            return {}
        number = min(self.waiting)
        return {number: self.waiting.pop(number)}

    def abort(self, numbers):
        self.aborted += [self.waiting.pop(number)[0] for number in numbers if number in self.waiting]
        return self.step()


@pytest.fixture
def worker(monkeypatch):
    worker = RolloutWorker("rollout worker 0")
    worker._engine, worker._version = Engine(), 3
    monkeypatch.setattr(worker, "_rollout", lambda request, sample, version: (request.prompt.id, sample, version))
    return worker


def answers(*ids):
    return [(str(n), (n,), 3) for n in ids]


def test_what_was_begun_ahead_is_not_submitted_again_when_it_is_asked_for(worker):
    assert worker.sample(REQUESTS[:2], SAMPLING, ahead=REQUESTS[2:4]) == answers(0, 1)
    assert worker.sample(REQUESTS[2:4], SAMPLING, ahead=REQUESTS[4:]) == answers(2, 3)
    assert worker.sample(REQUESTS[4:], SAMPLING) == answers(4, 5)
    assert worker._engine.submitted == [0, 1, 2, 3, 4, 5]
    assert worker._engine.aborted == []


def test_what_another_worker_was_asked_for_instead_is_aborted(worker):
    assert worker.sample(REQUESTS[:1], SAMPLING, ahead=REQUESTS[1:3]) == answers(0)
    assert worker.sample(REQUESTS[3:5], SAMPLING) == answers(3, 4)
    assert worker._engine.aborted == [1, 2]
    assert (worker._open, worker._finished, worker._ahead) == ({}, {}, {})


def test_a_new_policy_ends_all_that_was_asked_of_the_old_one(worker):
    assert worker.sample(REQUESTS[:1], SAMPLING, ahead=REQUESTS[1:3]) == answers(0)
    worker._forget()
    assert worker._engine.aborted == [1, 2]
    worker._version = 3
    assert worker.sample(REQUESTS[1:3], SAMPLING) == answers(1, 2)
    assert worker._engine.submitted == [0, 1, 2, 1, 2]
