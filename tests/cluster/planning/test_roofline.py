"""Seconds by hand."""

from dataclasses import replace

import pytest

from cluster.planning.accelerators import ACCELERATORS, accelerator_in, this_cpu
from cluster.planning.decoder_shape import checkpoint_shape
from cluster.planning.memory import TrainedDecoder, TrainingLoad
from cluster.planning.roofline import (
    Engines,
    Processor,
    Sequences,
    forward_flops,
    rollout_phase,
    update_flops,
    update_phase,
)
from pipeline.config.cluster import GPU_NAMES, RanksConfig

SHAPE = checkpoint_shape("Qwen/Qwen3-0.6B")
H100 = ACCELERATORS["h100"]
GPU = Processor(accelerator=H100, share=1.0)
BATCH = Sequences(count=8, prompt_tokens=100.0, response_tokens=300.0, longest_response=600.0)
LOAD = TrainingLoad(
    decoders=(TrainedDecoder(shape=SHAPE, has_language_head=True),),
    head_parameters=0,
    reference=None,
    dtype="bfloat16",
    recompute=False,
    micro_batch_tokens=3200.0,
    micro_batches=1,
)


def test_the_plan_has_numbers_for_every_accelerator_that_a_recipe_may_name():
    assert ACCELERATORS.keys() == {*GPU_NAMES}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("A100-SXM4-80GB", "a100"),
        ("T4", None),
    ],
)
def test_a_gpu_is_known_by_what_the_driver_or_ray_calls_it(words, name):
    assert accelerator_in(words) == name


def test_a_forward_pass_needs_two_flops_a_weight_and_half_of_the_attention():
    squares = 8 * 4 / 3 * 400**2
    by_hand = 2 * (440_401_920 * 3200 + 155_582_464 * 2400 + 28 * 2048 * squares)
    assert forward_flops(SHAPE, BATCH, head_tokens=2400) == pytest.approx(by_hand)


def test_training_is_three_forward_passes_and_recomputation_a_fourth_that_does_not_count():
    forward = forward_flops(SHAPE, BATCH, head_tokens=2400)
    decoder = LOAD.decoders[0]
    assert update_flops(decoder, BATCH, recompute=False) == pytest.approx((3 * forward, 3 * forward))
    assert update_flops(decoder, BATCH, recompute=True) == pytest.approx((3 * forward, 4 * forward))
    assert update_flops(replace(decoder, trainable_layers=7), BATCH, recompute=False)[0] == pytest.approx(1.5 * forward)


def test_an_update_adds_arithmetic_links_and_optimiser():
    ranks = RanksConfig(ranks=2, gpus_per_rank=1, zero_stage=3)
    phase = update_phase(LOAD, BATCH, ranks, GPU, optimiser_steps=1, spans_nodes=False)
    parameters = 596_049_920
    compute = 3 * forward_flops(SHAPE, BATCH, head_tokens=2400) / (2 * 0.45 * 989e12)
    links = (2 * 4 + 4) * parameters / 2 / (0.7 * 450e9)
    optimiser = 28 * parameters / 2 / (0.7 * 3.35e12)
    assert phase.seconds == pytest.approx(compute + links + optimiser)
    assert phase.mfu == pytest.approx(0.45 * compute / phase.seconds)


def test_ranks_that_share_rows_wait_for_each_other_in_every_pass_over_a_layer():
    apart, together, recomputed = (
        update_phase(
            load,
            BATCH,
            RanksConfig(ranks=4, gpus_per_rank=1, sequence_parallel=n),
            GPU,
            optimiser_steps=1,
            spans_nodes=True,
        ).seconds
        for load, n in ((LOAD, 1), (LOAD, 2), (replace(LOAD, recompute=True), 2))
    )
    exchange = 28 * 2 * (16 + 8) * 128 * 2 * (3200 / 4) / 2 / (0.7 * 450e9)
    assert together - apart == pytest.approx(2 * exchange)
    assert recomputed > together


def test_ranks_over_nodes_wait_for_the_network():
    ranks = RanksConfig(ranks=16, gpus_per_rank=1, zero_stage=3)
    inside, across = (
        update_phase(LOAD, BATCH, ranks, GPU, optimiser_steps=1, spans_nodes=spans) for spans in (False, True)
    )
    assert across.seconds - inside.seconds == pytest.approx(12 * 596_049_920 * 15 / 16 / 0.7 * (1 / 400e9 - 1 / 450e9))


def engines(**changed):
    whole = Engines(shape=SHAPE, dtype="bfloat16", workers=1, shards=1, processor=GPU, sequences=256, eager=False)
    return replace(whole, **changed)


def test_few_responses_wait_for_the_longest_and_many_do_not():
    assert rollout_phase(engines(), BATCH).binds == "memory bandwidth"
    lonely = replace(BATCH, longest_response=3000.0)
    assert rollout_phase(engines(), lonely).binds == "the longest response"
    steps = 3000 * 28 * 2e-5  # launches of its steps alone
    assert rollout_phase(engines(), lonely).seconds > steps


def test_twice_the_workers_take_half_the_time_of_many_responses():
    many = replace(BATCH, count=100_000)
    one, two = (rollout_phase(engines(workers=n), many).seconds for n in (1, 2))
    assert two == pytest.approx(one / 2, rel=0.01)


def test_this_machines_core_is_measured():
    core = this_cpu()
    assert 1e9 < core.flops_per_s["float32"] < 1e12
    assert core.memory_bytes is None
