"""Rollouts in one process: the learner's own distribution, and nobody's but the request's own luck."""

from dataclasses import replace

import pytest
import torch

from pipeline.data.prompts import tokenise_prompts
from pipeline.errors import ConfigError, DataError, StaleEngineError
from pipeline.models.backbone import load_causal_lm
from pipeline.models.packing import pack
from pipeline.records import SamplingParams
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.publishing import publish_checkpoint
from pipeline.rollouts.torch_rollouts import TorchRollouts
from tests.support.learners import reference_of

SAMPLING = SamplingParams(temperature=0.7, top_p=1.0, max_response_tokens=9, samples_per_prompt=2, seed=3)


@pytest.fixture(scope="module")
def prompts(world, tokenizer):
    named = [(p.id, p.messages) for p in world.train_prompts[:6]]
    return tokenise_prompts(named, tokenizer, max_prompt_tokens=32)


@pytest.fixture(scope="module")
def published(tiny_policy, prompts, tokenizer, tmp_path_factory):
    probes = choose_probes(prompts, vocabulary_size=len(tokenizer), seed=0)
    location = str(tmp_path_factory.mktemp("published"))
    return publish_checkpoint(tiny_policy, location, probes, dtype="float32", version=4)


@pytest.fixture
def rollouts(tiny_policy, published):
    source = TorchRollouts(tiny_policy, dtype="float32")
    assert source.load_weights(published)["gate/max"] < 1e-5
    return source


def test_the_logprobs_are_the_learners_for_prompts_of_every_length_at_the_sampling_temperature(
    rollouts, prompts, tiny_policy
):
    assert len({len(prompt.token_ids) for prompt in prompts}) > 1
    samples = rollouts.generate(prompts, SAMPLING)
    learner = reference_of(tiny_policy)(pack([s.tokens for s in samples]), 9, SAMPLING.temperature)
    for row, sample in zip(learner.tolist(), samples, strict=True):
        assert sample.logprobs == pytest.approx(row[: len(sample.response_ids)], abs=1e-4)


def test_a_response_is_the_same_alone_and_in_company(rollouts, prompts):
    together = rollouts.generate(prompts, SAMPLING)
    assert [(s.prompt.id, s.sample_index) for s in together] == [(p.id, i) for p in prompts for i in (0, 1)]
    alone = rollouts.generate(prompts[2:3], SAMPLING)
    assert [s.response_ids for s in alone] == [s.response_ids for s in together[4:6]]
    assert together[0].response_ids != together[1].response_ids
    other = rollouts.generate(prompts, replace(SAMPLING, seed=4))
    assert [s.response_ids for s in other] != [s.response_ids for s in together]


def test_a_response_ends_with_its_turn_or_at_the_limit(rollouts, prompts, tokenizer):
    samples = rollouts.generate(prompts, replace(SAMPLING, samples_per_prompt=32, temperature=1.0))
    reasons = {s.finish_reason for s in samples}
    assert reasons == {"stop", "length"}
    for sample in samples:
        ends = tokenizer.eos_token_id in sample.response_ids
        assert (sample.finish_reason == "stop") == ends
        assert tokenizer.eos_token_id not in sample.response_ids[:-1]
        assert ends or len(sample.response_ids) == 9
        assert sample.policy_version == 4


def test_tokens_come_as_often_as_the_policy_says(rollouts, prompts, tiny_policy):
    one = replace(SAMPLING, max_response_tokens=1, samples_per_prompt=4000, temperature=1.0)
    drawn = torch.tensor([s.response_ids[0] for s in rollouts.generate(prompts[:1], one)])
    model, tokenizer = load_causal_lm(tiny_policy, dtype="float32")
    with torch.no_grad():
        expected = model(torch.tensor([prompts[0].token_ids])).logits[0, -1].softmax(-1)
    counts = torch.bincount(drawn, minlength=len(tokenizer)) / len(drawn)
    # five standard deviations of a binomial share
    assert ((counts - expected).abs() <= 5 * (expected * (1 - expected) / len(drawn)).sqrt()).all()


def test_greedy_tokens_are_the_most_likely_ones_whatever_the_seed(rollouts, prompts, tiny_policy):
    greedy = replace(SAMPLING, temperature=0.0, samples_per_prompt=1)
    samples = rollouts.generate(prompts, greedy)
    assert [s.response_ids for s in rollouts.generate(prompts, replace(greedy, seed=4))] == [
        s.response_ids for s in samples
    ]
    model, _ = load_causal_lm(tiny_policy, dtype="float32")
    for sample in samples:
        tokens = torch.tensor([[*sample.prompt.token_ids, *sample.response_ids]])
        with torch.no_grad():
            distribution = model(tokens).logits[0, len(sample.prompt.token_ids) - 1 : -1].log_softmax(-1)
        assert distribution.argmax(-1).tolist() == list(sample.response_ids)
        assert sample.logprobs == pytest.approx(distribution.max(-1).values.tolist(), abs=1e-4)


def test_what_was_begun_is_collected(rollouts, prompts):
    rollouts.begin(prompts, SAMPLING, resample_unfinished=False)
    assert rollouts.collect() == rollouts.generate(prompts, SAMPLING)


def test_nothing_is_sampled_from_a_policy_that_did_not_pass_the_gate(tiny_policy, published, prompts):
    source = TorchRollouts(tiny_policy, dtype="float32")
    with pytest.raises(StaleEngineError, match="before it passed the numerics gate"):
        source.generate(prompts, SAMPLING)
    wrong = replace(published.probes[0], logprobs=tuple(x - 1.0 for x in published.probes[0].logprobs))
    with pytest.raises(StaleEngineError, match="the in-process sampler does not reproduce the learner"):
        source.load_weights(replace(published, probes=(wrong,)))
    with pytest.raises(StaleEngineError, match="before it passed"):
        source.generate(prompts, SAMPLING)


def test_what_it_cannot_do_is_refused(rollouts, prompts):
    with pytest.raises(ConfigError, match="draws from the whole distribution"):
        rollouts.generate(prompts, replace(SAMPLING, top_p=0.9))
    with pytest.raises(DataError, match="Shorten or drop it"):
        rollouts.generate(prompts, replace(SAMPLING, max_response_tokens=500))
