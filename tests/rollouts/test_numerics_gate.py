"""The numerics gate as a pure function."""

import math

import pytest

from pipeline.errors import StaleEngineError
from pipeline.records import ProbeSequence, Prompt
from pipeline.rollouts.numerics_gate import check_engine, choose_probes

PROBES = (
    ProbeSequence(prompt_ids=(1, 2), response_ids=(3, 4), logprobs=(-1.0, -2.0)),
    ProbeSequence(prompt_ids=(1,), response_ids=(5,), logprobs=(-3.0,)),
)


def check(engine_logprobs, *, tolerance=0.1, groups=None, probes=PROBES):
    return check_engine(
        probes,
        engine_logprobs,
        tolerance=tolerance,
        engine="rollout worker 3",
        version=7,
        differing_groups=lambda: groups or {},
    )


def test_gaps_are_the_mean_and_the_largest_absolute_difference_over_all_tokens():
    metrics = check([[-1.0, -2.125], [-2.875]])

    # |0|, |0.125|, |0.125|: mean 0.25 / 3
    assert metrics == {"gate/mean": pytest.approx(0.25 / 3), "gate/max": 0.125}


def test_a_gap_past_the_tolerance_is_refused_with_worker_version_gap_and_tolerance():
    with pytest.raises(
        StaleEngineError, match=r"rollout worker 3 .* version 7: mean difference 0.2, largest 0.6, t.* 0.1"
    ):
        check([[-1.0, -2.0], [-3.6]])


def test_the_group_that_differs_most_is_named():
    with pytest.raises(StaleEngineError, match=r"'model.layers.1.mlp' differs most .*by 25.00%.*2 group"):
        check([[-1.0, -2.0], [-3.6]], groups={"lm_head.weight": 0.01, "model.layers.1.mlp": 0.25})


def test_equal_parameters_point_to_a_derived_copy():
    with pytest.raises(StaleEngineError, match="a copy derived from them is stale"):
        check([[-1.0, -2.0], [-3.6]])


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_a_gap_that_is_no_number_is_refused_whatever_the_tolerance(broken):
    with pytest.raises(StaleEngineError):
        check([[-1.0, broken], [-3.0]], tolerance=1e9)


def test_groups_are_not_compared_while_the_gate_is_passed():
    def fail():
        raise AssertionError("asked for groups without need")

    check_engine(PROBES, [[-1.0, -2.0], [-3.0]], tolerance=0.1, engine="", version=0, differing_groups=fail)


def test_weights_published_without_probes_are_refused():
    with pytest.raises(StaleEngineError, match="without probes"):
        check([], probes=())


def test_probes_split_real_prompts_and_end_in_random_tokens_of_the_vocabulary():
    prompts = [Prompt(id=str(n), messages=(), token_ids=tuple(range(n, n + 6))) for n in range(20)]

    probes = choose_probes(prompts, vocabulary_size=50, seed=1)

    assert len(probes) == 8
    assert [probe.prompt_ids for probe in probes[:2]] == [(0, 1, 2), (1, 2, 3)]
    assert [probe.response_ids[0][:3] for probe in probes[:2]] == [(3, 4, 5), (4, 5, 6)]
    noise = [probe.response_ids[0][3:] for probe in probes]
    assert len(set(noise)) == 8
    assert all(len(n) == 8 and set(n) <= set(range(50)) for n in noise)
    assert probes == choose_probes(prompts, vocabulary_size=50, seed=1)


def test_a_probe_takes_the_beginning_of_a_long_prompt():
    [probe] = choose_probes([Prompt(id="0", messages=(), token_ids=tuple(range(1000)))], vocabulary_size=50, seed=1)
    assert probe.prompt_ids == tuple(range(32))
    assert probe.response_ids[0][:-8] == tuple(range(32, 64))
