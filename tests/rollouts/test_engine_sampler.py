"""What the sampler of a rollout worker asks of its engine, and what it makes of the answers."""

from types import SimpleNamespace

import pytest

from pipeline.errors import StaleEngineError
from pipeline.records import Prompt, SamplingParams
from pipeline.rollouts.engine_sampler import EngineSampler
from pipeline.rollouts.requests import rollout_requests

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, samples_per_prompt=1, seed=0)
REQUESTS = rollout_requests([Prompt(id=str(n), messages=(), token_ids=(n,)) for n in range(6)], SAMPLING)


class Engine:
    """Finishes the request that came first, with one token a step; new weights find one token of every other."""

    def __init__(self):
        self.waiting, self.submitted, self.aborted = {}, [], []

    def submit(self, number, prompt, seed, sampling):
        self.waiting[number] = prompt
        self.submitted.append((prompt, seed, sampling.max_response_tokens))

    def step(self):
        if not self.waiting:
            return {}
        number = min(self.waiting)
        self.waiting.pop(number)
        return {number: SimpleNamespace(token_ids=(100 + number,), logprobs=(-0.5,), finish_reason="stop")}

    def abort(self, numbers):
        self.aborted += [number for number in numbers if self.waiting.pop(number, None)]
        return self.step()

    @property
    def is_busy(self):
        return bool(self.waiting)

    def interrupt(self):
        so_far = {n: SimpleNamespace(token_ids=(90 + n,), logprobs=(-0.25,)) for n in self.waiting}
        self.waiting.clear()
        return so_far


@pytest.fixture
def sampler():
    sampler = EngineSampler(Engine(), lambda token_ids: "", name="rollout worker 0")
    sampler.accept_policy(3)
    return sampler


def load(sampler, version):
    sampler.interrupt()
    sampler.accept_policy(version)


def prompts(sampler):
    return [prompt for prompt, _, _ in sampler._engine.submitted]


def answers(rollouts):
    return [(r.prompt.id, r.response_ids, r.logprobs, r.policy_version) for r in rollouts]


def test_what_was_begun_ahead_is_not_submitted_again_when_it_is_asked_for(sampler):
    first = sampler.sample(REQUESTS[:2], SAMPLING, ahead=REQUESTS[2:4])
    second = sampler.sample(REQUESTS[2:4], SAMPLING, ahead=REQUESTS[4:])
    third = sampler.sample(REQUESTS[4:], SAMPLING)
    assert answers(first + second + third) == [(str(n), (100 + n,), (-0.5,), 3) for n in range(6)]
    assert prompts(sampler) == [(n,) for n in range(6)]
    assert sampler._engine.aborted == []


def test_what_another_worker_was_asked_for_instead_is_aborted(sampler):
    sampler.sample(REQUESTS[:1], SAMPLING, ahead=REQUESTS[1:3])
    assert [r.prompt.id for r in sampler.sample(REQUESTS[3:5], SAMPLING)] == ["3", "4"]
    assert sampler._engine.aborted == [1, 2]
    assert (sampler._open, sampler._finished, sampler._ahead) == ({}, {}, {})


def test_a_call_comes_back_when_its_time_is_over_and_goes_on_where_it_was(sampler):
    assert sampler.sample(REQUESTS[:2], SAMPLING, seconds=0) == 2
    assert sampler.continue_sampling(seconds=0) == 2
    assert answers(sampler.continue_sampling()) == [("0", (100,), (-0.5,), 3), ("1", (101,), (-0.5,), 3)]
    assert prompts(sampler) == [(0,), (1,)]


def test_more_can_be_begun_ahead_while_a_call_goes_on_and_what_the_next_call_names_stays(sampler):
    assert sampler.sample(REQUESTS[:1], SAMPLING, ahead=REQUESTS[1:2], seconds=0) == 2
    assert sampler.continue_sampling(REQUESTS[2:5], seconds=0) == 5
    first = sampler.continue_sampling()
    second = sampler.sample(REQUESTS[1:2], SAMPLING, ahead=REQUESTS[2:4])
    third = sampler.sample(REQUESTS[2:4], SAMPLING)
    assert answers(first + second + third) == [(str(n), (100 + n,), (-0.5,), 3) for n in range(4)]
    assert prompts(sampler) == [(n,) for n in range(5)]
    assert sampler._engine.aborted == [4]


