"""DeepSpeed ranks under real Ray: they agree with one process, resume exactly, and die loudly."""

import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from deepspeed.runtime.torch_autocast import has_comm_dtype, init_autocast_params
from safetensors.torch import load_file
from torch import nn

from actors.deepspeed_engine import zero_config
from actors.deepspeed_learners import deepspeed_ppo_learner, deepspeed_reward_trainer, open_ranked_direct_learner
from actors.rank_group import RankGroup
from actors.ranked_learner import RankedLearner, RankedPolicyLearner
from pipeline.config.alignment import PPOConfig
from pipeline.config.cluster import DeadlinesConfig, RanksConfig
from pipeline.config.models import LoRAConfig, OptimiserConfig
from pipeline.config.reward import RewardConfig
from pipeline.errors import DeadlineExceeded, WorkerDied
from pipeline.learning.builders import (
    DirectTrainerSpec,
    PPOLearnerSpec,
    RewardTrainerSpec,
    build_ppo_learner,
    reference_in_process,
)
from pipeline.learning.engine import TorchEngine
from pipeline.models.onednn_linear import OneDNNLinear
from pipeline.rollouts.numerics_gate import choose_probes
from tests.learning.test_updates import experience_from, experience_of, rewarded, samples_of
from tests.support.learners import (
    ALIGNMENT,
    HEAD,
    collator,
    direct_config,
    direct_data,
    direct_trainer,
    prompts_of,
    reward_trainer,
    statistics_of,
    tokenised,
)

LORA = LoRAConfig(rank=4)

pytestmark = pytest.mark.components

CONFIG = RewardConfig(
    vrm=HEAD,
    optimiser=OptimiserConfig(learning_rate=1e-3, warmup_fraction=0.1),
    head_learning_rate=2e-3,
    max_tokens_per_micro_batch=200,
)


def start(tiny_policy, world, zero_stage, lora=None, offload=False):
    spec = RewardTrainerSpec(
        config=CONFIG.model_copy(update={"lora": lora}),
        backbone_uri=tiny_policy,
        statistics=statistics_of(world),
        num_steps=8,
        seed=0,
    )
    ranks = RanksConfig(ranks=2, cpus_per_rank=1, zero_stage=zero_stage, offload_optimiser=offload)
    group = RankGroup("test ranks", ranks, start_s=240)
    group.build(build_trainer, spec, ranks)
    return group


def build_trainer(spec, ranks, device):
    """Runs on every rank, as `build_learner` does."""
    return offloading_as_asked(deepspeed_reward_trainer(spec, ranks, device), ranks)


def build_learner(spec, ranks, device):
    return offloading_as_asked(deepspeed_ppo_learner(spec, ranks, device), ranks)


def offloading_as_asked(learner, ranks):
    """Where there is no GPU, only DeepSpeed itself can tell whether it offloads."""
    assert learner.engine._engine.zero_cpu_offload() == ranks.offload_optimiser
    return learner


def batches(world, tokenizer):
    pairs, collate = tokenised(world, tokenizer), collator(world, tokenizer)
    return [collate(pairs[8 * step : 8 * step + 7], step) for step in range(4)]


def names_that_agree(metrics):
    return {
        name: metrics[name]
        for name in ("train/nll", "train/kl_w", "train/kl_z", "train/weight_head_gradient_norm", "grad_norm")
    }


def assert_nearly_equal(left, right):
    assert left.keys() == right.keys()
    differences = torch.cat([(left[name].double() - right[name].double()).abs().flatten() for name in left])
    # Adam divides by the gradient's own size: where a gradient is all rounding, so is the step. Those are few.
    assert differences.mean() < 1e-5
    assert differences.quantile(0.999) < 1e-4


@pytest.mark.parametrize(
    ("zero_stage", "lora", "offload"),
    [
        (1, None, False),
        (2, LORA, False),
        (2, None, True),
        (3, None, False),
        (3, LORA, True),
        pytest.param(3, LORA, False, marks=pytest.mark.long),
    ],
)
def test_two_ranks_agree_with_one_process_and_each_resumes_what_the_other_saved(
    zero_stage, lora, offload, local_ray, tiny_policy, world, tokenizer, tmp_path
):
    data = batches(world, tokenizer)
    alone = reward_trainer(tiny_policy, world, tokenizer, num_steps=8, lora=lora)
    expected = [alone.update(data[step], step) for step in range(3)]
    alone.snapshot().write(str(tmp_path / "one process"))
    expected.append(alone.update(data[3], 3))
    with start(tiny_policy, world, zero_stage, lora, offload) as group:
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
    one_process = dict(alone.engine.stream().merged(alone.engine.module).tensors)
    assert_nearly_equal(exported, one_process)


