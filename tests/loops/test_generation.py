"""Answers to held-out prompts: what is scored, and what is kept of it."""

from dataclasses import replace

import pytest

from pipeline.config.benchmark import BenchmarkConfig
from pipeline.data.prompts import tokenise_prompts
from pipeline.loops.generation import answer_prompts
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.rewards import rewards_of

THOUGHT = "First I weigh it.\n</think>\n\nThe Elbe"


class Thinking(FakeRollouts):
    """A policy whose template opens a thought in the prompt."""

    def generate(self, prompts, sampling):
        return [replace(rollout, response_text=THOUGHT) for rollout in super().generate(prompts, sampling)]


@pytest.mark.parametrize(("keep", "output"), [(False, "The Elbe"), (True, THOUGHT)])
def test_an_answer_is_what_follows_the_thought(tokenizer, world, keep, output):
    named = [(p.id, p.messages) for p in world.heldout_prompts[:2]]
    prompts = tokenise_prompts(named, tokenizer, max_prompt_tokens=64)
    rollouts = Thinking(tokenizer)
    rollouts.loaded = [0]
    config = BenchmarkConfig(keep_thoughts=keep)
    answers = answer_prompts(rollouts, rewards_of(FakeScorer()), prompts, config, generator="policy", seed=0)
    assert [answer.output for answer in answers] == [output, output]
