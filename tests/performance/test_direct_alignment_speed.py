"""The contestants of the speed measurement compute the same numbers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models import critic
from pipeline.models.critic import ResponsePolicy
from pipeline.models.packing import pack
from tests.performance.direct_alignment_speed import OwnPrompts, PaddedRows, one_response_each, plain_token_logprobs
from tests.support.learners import direct_config, direct_data


@pytest.fixture
def packed(world, tokenizer):
    return pack(direct_data(world, tokenizer, direct_config()).examples.groups[:3])


def logprobs(policy, tiny_policy, packed):
    module = policy(AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32))
    with torch.no_grad():
        return module(packed, False)[0]


@pytest.mark.parametrize("policy", [OwnPrompts, PaddedRows])
def test_a_policy_without_shared_prompts_says_the_same(policy, tiny_policy, packed):
    ours = logprobs(ResponsePolicy, tiny_policy, packed)
    torch.testing.assert_close(logprobs(policy, tiny_policy, packed), ours, atol=1e-4, rtol=1e-5)


def test_the_plain_head_says_the_same(tiny_policy, packed, monkeypatch):
    ours = logprobs(ResponsePolicy, tiny_policy, packed)
    monkeypatch.setattr(critic, "token_logprobs", plain_token_logprobs)
    torch.testing.assert_close(logprobs(ResponsePolicy, tiny_policy, packed), ours, atol=1e-4, rtol=1e-5)


def test_the_chosen_responses_come_before_the_rejected_ones(world, tokenizer, packed):
    groups = direct_data(world, tokenizer, direct_config()).examples.groups[:3]
    alone = one_response_each(packed)
    assert [group.response_ids[0] for group in alone] == [g.response_ids[n] for n in range(2) for g in groups]
    assert [group.prompt_ids for group in alone] == 2 * [group.prompt_ids for group in groups]