@pytest.mark.parametrize(
    ("zero_stage", "method", "lora", "offload"),
    [(1, "wpo", None, False), (2, "kto", None, False), (3, "beta_dpo", LORA, False), (3, "orpo", None, True)],
)
def test_direct_alignment_on_two_ranks_agrees_with_one_process_and_each_resumes_what_the_other_saved(
    zero_stage, method, lora, offload, local_ray, tiny_policy, world, tokenizer, tmp_path
):
    config = direct_config(method, lora=lora)
    alone = direct_trainer(tiny_policy, config)
    data = direct_data(world, tokenizer, config)
    reference = alone.logprobs(data.examples.groups)
    batches = data.with_references(alone.logprobs)
    expected = [alone.update(batches.batch(step), step) for step in range(3)]
    alone.snapshot().write(str(tmp_path / "one process"))
    expected.append(alone.update(batches.batch(3), 3))
    spec = DirectTrainerSpec(
        config=config,
        policy_uri=tiny_policy,
        dtype="float32",
        num_steps=8,
        max_tokens_per_micro_batch=100,
        gradient_checkpointing=True,
        seed=0,
    )
    ranks = RanksConfig(ranks=2, cpus_per_rank=1, zero_stage=zero_stage, offload_optimiser=offload)
    with open_ranked_direct_learner(ranks, DeadlinesConfig(start_s=240), spec) as learner:
        measured = learner.logprobs(data.examples.groups)
        torch.testing.assert_close(measured, reference, atol=1e-4, rtol=1e-5)
        learner.restore(str(tmp_path / "one process"))
        snapshot = learner.snapshot()
        once = learner.update(batches.batch(3), 3)
        assert once == pytest.approx(expected[3], rel=1e-4, abs=1e-4)
        snapshot.write(str(tmp_path / "two ranks"))
        learner.restore(str(tmp_path / "two ranks"))
        assert learner.update(batches.batch(3), 3) == once
        learner.export(str(tmp_path / "result"))
    resumed = direct_trainer(tiny_policy, config)
    resumed.restore(str(tmp_path / "two ranks"))
    assert resumed.update(batches.batch(3), 3) == pytest.approx(expected[3], rel=1e-4, abs=1e-4)
    exported = load_file(tmp_path / "result" / "model.safetensors")
    one_process = dict(alone.engine.stream().merged(alone.engine.module).tensors)
    assert_nearly_equal(exported, {name.removeprefix("policy."): tensor for name, tensor in one_process.items()})


