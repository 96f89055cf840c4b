"""Requests are fixed before anyone knows how many workers there are."""

from dataclasses import replace

import pytest

from pipeline.errors import DataError
from pipeline.records import Prompt, SamplingParams
from pipeline.rollouts.requests import require_room, rollout_requests

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, samples_per_prompt=2, seed=5)
HAM, EGGS = (Prompt(id=name, messages=(), token_ids=(1, 2, 3)) for name in ("ham", "eggs"))


def seeds(prompts, sampling=SAMPLING):
    return [request.seed for request in rollout_requests(prompts, sampling)]


def test_requests_are_ordered_by_prompt_then_sample():
    requests = rollout_requests([HAM, EGGS], SAMPLING)

    assert [(r.prompt.id, r.sample_index) for r in requests] == [("ham", 0), ("ham", 1), ("eggs", 0), ("eggs", 1)]


def test_a_seed_depends_on_sampling_seed_prompt_and_sample_and_on_nothing_else():
    ham_0, ham_1, eggs_0, eggs_1 = seeds([HAM, EGGS])

    assert len({ham_0, ham_1, eggs_0, eggs_1}) == 4
    assert seeds([EGGS, HAM]) == [eggs_0, eggs_1, ham_0, ham_1]
    assert seeds([HAM], replace(SAMPLING, samples_per_prompt=1)) == [ham_0]
    assert not set(seeds([HAM, EGGS], replace(SAMPLING, seed=6))) & {ham_0, ham_1, eggs_0, eggs_1}


def test_a_seed_is_the_same_in_every_process():
    # blake2b-64 of "sample", 5, "ham", 0 joined by the unit separator, little-endian, without its two low bits
    assert seeds([HAM])[0] == 2263351984382181428


def test_a_prompt_that_occurs_twice_is_sampled_afresh():
    assert len(set(seeds([HAM, EGGS, HAM]))) == 6


def test_a_prompt_without_room_for_its_response_is_refused_by_name():
    require_room([HAM], SAMPLING, 11)
    with pytest.raises(DataError, match=r"'ham' has 3 tokens; with 8 response tokens it needs 11, .* hold 10"):
        require_room([HAM], SAMPLING, 10)
