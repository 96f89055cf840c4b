"""What the learner's benchmark says beside a time: FLOPs, floors, and that both of its contestants do the same."""

from argparse import Namespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config

from pipeline.models import critic
from pipeline.objectives.logprobs import token_logprobs_and_entropy
from pipeline.records import PromptGroup
from tests.performance.learner_speed import (
    PLAIN,
    SHAPES,
    create_learner,
    measure,
    plain_logprobs_and_entropy,
    random_experience,
    update_flops,
)

OPTIONS = Namespace(
    device="cpu",
    dtype="float32",
    responses=4,
    prompt_tokens=16,
    response_tokens=32,
    micro_batch_tokens=64,
    rounds=1,
)
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def product_flops(x, weight, *_, **__):
    return 2 * x[0] * x[1] * weight[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_flops_of_an_update_are_those_that_a_counter_sees_without_what_is_computed_again(recompute):
    config = Qwen3Config(**SHAPE, tie_word_embeddings=True)
    learner = create_learner(config, OPTIONS, recompute=recompute)
    experience = random_experience(learner, OPTIONS)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: product_flops})
    with counter, sdpa_kernel(SDPBackend.MATH):  # as products, which the counter knows
        learner.update(experience, 0)

    lengths = [sequence.num_tokens for sequence in experience.sequences]
    # 2 layers of 4 heads of 32: these products are of whole squares, of which causal attention needs half.
    squares = 2 * 4 * 32 * sum(length**2 for length in lengths)
    beside = 6 * squares + 6 * 64 * experience.num_response_tokens  # the value head
    if recompute:  # both layers forward
        beside += 2 * 2 * 64 * (2 * 128 + 2 * 64 + 3 * 160) * sum(lengths) + 4 * squares
    assert counter.get_total_flops() == update_flops(config, experience.sequences) + beside


def test_the_flops_of_qwen3_are_those_of_its_weights():
    one_token = [PromptGroup(prompt_ids=(), response_ids=((1,),))]
    # 440,401,920 in the layers ("0.44B non-embedding"), 1,024 * 151,936 in the head, 28 layers of 16 heads of 128.
    assert update_flops(Qwen3Config(**SHAPES["0.6b"]), one_token) == 6 * (440_401_920 + 155_582_464 + 57_344)
    # 36 * 100,925,440 ("3.6B"), 2,560 * 151,936, 36 layers of 32 heads of 128.
    assert update_flops(Qwen3Config(**SHAPES["4b"]), one_token) == 6 * (3_633_315_840 + 388_956_160 + 147_456)


def test_plain_logits_give_what_chunked_ones_give():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    states, tokens = torch.randn(7, 8, requires_grad=True), torch.randint(50, (7,))
    results = []
    for logprobs_and_entropy in (token_logprobs_and_entropy, plain_logprobs_and_entropy):
        logprobs, entropy = logprobs_and_entropy(states, head, tokens, temperature=0.7, most_positions=7)
        gradients = torch.autograd.grad((logprobs * torch.arange(7)).sum(), [states, head.weight])
        results.append((logprobs, entropy, *gradients))
    chunked, plain = results
    torch.testing.assert_close(plain, chunked)
    assert not plain[1].requires_grad


def test_the_plain_contestant_is_measured_without_the_chunked_function(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    monkeypatch.setattr(critic, "token_logprobs_and_entropy", None)  # restored at the end; a call would fail
    row = measure("tiny", PLAIN, OPTIONS, recompute=False, peak=0.5)
    assert row["mfu"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    assert row["mfu"] == pytest.approx(row["tflops_per_s"] / 0.5)
    # Layers of 24,576 in attention, 30,720 and 192 in norms; embeddings, the last norm, the value head.
    assert row["floor_gib"] * 2**30 == 16 * (2 * (24_576 + 30_720 + 192) + 512 * 64 + 64 + 65)