@pytest.mark.parametrize(
    ("zero_stage", "critic", "lora", "offload"),
    [(2, "separate", None, False), (3, "separate", None, True), (3, "value_head", LORA, False)],
)
def test_ppo_on_two_ranks_agrees_with_one_process_and_each_resumes_what_the_other_saved(
    zero_stage, critic, lora, offload, local_ray, tiny_policy, trained_reward_model, world, tokenizer, tmp_path
):
    ppo = PPOConfig(
        epochs=2,
        mini_batch_size=4,
        policy=OptimiserConfig(learning_rate=1e-4),
        critic=critic,
        critic_learning_rate=1e-4,
        lora=lora,
    )
    spec = PPOLearnerSpec(
        config=ALIGNMENT.model_copy(update={"ppo": ppo}),
        policy_uri=tiny_policy,
        reward_model_uri=trained_reward_model,
        dtype="float32",
        probes=tuple(choose_probes(prompts_of(world, tokenizer), vocabulary_size=len(tokenizer), seed=0, count=3)),
        publish_directory=str(tmp_path / "published"),
        seed=0,
    )
    alone = in_one_process(spec)
    samples, experience = samples_of(alone, world, tokenizer), experience_of(alone, world, tokenizer)
    alone.update(experience, 0)
    alone.snapshot().write(str(tmp_path / "one process"))
    evaluations = alone.evaluate_tokens(samples)
    assert evaluations[0].logprobs != pytest.approx(evaluations[0].reference_logprobs, abs=1e-4)
    expected = experience_from(alone, samples)
    metrics = alone.update(experience, 1)
    published = alone.publish_weights(2)
    policy = load_file(f"{published.location}/model.safetensors")
    ranks = RanksConfig(ranks=2, cpus_per_rank=1, zero_stage=zero_stage, offload_optimiser=offload)
    with RankGroup("test ranks", ranks, start_s=240) as group:
        # Elsewhere than one process did: a policy that was read from a file may change when it is written over.
        group.build(build_learner, replace(spec, publish_directory=str(tmp_path / "published by ranks")), ranks)
        learner = RankedPolicyLearner(group, DeadlinesConfig())
        learner.restore(str(tmp_path / "one process"))
        evaluated, responses = learner.evaluate(samples)
        log_ratios = evaluations.logprobs.sums() - evaluations.reference_logprobs.sums()
        torch.testing.assert_close(responses.log_ratios, log_ratios, atol=1e-4, rtol=0.0)
        for ours, theirs in zip(ray.get(evaluated.tokens), evaluations, strict=True):
            for field in ("logprobs", "reference_logprobs", "values"):
                assert getattr(ours, field) == pytest.approx(getattr(theirs, field), abs=1e-5)
        built, summary = learner.build_experience(evaluated, rewarded(samples), kl_coefficient=0.05)
        assert isinstance(built, ray.ObjectRef)  # the driver does not read it
        assert summary.rows == expected.rows
        torch.testing.assert_close(ray.get(built).advantages, expected.advantages, atol=1e-4, rtol=0.0)
        assert learner.update(ray.put(experience), 1) == pytest.approx(metrics, rel=1e-4, abs=1e-6)
        learner.snapshot().write(str(tmp_path / "two ranks"))
        weights = learner.publish_weights(2)
        assert_nearly_equal(load_file(f"{weights.location}/model.safetensors"), policy)
        for ours, theirs in zip(weights.probes, published.probes, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        once = learner.update(ray.put(experience), 2)
        learner.restore(str(tmp_path / "two ranks"))
        assert learner.update(ray.put(experience), 2) == once
    resumed = in_one_process(spec)
    resumed.restore(str(tmp_path / "two ranks"))
    assert_nearly_equal(dict(resumed.engine.stream().tensors), dict(alone.engine.stream().tensors))
    assert resumed.update(experience, 2) == pytest.approx(alone.update(experience, 2), rel=1e-4, abs=1e-6)


def in_one_process(spec):
    return build_ppo_learner(spec, TorchEngine, reference_in_process(spec.dtype, "cpu"))


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


class SlowDisk:
    """A learner whose snapshot is on disk when somebody says so."""

    def __init__(self, device):
        pass

    def update(self, batch, step):
        return {"train/loss": 0.5}

    def snapshot(self):
        return self

    def write(self, uri):
        directory = Path(uri)
        (directory / "begun").touch()
        gives_up = time.monotonic() + 100
        while not (directory / "may end").exists() and time.monotonic() < gives_up:
            time.sleep(0.05)
        (directory / "ended").touch()


def test_a_rank_updates_while_it_writes_its_snapshot(local_ray, tmp_path):
    with RankGroup("test ranks", RanksConfig(ranks=1, cpus_per_rank=1), start_s=240) as group:
        group.build(SlowDisk)
        learner = RankedLearner(group, DeadlinesConfig(update_s=120))
        writer = threading.Thread(target=learner.snapshot().write, args=(str(tmp_path),))
        writer.start()
        while not (tmp_path / "begun").exists():
            assert writer.is_alive()
            time.sleep(0.05)
        assert RankedLearner(group, DeadlinesConfig(update_s=30)).update(None, 0) == {"train/loss": 0.5}
        assert not (tmp_path / "ended").exists()
        (tmp_path / "may end").touch()
        writer.join(timeout=60)
        assert (tmp_path / "ended").exists()


def test_a_rank_that_hangs_is_reported_at_the_recipes_deadline_and_a_dead_one_in_seconds(
    local_ray, tiny_policy, world, tokenizer
):
    [batch, *_] = batches(world, tokenizer)
    with start(tiny_policy, world, 2) as group:
        learner = RankedLearner(group, DeadlinesConfig(update_s=120))
        learner.update(batch, 0)
        pid = ray.get(group._ranks[1].__ray_call__.remote(lambda rank: os.getpid()), timeout=60)
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        # The other waits for it, in a collective: from outside both hang.
        with pytest.raises(
            DeadlineExceeded, match=r"test ranks: updating at step 1 did not end within 3 s on rank 0, rank 1 of 2"
        ) as raised:
            RankedLearner(group, DeadlinesConfig(update_s=3)).update(batch, 1)
        waiting, hanging = str(raised.value).splitlines()[1:]
        assert re.fullmatch(r"rank 0 is in \w+\(\), from \w+\(\) at (pipeline|actors)/\S+\.py:\d+", waiting)
        assert hanging == "rank 1 does not answer"
        assert time.monotonic() - started < 30
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(WorkerDied, match=r"test ranks: rank 1 of 2 died while updating at step 2"):
            learner.update(batch, 2)
        assert time.monotonic() - started < 60
