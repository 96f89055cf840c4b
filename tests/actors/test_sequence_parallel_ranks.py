"""Two DeepSpeed ranks that share every row, over gloo: the gradients of one process, under every stage of ZeRO."""

from functools import partial

import pytest
import torch

from actors.rank_group import RankGroup
from pipeline.config.cluster import RanksConfig
from pipeline.config.models import LoRAConfig
from pipeline.errors import ConfigError
from pipeline.learning.builders import reference_in_process
from pipeline.learning.engine import TorchEngine
from tests.support.one_step import first_moments, four_headed_policy, largest_gap, saved_numbers, step_of, take

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


def learner_on_a_rank(rank, step, ranks):
    """Runs on every rank; `rank` is the actor."""
    from actors.deepspeed_engine import DeepSpeedEngine, sharded_reference

    options = {"ranks": ranks, "device": rank._device}
    make_reference = partial(sharded_reference, dtype="float32", **options)
    return step.learner(partial(DeepSpeedEngine, **options), make_reference)


def one_step_on_a_rank(rank, step, ranks, directory):
    """As `learner_on_a_rank`; evaluates and updates."""
    learner = learner_on_a_rank(rank, step, ranks)
    evaluated, metrics = take(step, learner, directory)
    if step.name == "ppo":
        metrics["probe"] = learner.publish_weights(1).probes[0].logprobs[0]  # every rank runs the probes as whole rows
    return evaluated, metrics


def trained_on_a_rank(rank, step, ranks, updates, directory, *, restored=None):
    """As `learner_on_a_rank`; resumes, where something is to be restored, and saves behind every update."""
    learner = learner_on_a_rank(rank, step, ranks)
    if restored is not None:
        learner.restore(restored)
    metrics = []
    for update in updates:
        metrics.append(learner.update(step.batch, update))
        learner.snapshot().write(f"{directory}/{update}")
    return metrics


def on_all_ranks(group, work, *arguments, **options):
    return group.all(
        lambda rank: rank.__ray_call__.remote(work, *arguments, **options), doing="updating", deadline_s=300
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
    for ours, measured in on_all_ranks(group, one_step_on_a_rank, step, ranks, str(tmp_path / "ranks")):
        assert ours == pytest.approx(evaluated, rel=1e-4, abs=1e-5)
        assert measured == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    moments, expected = (first_moments(str(tmp_path / at), alone.engine.module) for at in ("ranks", "alone"))
    gap = largest_gap(moments, expected)
    print(f"{name}, ZeRO-{zero_stage}: gradients differ by {gap:.1e}")
    assert gap < 1e-5


@pytest.mark.parametrize(("name", "zero_stage"), [("sft", 2), ("ppo", 3)])
def test_a_run_resumes_with_another_sequence_parallel_and_ends_as_if_undisturbed(
    name, zero_stage, group, policy, world, tokenizer, tmp_path
):
    """Both ranks share every row, then each has rows of its own; and the other way round."""
    step = step_of(name, policy, world, tokenizer, str(tmp_path))
    module = step.learner(TorchEngine, reference_in_process("float32", "cpu")).engine.module
    shared, apart = (RanksConfig(ranks=2, zero_stage=zero_stage, sequence_parallel=n) for n in (2, 1))
    for before, after in ((shared, apart), (apart, shared)):
        undisturbed, resumed = (tmp_path / f"{before.sequence_parallel}, {how}" for how in ("undisturbed", "resumed"))
        [expected, _] = on_all_ranks(group, trained_on_a_rank, step, before, (0, 1, 2), str(undisturbed))
        found = on_all_ranks(
            group, trained_on_a_rank, step, after, (1, 2), str(resumed), restored=str(undisturbed / "0")
        )
        for metrics in found:
            for ours, theirs in zip(metrics, expected[1:], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        weights, theirs, start = (
            saved_numbers("weight", str(at), module) for at in (resumed / "2", undisturbed / "2", undisturbed / "0")
        )
        gaps = torch.cat([(weights[n] - theirs[n]).abs() for n in weights])
        moved = torch.cat([(theirs[n] - start[n]).abs() for n in weights])
        print(f"{name}, ZeRO-{zero_stage}: weights differ by {gaps.mean():.1e} of {moved.mean():.1e}")
        assert gaps.mean() < 1e-5 * moved.mean()


def test_a_model_whose_heads_the_ranks_do_not_divide_is_refused_where_only_the_ranks_can_read_its_config(
    group, policy, world, tokenizer, tmp_path
):
    step = step_of("sft", policy, world, tokenizer, str(tmp_path))
    ranks = RanksConfig(ranks=3, sequence_parallel=3)
    with pytest.raises(ConfigError, match=r"= 3 ranks cannot divide the 4 attention heads .* Possible are 1, 2, 4\."):
        on_all_ranks(group, learner_on_a_rank, step, ranks)
