"""Packed groups against every prompt + response run alone."""

import copy

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaConfig,
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from pipeline.errors import CheckpointError
from pipeline.models import packing
from pipeline.models.packing import in_packed_order, pack, packed_states, use_packed_attention
from pipeline.records import PromptGroup

GROUPS = [
    PromptGroup(prompt_ids=(5, 6, 7), response_ids=((8, 9), (10, 11, 12, 13))),
    PromptGroup(prompt_ids=(3, 4), response_ids=((1, 2, 3, 4),)),
    PromptGroup(prompt_ids=(9, 4, 4, 4, 4), response_ids=((1,), (7, 7), (2, 2, 2))),
]
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DECODERS = {
    "llama": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3Model(Qwen3Config(**SIZES, head_dim=8)),
    "mistral, window 3": lambda: MistralModel(MistralConfig(**SIZES, sliding_window=3)),
    "gemma": lambda: GemmaModel(GemmaConfig(**SIZES, head_dim=8)),
    "gemma3, window 3 and whole": lambda: Gemma3TextModel(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"])
    ),
}


def decoder(name):
    torch.manual_seed(0)
    return DECODERS[name]().eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_mask_that_a_gpu_is_given_takes_what_autocast_leaves_in_float32(name, monkeypatch):
    """Norms and rotary angles make float32 queries and keys, beside values in bfloat16; that mask wants one dtype."""
    model = decoder(name)
    use_packed_attention(model)
    packed = pack(GROUPS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        elsewhere = packed_states(model, packed)
        monkeypatch.setattr(packing, "_lower_right", lambda q, k, on_gpu: causal_lower_right(q, k))
        on_gpu = packed_states(model, packed)
    assert torch.allclose(on_gpu, elsewhere, atol=0.05)
    with torch.no_grad():
        assert torch.allclose(on_gpu.float(), packed_states(model, packed), atol=0.1)


def test_tokens_lie_end_to_end_and_responses_go_on_where_their_prompt_ended():
    packed = pack(GROUPS[:2])
    assert packed.lengths == ((3, 2, 4), (2, 4))
    assert packed.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 3, 4, 1, 2, 3, 4]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]


def test_responses_are_numbered_the_first_of_every_group_then_the_second():
    packed = pack(GROUPS)
    assert packed.response_lengths.tolist() == [2, 4, 1, 4, 2, 3]
    assert packed.token_ids[packed.response_ends].tolist() == [9, 4, 1, 13, 7, 2]
    assert packed.token_ids[packed.prompt_ends].tolist() == [7, 4, 4, 7, 4, 4]
    assert in_packed_order([["a", "d"], ["b"], ["c", "e", "f"]]) == ["a", "b", "c", "d", "e", "f"]


def test_the_first_token_of_a_response_is_predicted_from_its_prompt_and_the_others_from_the_one_before():
    packed = pack([GROUPS[0]])
    assert packed.response_tokens.tolist() == [3, 4, 5, 6, 7, 8]
    assert packed.predictors.tolist() == [2, 3, 2, 5, 6, 7]


@pytest.mark.parametrize("name", DECODERS)
def test_packed_states_and_gradients_equal_those_of_every_sequence_alone(name):
    plain = decoder(name)
    packing = copy.deepcopy(plain)
    use_packed_attention(packing)
    packed = pack(GROUPS)
    states = packed_states(packing, packed)
    alone = [
        plain(input_ids=torch.tensor([[*group.prompt_ids, *response]]), use_cache=False).last_hidden_state[0]
        for group, response in in_packed_order([[(g, r) for r in g.response_ids] for g in GROUPS])
    ]
    torch.testing.assert_close(states[packed.response_ends], torch.stack([s[-1] for s in alone]), atol=1e-5, rtol=1e-5)
    predicting = torch.cat([s[-1 - n : -1] for s, n in zip(alone, packed.response_lengths, strict=True)])
    torch.testing.assert_close(states[packed.predictors], predicting, atol=1e-5, rtol=1e-5)

    # The largest gradient of this loss is near 1. Each difference is compared with the size of its tensor: an element
    # that is small because large terms cancel holds their rounding error, which says nothing about packing.
    directions = torch.randn(len(alone), SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    (directions * states[packed.response_ends]).mean().backward()
    (directions * torch.stack([s[-1] for s in alone])).mean().backward()
    for (parameter, ours), theirs in zip(packing.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm(), parameter


def test_a_group_does_not_see_the_groups_beside_it():
    model = decoder("qwen3")
    use_packed_attention(model)
    with torch.no_grad():
        alone = packed_states(model, pack(GROUPS[2:]))
        together = packed_states(model, pack(GROUPS))
    torch.testing.assert_close(together[-len(alone) :], alone, atol=1e-6, rtol=1e-6)


def test_a_model_that_hands_information_on_besides_attention_is_refused():
    torch.manual_seed(0)
    model = MambaModel(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(CheckpointError, match="mamba"):
        use_packed_attention(model.eval())


def test_capped_attention_scores_are_refused():
    config = Gemma2Config(**SIZES, head_dim=8)
    with pytest.raises(CheckpointError, match=r"capped at 50.0 \(Gemma 2\)"):
        use_packed_attention(Gemma2Model(config).eval())
