"""Two DeepSpeed ranks that share every row, over gloo: the gradients of one process, under every stage of ZeRO."""

from functools import partial

import pytest

from actors.rank_group import RankGroup
from pipeline.config.cluster import RanksConfig
from pipeline.config.models import LoRAConfig
from pipeline.errors import ConfigError
from pipeline.learning.builders import reference_in_process
from pipeline.learning.engine import TorchEngine
from tests.support.one_step import first_moments, four_headed_policy, largest_gap, step_of, take

pytestmark = pytest.mark.components


class Nothing:
    """The learner of ranks that only join a process group: learners come later, one after the other."""

    def __init__(self, device):
        pass


@pytest.fixture(scope="module")
def group(local_ray):
    with RankGroup("sequence group", RanksConfig(ranks=2, cpus_per_rank=1), start_s=300) as ranks:
        ranks.build(Nothing)
        yield ranks


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return four_headed_policy(tokenizer, str(tmp_path_factory.mktemp("four heads")))


def on_a_rank(rank, step, ranks, directory):
    """Runs on every rank; `rank` is the actor."""
    from actors.deepspeed_engine import DeepSpeedEngine, sharded_reference

    options = {"ranks": ranks, "device": rank._device}
    make_reference = partial(sharded_reference, dtype="float32", **options)
    learner = step.learner(partial(DeepSpeedEngine, **options), make_reference)
    evaluated, metrics = take(step, learner, directory)
    if step.name == "ppo":
        metrics["probe"] = learner.publish_weights(1).probes[0].logprobs[0]  # every rank runs the probes as whole rows
    return evaluated, metrics


def on_all_ranks(group, step, ranks, directory):
    return group.all(
        lambda rank: rank.__ray_call__.remote(on_a_rank, step, ranks, directory), doing="updating", deadline_s=300
    )


@pytest.mark.parametrize(
    ("name", "zero_stage", "lora"),
    [("sft", 1, None), ("reward", 2, None), ("reward", 3, LoRAConfig(rank=4)), ("ppo", 2, None), ("ppo", 3, None)],
)
def test_gradients_equal_those_of_one_process(name, zero_stage, lora, group, policy, world, tokenizer, tmp_path):
    # As in the recipes of large models, ZeRO-3 computes activations again in the backward pass.
    recompute = zero_stage == 3
    step = step_of(name, policy, world, tokenizer, str(tmp_path), lora=lora, recompute=recompute)
    alone = step.learner(TorchEngine, reference_in_process("float32", "cpu"))
    evaluated, metrics = take(step, alone, str(tmp_path / "alone"))
    if name == "ppo":
        metrics["probe"] = alone.publish_weights(1).probes[0].logprobs[0]
    ranks = RanksConfig(ranks=2, zero_stage=zero_stage, sequence_parallel=2)
    for ours, measured in on_all_ranks(group, step, ranks, str(tmp_path / "ranks")):
        assert ours == pytest.approx(evaluated, rel=1e-4, abs=1e-5)
        assert measured == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    moments, expected = (first_moments(str(tmp_path / at), alone.engine.module) for at in ("ranks", "alone"))
    gap = largest_gap(moments, expected)
    print(f"{name}, ZeRO-{zero_stage}: gradients differ by {gap:.1e}")
    assert gap < 1e-5


def test_a_model_whose_heads_the_ranks_do_not_divide_is_refused_where_only_the_ranks_can_read_its_config(
    group, policy, world, tokenizer, tmp_path
):
    step = step_of("sft", policy, world, tokenizer, str(tmp_path))
    ranks = RanksConfig(ranks=3, sequence_parallel=3)
    with pytest.raises(ConfigError, match=r"= 3 ranks cannot divide the 4 attention heads .* Possible are 1, 2, 4\."):
        on_all_ranks(group, step, ranks, str(tmp_path / "ranks"))
