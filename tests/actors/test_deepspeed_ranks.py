"""DeepSpeed ranks under real Ray: they agree with one process, resume exactly, and die loudly."""

import time
from types import SimpleNamespace

import pytest
import ray
import torch
from deepspeed.runtime.torch_autocast import has_comm_dtype, init_autocast_params
from safetensors.torch import load_file
from torch import nn

from actors.deepspeed_engine import zero_config
from actors.rank_group import RankGroup
from actors.ranked_learner import RankedLearner
from actors.reward_trainer import RewardTrainerSpec, build_reward_trainer
from pipeline.config.schema import DeadlinesConfig, LoRAConfig, OptimiserConfig, RanksConfig, RewardTrainingConfig
from pipeline.errors import WorkerDied
from pipeline.models.linear import OneDNNLinear
from pipeline.models.lora import merged
from tests.learners import HEAD, collator, reward_trainer, statistics_of, tokenised

LORA = LoRAConfig(rank=4)

pytestmark = pytest.mark.components

CONFIG = RewardTrainingConfig(
    vrm=HEAD,
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup_fraction=0.1),
    head_learning_rate=2e-3,
    max_tokens_per_micro_batch=200,
)


def start(tiny_policy, world, zero_stage, ranks=2, lora=None):
    spec = RewardTrainerSpec(
        config=CONFIG.model_copy(update={"lora": lora}),
        ranks=RanksConfig(ranks=ranks, cpus_per_rank=1, zero_stage=zero_stage),
        backbone_uri=tiny_policy,
        statistics=statistics_of(world),
        num_steps=8,
        seed=0,
    )
    group = RankGroup("test ranks", spec.ranks, start_s=240)
    group.build(build_reward_trainer, spec)
    return group


def batches(world, tokenizer):
    pairs, collate = tokenised(world, tokenizer), collator(world, tokenizer)
    return [collate(pairs[8 * step : 8 * step + 7], step) for step in range(4)]


def names_that_agree(metrics):
    return {
        name: metrics[name]
        for name in ("train/nll", "train/kl_w", "train/kl_z", "train/weight_head_gradient_norm", "grad_norm")
    }


@pytest.mark.parametrize(
    ("zero_stage", "lora"),
    [
        (1, None),
        (2, LORA),
        (3, None),
        pytest.param(3, LORA, marks=pytest.mark.long),
    ],
)
def test_two_ranks_agree_with_one_process_and_each_resumes_what_the_other_saved(
    zero_stage, lora, local_ray, tiny_policy, world, tokenizer, tmp_path
):
    data = batches(world, tokenizer)
    alone = reward_trainer(tiny_policy, world, tokenizer, num_steps=8, lora=lora)
    expected = [alone.update(data[step], step) for step in range(3)]
    alone.snapshot().write(str(tmp_path / "one process"))
    expected.append(alone.update(data[3], 3))
    with start(tiny_policy, world, zero_stage, lora=lora) as group:
        learner = RankedLearner(group, DeadlinesConfig())
        # As in a run that resumes on other machines than it began on: this group has not stepped yet.
        learner.restore(str(tmp_path / "one process"))
        assert names_that_agree(learner.update(data[3], 3)) == pytest.approx(names_that_agree(expected[3]), rel=1e-5)
        learner.restore(str(tmp_path / "one process"))
        snapshot = learner.snapshot()
        once = learner.update(data[3], 3)
        snapshot.write(str(tmp_path / "two ranks"))  # holds what was, not what became of it meanwhile
        learner.restore(str(tmp_path / "two ranks"))
        assert learner.update(data[3], 3) == once
        learner.export(str(tmp_path / "result"))
        memory = learner.peak_memory()
    assert memory.keys() == {"memory/rank_peak_gib"}  # and a GPU's, where there is one
    assert 0.05 < memory["memory/rank_peak_gib"] < 16
    resumed = reward_trainer(tiny_policy, world, tokenizer, num_steps=8, lora=lora)
    resumed.restore(str(tmp_path / "two ranks"))
    assert names_that_agree(resumed.update(data[3], 3)) == pytest.approx(names_that_agree(expected[3]), rel=1e-5)
    exported = load_file(tmp_path / "result" / "model.safetensors")
    one_process = merged(alone.engine.full_state_dict(), alone.engine.module)
    assert exported.keys() == one_process.keys()
    differences = torch.cat([(exported[n].double() - one_process[n].double()).abs().flatten() for n in exported])
    # Adam divides by the gradient's own size: where a gradient is all rounding, so is the step. Those are few.
    assert differences.mean() < 1e-5
    assert differences.quantile(0.999) < 1e-4


def test_under_bfloat16_no_parameter_is_rounded_on_its_way_between_ranks():
    """DeepSpeed would do that to every plain linear layer, which are those of the heads."""
    settings = zero_config(RanksConfig(ranks=2, zero_stage=3), dtype="bfloat16", max_grad_norm=1.0)["torch_autocast"]
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "backbone": OneDNNLinear(4, 4)})
    engine = SimpleNamespace(module=model, zero_quantized_weights=lambda: False)
    init_autocast_params(engine, torch.bfloat16, settings["lower_precision_safe_modules"])
    assert not [name for name, parameter in model.named_parameters() if has_comm_dtype(parameter)]
    init_autocast_params(engine, torch.bfloat16, None)
    assert [name for name, parameter in model.named_parameters() if has_comm_dtype(parameter)] == [
        "head.weight",
        "head.bias",
    ]


def test_a_dead_rank_is_reported_in_seconds_not_as_a_hang(local_ray, tiny_policy, world, tokenizer):
    [batch, *_] = batches(world, tokenizer)
    with start(tiny_policy, world, 2) as group:
        learner = RankedLearner(group, DeadlinesConfig(update_s=120))
        learner.update(batch, 0)
        ray.kill(group._ranks[1])
        started = time.monotonic()
        with pytest.raises(WorkerDied, match=r"test ranks: number 1 of 2 died while updating at step 1"):
            learner.update(batch, 1)
        assert time.monotonic() - started < 60
