import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models.backbone_requirements import require_causal, require_plain_head
from pipeline.models.critic import PolicyWithCritic, TokenStatistics
from pipeline.models.packing import pack
from pipeline.records import PromptGroup
from tests.models.test_packing import DECODERS, decoder


def test_token_statistics_equal_a_plain_forward(tiny_policy):
    lm = AutoModelForCausalLM.from_pretrained(tiny_policy)
    model = PolicyWithCritic(lm, None).eval()
    torch.nn.init.normal_(model.value_head.weight)
    prompts, responses = [(5, 6, 7), (8, 9)], [(10, 11), (12, 13, 14)]
    rows = [PromptGroup(prompt_ids=p, response_ids=(r,)) for p, r in zip(prompts, responses, strict=True)]
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():
        got = TokenStatistics(*model(pack(rows), 4, 0.5))
        for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            out = plain(torch.tensor([prompt + response]), output_hidden_states=True)
            log_pi = torch.log_softmax(out.logits[0] / 0.5, -1)
            places = [len(prompt) - 1 + t for t in range(len(response))]
            expected = torch.stack([log_pi[p, token] for p, token in zip(places, response, strict=True)])
            torch.testing.assert_close(got.logprobs[b, : len(response)], expected, atol=1e-5, rtol=1e-5)
            values = model.value_head(out.hidden_states[-1][0, places]).squeeze(-1)
            torch.testing.assert_close(got.values[b, : len(response)], values, atol=1e-5, rtol=1e-5)
            assert got.logprobs[b, len(response) :].abs().sum() == 0


def test_a_fresh_critic_predicts_nothing(tiny_policy):
    lm = AutoModelForCausalLM.from_pretrained(tiny_policy)
    output = PolicyWithCritic(lm, None)(pack([PromptGroup(prompt_ids=(1, 1), response_ids=((1, 1),))]), 2, 1.0)
    assert TokenStatistics(*output).values.abs().sum() == 0


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_of_decoders_serves_as_policy(family):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(decoder(family).config).eval()
    require_causal(lm.base_model, family)
    require_plain_head(lm, family)
    with torch.no_grad():
        logits = lm(torch.tensor([[5, 6, 7, 10, 11]])).logits[0]
    expected = torch.log_softmax(logits / 0.5, -1)[[2, 3], [10, 11]]
    packed = pack([PromptGroup(prompt_ids=(5, 6, 7), response_ids=((10, 11),))])
    with torch.no_grad():
        got = TokenStatistics(*PolicyWithCritic(lm, None)(packed, 2, 0.5))
    torch.testing.assert_close(got.logprobs[0], expected, atol=1e-5, rtol=1e-5)
