"""What a shard of an engine holds of a published policy: what vLLM's own loader puts there. No engine is started."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch

pytestmark = pytest.mark.components

HIDDEN, HEAD, HEADS, WIDTH, TOKENS = 16, 8, 4, 24, 150


@contextmanager
def as_shard(rank, shards):
    """Within it, vLLM's layers are those of one of several processes."""
    from vllm.config import VllmConfig, set_current_vllm_config

    rooms = (
        "model_executor.layers.linear",
        "model_executor.layers.vocab_parallel_embedding",
        "model_executor.parameter",
    )
    with ExitStack() as stack:
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        for room in rooms:
            for name, value in (("rank", rank), ("world_size", shards)):
                target = f"vllm.model_executor.{room}.get_tensor_model_parallel_{name}"
                stack.enter_context(mock.patch(target, return_value=value))
        yield


def layers(kv_heads):
    """Layer, and the names and shapes of what is published for its weight."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    rows = HEADS * HEAD
    qkv = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, kv_heads, bias=False)
    yield qkv, {"q": (rows, HIDDEN), "k": (kv_heads * HEAD, HIDDEN), "v": (kv_heads * HEAD, HIDDEN)}
    yield (
        linear.MergedColumnParallelLinear(HIDDEN, [WIDTH, WIDTH], bias=False),
        {0: (WIDTH, HIDDEN), 1: (WIDTH, HIDDEN)},
    )
    yield linear.ColumnParallelLinear(HIDDEN, WIDTH, bias=False), {None: (WIDTH, HIDDEN)}
    yield linear.RowParallelLinear(WIDTH, HIDDEN, bias=False), {None: (HIDDEN, WIDTH)}
    yield linear.ReplicatedLinear(HIDDEN, WIDTH, bias=False), {None: (WIDTH, HIDDEN)}
    yield VocabParallelEmbedding(TOKENS, HIDDEN), {None: (TOKENS, HIDDEN)}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_shard_holds_what_vllms_loader_puts_there(shards, kv_heads):
    from actors.engine_weights import _held, _joined

    for rank in range(shards):
        with as_shard(rank, shards):
            for layer, shapes in layers(kv_heads):
                parts = {str(part): torch.rand(shape) for part, shape in shapes.items()}
                for part in shapes:
                    arguments = () if part is None else (part,)
                    layer.weight.weight_loader(layer.weight, parts[str(part)], *arguments)
                held = _joined(_held(layer, [*parts], parts))
                assert torch.equal(layer.weight[: len(held)], held), type(layer).__name__


def test_what_is_published_as_fused_as_vllm_has_it_is_left_out():
    from actors.engine_weights import _held

    with as_shard(1, 2):
        qkv, _ = next(layers(2))
        assert _held(qkv, ["qkv"], {"qkv": torch.rand(8 * HEAD, HIDDEN)}) is None
        assert _held(qkv, ["q", "k", "v"], {}) is None
