import torch
from transformers import AutoModelForCausalLM

from pipeline.models.critic import PolicyWithCritic, TokenStatistics


def test_token_statistics_equal_a_plain_forward(tiny_policy):
    lm = AutoModelForCausalLM.from_pretrained(tiny_policy)
    model = PolicyWithCritic(lm, None).eval()
    torch.nn.init.normal_(model.value_head.weight)
    prompts, responses = [(5, 6, 7), (8, 9)], [(10, 11), (12, 13, 14)]
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        got = TokenStatistics(*model(torch.tensor(rows), torch.tensor([3, 2]), torch.tensor([2, 3]), 4, 0.5))
        for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            out = lm(torch.tensor([prompt + response]), output_hidden_states=True)
            log_pi = torch.log_softmax(out.logits[0] / 0.5, -1)
            places = [len(prompt) - 1 + t for t in range(len(response))]
            expected = torch.stack([log_pi[p, token] for p, token in zip(places, response, strict=True)])
            torch.testing.assert_close(got.logprobs[b, : len(response)], expected, atol=1e-5, rtol=1e-5)
            values = model.value_head(out.hidden_states[-1][0, places]).squeeze(-1)
            torch.testing.assert_close(got.values[b, : len(response)], values, atol=1e-5, rtol=1e-5)
            assert got.logprobs[b, len(response) :].abs().sum() == 0


def test_a_fresh_critic_predicts_nothing(tiny_policy):
    lm = AutoModelForCausalLM.from_pretrained(tiny_policy)
    output = PolicyWithCritic(lm, None)(
        torch.ones(1, 4, dtype=torch.int64), torch.tensor([2]), torch.tensor([2]), 2, 1.0
    )
    assert TokenStatistics(*output).values.abs().sum() == 0