def test_a_chunk_that_was_left_unfinished_is_aborted_by_the_next(sampler):
    assert sampler.sample(REQUESTS[:2], SAMPLING, seconds=0) == 2
    assert [r.prompt.id for r in sampler.sample(REQUESTS[2:4], SAMPLING)] == ["2", "3"]
    assert sampler._engine.aborted == [0, 1]
    assert sampler._open == {}


def test_after_an_update_responses_go_on_with_the_new_policy_where_the_old_one_stopped(sampler):
    assert sampler.sample(REQUESTS[:2], SAMPLING, ahead=REQUESTS[2:3], seconds=0) == 3
    load(sampler, 4)
    rollouts = sampler.continue_sampling()

    # The first token and its log-probability are the old policy's, and so is the version.
    assert answers(rollouts) == [("0", (90, 100), (-0.25, -0.5), 3), ("1", (91, 101), (-0.25, -0.5), 3)]
    resumed = sampler._engine.submitted[3:]
    assert [(prompt, left) for prompt, _, left in resumed] == [((0, 90), 7), ((1, 91), 7), ((2, 92), 7)]
    # Not the seed of the first tokens, whose numbers would be drawn twice.
    assert {seed for _, seed, _ in resumed}.isdisjoint({request.seed for request in REQUESTS})
    assert answers(sampler.sample(REQUESTS[2:3], SAMPLING)) == [("2", (92, 102), (-0.25, -0.5), 3)]


def test_a_response_of_two_updates_keeps_the_tokens_of_all_its_policies(sampler):
    assert sampler.sample(REQUESTS[:1], SAMPLING, seconds=0) == 1
    load(sampler, 4)
    assert sampler.continue_sampling(seconds=0) == 1
    load(sampler, 5)
    assert answers(sampler.continue_sampling()) == [("0", (90, 90, 100), (-0.25, -0.25, -0.5), 3)]
    assert [(prompt, left) for prompt, _, left in sampler._engine.submitted] == [
        ((0,), 8),
        ((0, 90), 7),
        ((0, 90, 90), 6),
    ]


def test_a_request_without_a_token_is_the_new_policys_with_the_seed_it_had(sampler, monkeypatch):
    assert sampler.sample(REQUESTS[:1], SAMPLING, seconds=0) == 1
    nothing = SimpleNamespace(token_ids=(), logprobs=())
    monkeypatch.setattr(sampler._engine, "interrupt", lambda: {sampler._engine.waiting.popitem()[0]: nothing})
    load(sampler, 4)
    assert answers(sampler.continue_sampling()) == [("0", (100,), (-0.5,), 4)]
    assert sampler._engine.submitted == [((0,), REQUESTS[0].seed, 8)] * 2


# What was begun ahead is there twice: one response that had ended before the weights came, and one that had not.
@pytest.mark.parametrize(
    ("resample", "expected", "submitted"),
    [
        (False, [("1", (101,), (-0.5,), 3), ("2", (92, 102), (-0.25, -0.5), 3)], [(2, 92)]),
        (True, [("1", (103,), (-0.5,), 4), ("2", (104,), (-0.5,), 4)], [(1,), (2,)]),
    ],
)
def test_after_an_update_what_was_begun_ahead_goes_on_or_begins_anew(sampler, resample, expected, submitted):
    sampler.sample(REQUESTS[:1], SAMPLING, ahead=REQUESTS[1:3])
    sampler._finished |= sampler._engine.step()
    assert sampler._finished.keys() == {1}
    load(sampler, 4)
    rollouts = sampler.sample(REQUESTS[1:3], SAMPLING, resample_unfinished=resample)
    assert answers(rollouts) == expected
    assert prompts(sampler) == [(0,), (1,), (2,), *submitted]


def test_a_stream_that_nobody_reads_any_more_is_forgotten(sampler):
    assert sampler.advance({7: (REQUESTS[0], SAMPLING), 8: (REQUESTS[1], SAMPLING)}, seconds=0) == {}
    assert [r.prompt.id for r in sampler.sample(REQUESTS[2:3], SAMPLING)] == ["2"]
    load(sampler, 4)
    assert (sampler._open, sampler._stream_numbers) == ({}, {})


def test_without_an_accepted_policy_nothing_is_sampled(sampler):
    sampler.interrupt()
    calls = (
        lambda: sampler.sample(REQUESTS[:1], SAMPLING),
        lambda: sampler.continue_sampling(REQUESTS[1:2]),
        lambda: sampler.advance({7: (REQUESTS[0], SAMPLING)}, seconds=0),
    )
    for call in calls:
        with pytest.raises(StaleEngineError, match="rollout worker 0 was asked to sample before it passed"):
            call()
    assert sampler._engine.submitted == []
