"""The simulated cluster by hand, and against a step that was measured on two cores."""

from dataclasses import replace

import numpy as np
import pytest

from tests.performance.cluster_simulation import Node, Step, chunk_seconds, simulate_rollout, simulate_step, with_losses

NODE = Node(
    engines=2,
    chunk=2,
    decode_step_s=1.0,
    sequence_step_s=0.1,
    score_s_per_token=0.01,
    learn_s_per_token=0.02,
    gather_s=0.5,
    publish_s=3.0,
    policy_bytes=4e9,
    state_bytes=0.0,
    rows_per_optimiser_step=4,
    ranks=2,
)


def test_a_chunk_lasts_as_long_as_its_longest_response():
    assert chunk_seconds(np.array([10, 4]), NODE) == pytest.approx(10 * 1.0 + 14 * 0.1)


def test_engines_without_a_chunk_are_idle():
    # Chunks of one response each: 11, 11, 11 and 44 s. The second engine has 22 s of work in 55.
    seconds, idle = simulate_rollout(np.array([10, 10, 10, 40]), NODE, nodes=1)
    assert seconds == pytest.approx(55.0)
    assert idle == pytest.approx(1 - 77 / 110)


def test_a_step_on_two_nodes_by_hand():
    lengths = np.full(8, 10)
    step = simulate_step(lengths, NODE, 2, driver_us_per_token=1e4, network="file", scaling="weak")
    assert step.score == pytest.approx(120 * 0.01 / 2)
    assert step.learn == pytest.approx(120 * 0.02 / 2 + 0.5)
    assert step.driver == pytest.approx(1.2)
    assert step.weights == pytest.approx(3.0 + 4e9 / 2e9)


def test_more_ranks_than_rows_do_not_learn_faster():
    lengths = np.full(8, 10)
    few, many = (
        simulate_step(lengths, NODE, n, driver_us_per_token=0, network="nccl", scaling="strong") for n in (2, 8)
    )
    assert many.learn == pytest.approx(few.learn)


def test_phases_measured_on_two_cores_add_up_to_the_measured_steps():
    """docs/LOG.md: rollout 1.07 s, update 2.17, weights with the gate 0.19; a step 3.43, and 2.40 with prefetch."""
    step = Step(rollout=1.07, waiting_for_longest=0, score=0, learn=2.17, gathered=0, driver=0, weights=0.19)
    assert step.synchronous == pytest.approx(3.43, rel=0.01)
    assert step.prefetched == pytest.approx(2.40, rel=0.05)


def test_lost_nodes_cost_the_steps_since_the_last_commit():
    seldom, often = (
        with_losses(60.0, replace(NODE), 4, hours=hours, checkpoint_every=5, seed=0) for hours in (1e6, 1.0)
    )
    assert seldom == pytest.approx(60.0)
    assert 62.0 < often < 70.0  # each hour 85 s of start and two steps of 60 in the mean
