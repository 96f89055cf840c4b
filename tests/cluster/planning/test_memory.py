"""The plan's memory of a training process, against what the tensors of real optimiser steps take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from cluster.planning.decoder_shape import checkpoint_shape, shape_from_config
from cluster.planning.memory import (
    LIVE_PARAMETERS,
    TrainedDecoder,
    TrainingLoad,
    exchange_width,
    loading_bytes,
    training_memory,
)
from cluster.planning.training_loads import sft_load, shapes_of
from pipeline.config.cluster import RanksConfig
from pipeline.config.load import load_recipe
from pipeline.config.models import LoRAConfig, OptimiserConfig
from pipeline.learning.engine import TorchEngine
from pipeline.learning.parameter_groups import parameter_groups
from pipeline.models.critic import Policy
from pipeline.models.lora import add_lora
from pipeline.models.onednn_linear import with_onednn
from pipeline.models.packing import pack
from pipeline.records import PromptGroup
from tests.support.allocations import peak_tensor_bytes

ROW_TOKENS = 128
TINY = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 173}
TEN_MILLION = {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 14_000}
MIXTURE = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2}


def config_of(size, family=Qwen3Config, *, tied=False):
    hidden = size["hidden_size"]
    return family(
        **size,
        intermediate_size=3 * hidden,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        tie_word_embeddings=tied,
    )


def train(config, *, dtype, recompute, tokens, micro_batches, lora=None):
    """Two optimiser steps, as `SFTTrainer` takes them."""
    model = with_onednn(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    add_lora(model, lora, seed=0)
    if recompute:
        model.gradient_checkpointing_enable()
    optimiser = OptimiserConfig(learning_rate=1e-4)
    engine = TorchEngine(
        Policy(model),
        parameter_groups(model, None, optimiser, head_learning_rate=1e-4),
        betas=optimiser.betas,
        max_grad_norm=1.0,
        dtype=dtype,
    )
    engine.module.train()
    row = PromptGroup(prompt_ids=(1,) * 8, response_ids=(tuple(range(1, ROW_TOKENS - 7)),))
    # The first step makes the optimiser's moments, and is small: the second one has the peak.
    for rows in ([1], [tokens // ROW_TOKENS] * micro_batches):
        for n, count in enumerate(rows):
            loss = -engine.forward(pack([row] * count), ROW_TOKENS, 1.0).mean()
            engine.backward(loss, last=n == len(rows) - 1)
            del loss
        engine.step(1.0)


def load_of(config, *, dtype, recompute, tokens, micro_batches, lora=None):
    shape = shape_from_config(config.to_dict(), source="a test")
    decoder = TrainedDecoder(
        shape=shape,
        has_language_head=True,
        adapter_parameters=shape.lora_parameters(lora) if lora else 0,
    )
    return TrainingLoad(
        decoders=(decoder,),
        head_parameters=0,
        reference=None,
        dtype=dtype,
        recompute=recompute,
        micro_batch_tokens=tokens,
        micro_batches=micro_batches,
    )


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (config_of(TINY), {"micro_batches": 1}),
        (config_of(TINY), {"micro_batches": 2}),
        (config_of(TEN_MILLION), {"micro_batches": 2}),
        (config_of(TEN_MILLION), {"micro_batches": 2, "recompute": True}),
        (config_of(TEN_MILLION), {"micro_batches": 2, "dtype": "bfloat16"}),
        (config_of(TEN_MILLION), {"micro_batches": 2, "lora": LoRAConfig(rank=16, alpha=32)}),
        (config_of(TEN_MILLION, LlamaConfig, tied=True), {"micro_batches": 2}),
        (config_of({"hidden_size": 512, "num_hidden_layers": 1, "vocab_size": 20_000}), {"tokens": 128}),
        (config_of(TEN_MILLION | MIXTURE, Qwen3MoeConfig), {"micro_batches": 2}),
        (config_of(TEN_MILLION | MIXTURE, Qwen3MoeConfig), {"micro_batches": 2, "dtype": "bfloat16"}),
    ],
    ids=["tiny", "tiny twice", "10M", "recomputed", "bfloat16", "LoRA", "Llama", "wide", "mixture", "mixture bfloat16"],
)
def test_memory_of_a_training_step_is_predicted_within_15_percent(config, settings):
    settings = {"dtype": "float32", "recompute": False, "tokens": 384, "micro_batches": 1} | settings
    measured = peak_tensor_bytes(lambda: train(config, **settings))
    device, _ = training_memory(load_of(config, **settings), None)
    assert sum(device.values()) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("more", [{"recompute": True}, {"lora": LoRAConfig(rank=16, alpha=32)}], ids=["again", "LoRA"])
def test_weights_are_kept_in_bfloat16_where_the_backward_pass_needs_them_and_nowhere_else(more):
    config = config_of({"hidden_size": 256, "num_hidden_layers": 24, "vocab_size": 2000})
    settings = {"dtype": "bfloat16", "recompute": False, "tokens": 128, "micro_batches": 2} | more
    measured = peak_tensor_bytes(lambda: train(config, **settings))
    device, _ = training_memory(load_of(config, **settings), None)
    assert sum(device.values()) == pytest.approx(measured, rel=0.05)


LOAD = TrainingLoad(
    decoders=(TrainedDecoder(shape=checkpoint_shape("Qwen/Qwen3-0.6B"), has_language_head=True),),
    head_parameters=0,
    reference=checkpoint_shape("Qwen/Qwen3-0.6B"),
    dtype="bfloat16",
    recompute=True,
    micro_batch_tokens=4096,
    micro_batches=4,
)
PARAMETERS = 596_049_920


@pytest.mark.parametrize(
    ("zero_stage", "weights", "gradients", "optimiser", "reference"),
    [(1, 4, 4, 12 / 4, 2), (2, 4, 4 / 4, 12 / 4, 2), (3, 4 / 4, 4 / 4, 12 / 4, 2 / 4)],
)
def test_zero_shards_one_thing_more_at_every_stage(zero_stage, weights, gradients, optimiser, reference):
    device, host = training_memory(LOAD, RanksConfig(ranks=4, zero_stage=zero_stage))
    shared = {name: device[name] / PARAMETERS for name in ("parameters", "gradients", "optimiser", "reference")}
    expected = {"parameters": weights, "gradients": gradients, "optimiser": optimiser, "reference": reference}
    assert shared == pytest.approx(expected)
    assert host == {}


def test_ranks_that_share_rows_divide_the_tokens_of_a_row_longer_than_the_budget():
    recipe = load_recipe("tiny", ["sft.max_length=1000", "sft.batch_size=8", "sft.max_tokens_per_micro_batch=400"])
    found = {}
    for ranks, n in ((4, 1), (4, 2), (4, 4), (8, 2)):
        layout = RanksConfig(ranks=ranks, sequence_parallel=n)
        changed = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"sft": layout})})
        load = sft_load(changed, shapes_of(changed))
        found[ranks, n] = load.micro_batch_tokens, load.micro_batches
    # Two rows a group of one rank, four or two a group of two, eight a group of four, which has 1,600 tokens together.
    assert found == {(4, 1): (1000, 2), (4, 2): (500, 4), (4, 4): (400, 5), (8, 2): (500, 2)}


def test_ranks_that_share_rows_exchange_heads_and_shard_as_others_do():
    apart, together = (training_memory(LOAD, RanksConfig(ranks=4, sequence_parallel=n))[0] for n in (1, 2))
    exchanged = together["communication"] - apart["communication"]
    assert exchanged == 2 * 2 * 4096 * 2 * (16 + 8) * 128  # sent and received, bfloat16, 16 query and 8 key-value heads
    assert together | {"communication": 0} == apart | {"communication": 0}
    # Sixteen ranks need each key-value head twice.
    assert exchange_width(LOAD.decoders[0].shape, 16) == 2 * (16 + 16) * 128


def test_zero_3_holds_as_many_gathered_parameters_as_deepspeed_allows():
    assert DeepSpeedZeroConfig(stage=3).max_live_parameters == LIVE_PARAMETERS
    ranks = RanksConfig(ranks=4, zero_stage=3)
    small, _ = training_memory(LOAD, ranks)  # the whole model, and a bucket of gradients
    assert small["communication"] == pytest.approx(4 * PARAMETERS + 4 * 5e8)
    decoder = TrainedDecoder(shape=checkpoint_shape("Qwen/Qwen3-8B"), has_language_head=True)
    large, _ = training_memory(replace(LOAD, decoders=(decoder,)), ranks)
    assert large["communication"] == pytest.approx(4 * 1e9 + 4 * 5e8)


def test_an_optimiser_on_the_host_takes_the_gradients_with_it():
    device, host = training_memory(LOAD, RanksConfig(ranks=4, zero_stage=3, offload_optimiser=True))
    assert not {"optimiser", "gradients"} & device.keys()
    assert host == pytest.approx({"optimiser": 3 * PARAMETERS, "gradients": PARAMETERS})


@pytest.mark.parametrize(
    ("zero_stage", "expected"),
    [
        (2, (4 + 2) * PARAMETERS),  # policy and reference, whole
        (3, (4 + 2) * PARAMETERS / 4 + 4 * 151_936 * 1024),  # a quarter of both, and the embedding
    ],
)
def test_a_rank_loads_whole_models_or_its_part_and_one_parameter(zero_stage, expected):
    assert loading_bytes(LOAD, RanksConfig(ranks=4, zero_stage=zero_stage)) == pytest.approx(expected)
