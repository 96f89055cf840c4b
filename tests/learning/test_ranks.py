"""Whole updates on 1 to 5 ranks in step: the same metrics on every rank, and the same model."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.models import OptimiserConfig
from pipeline.config.sft import SFTConfig
from pipeline.data.collate import tokenise_texts
from pipeline.learning.builders import SFTTrainerSpec, build_sft_trainer
from pipeline.learning.micro_batches import own_micro_batches
from pipeline.models.packing import pack
from pipeline.records import PromptGroup
from pipeline.rollouts.published_versions import await_file
from tests.learning.test_updates import experience_from, experience_of, samples_of
from tests.support.learners import ALIGNMENT, collator, ppo_learner, reward_trainer, tokenised
from tests.support.lockstep import run_ranks


def assert_close(left, right, tolerance):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == pytest.approx(right[name], rel=tolerance, abs=tolerance), name


def assert_ranks_agree(world_sizes, build, work, *, tolerance=1e-5):
    """`work(learner)` -> (list of metrics, model). Ranks agree exactly, groups of ranks within the tolerance."""
    [(whole, model)] = run_ranks(1, build, work)
    for world_size in world_sizes:
        results = run_ranks(world_size, build, work)
        for metrics, _ in results:
            assert metrics == results[0][0], "every rank returns the metrics of the whole batch"
        for ours, theirs in zip(results[0][0], whole, strict=True):
            assert_close(ours, theirs, tolerance)
        differences = torch.cat([(results[0][1][n] - model[n]).abs().flatten() for n in model])
        # Adam divides a gradient by its own size: where it is all rounding, so is the step. Those are few.
        assert differences.mean() < 1e-6


def test_a_rank_knows_how_many_response_tokens_the_others_have_in_a_micro_batch():
    batch = [PromptGroup(prompt_ids=(1,) * p, response_ids=((2,) * r,)) for p, r in ((4, 6), (8, 1), (2, 2))]
    for rank, own in ((0, [([0], 1.0), ([0], 0.0)]), (1, [([1], 1.0), ([2], 1.0)])):
        micros = list(own_micro_batches(batch, SimpleNamespace(world_size=2, rank=rank, sequence_group=None), 10))
        assert [(micro.rows.tolist(), micro.weight) for micro in micros] == own
        assert [micro.most_response_tokens for micro in micros] == [6, 6]  # row 0 stands in beside row 2
        packed = [pack([batch[row] for row in micro.rows], most_response_tokens=6) for micro in micros]
        assert [p.most_response_tokens for p in packed] == [6, 6]


@pytest.mark.parametrize("head", ["vrm", "gate", "regression", "bt"])
def test_reward_training_in_step(head, tiny_policy, world, tokenizer):
    pairs, collate = tokenised(world, tokenizer), collator(world, tokenizer)

    def build(make_engine):
        return reward_trainer(
            tiny_policy, world, tokenizer, head=head, make_engine=make_engine, max_tokens=200, lr=1e-4
        )

    def work(learner):
        # Four pairs on five ranks: the fifth only keeps the others company.
        metrics = [learner.update(collate(pairs[first : first + 4], first), step) for step, first in enumerate((0, 4))]
        return [*metrics, learner.evaluate(collate(pairs[8:15], 0))], dict(learner.engine.stream().tensors)

    # The weights have hardly left the prior, so their correlation magnifies rounding: 1e-4.
    assert_ranks_agree((2, 3, 5), build, work, tolerance=1e-4)


def test_calibration_in_step(tiny_policy, world, tokenizer):
    pairs, collate = tokenised(world, tokenizer), collator(world, tokenizer)

    def build(make_engine):
        return reward_trainer(tiny_policy, world, tokenizer, make_engine=make_engine, max_tokens=200)

    def work(learner):
        batches = [collate(pairs[first : first + 7], first) for first in (0, 7)]
        metrics = learner.calibrate(batches, collate(pairs[20:51], 0), collate(pairs[51:56], 0))
        return [metrics], dict(learner.engine.module.head.last_layer.named_buffers())

    assert_ranks_agree((2, 3), build, work, tolerance=1e-3)


def test_supervised_fine_tuning_in_step(tiny_policy, world, tokenizer):
    texts = tokenise_texts(world.sft_texts()[:9], tokenizer, max_length=128)

    def build(make_engine):
        config = SFTConfig(
            num_steps=4,
            optimiser=OptimiserConfig(learning_rate=1e-4, warmup_fraction=0.0),
            max_tokens_per_micro_batch=80,
        )
        spec = SFTTrainerSpec(config=config, policy_uri=tiny_policy, dtype="float32", seed=0)
        return build_sft_trainer(spec, make_engine)

    def work(learner):
        metrics = [learner.update(texts[first : first + 3], step) for step, first in enumerate((0, 3))]
        return [*metrics, learner.evaluate(texts[6:])], dict(learner.engine.stream().tensors)

    assert_ranks_agree((2, 5), build, work)


@pytest.mark.parametrize("critic", ["separate", "value_head"])
def test_ppo_in_step(critic, tiny_policy, world, tokenizer, tmp_path):
    ppo = ALIGNMENT.ppo.model_copy(
        update={
            "critic": critic,
            "mini_batch_size": 3,
            "policy": OptimiserConfig(learning_rate=1e-4),
        }
    )
    config = ALIGNMENT.model_copy(update={"ppo": ppo})
    published = {}

    def build(make_engine):
        return ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config, make_engine=make_engine)

    def work(learner):
        metrics = [learner.update(experience, step) for step in range(2)]
        evaluations = {
            f"{field} of sample {n}": getattr(evaluation, field)
            for n, evaluation in enumerate(learner.evaluate_tokens(samples[:4]))
            for field in ("logprobs", "reference_logprobs", "values")
        }
        weights = learner.publish_weights(2)
        probes = {f"probe {n}": p.logprobs for n, p in enumerate(weights.probes)}
        if learner.engine.rank == 0:
            published[learner.engine.world_size] = load_file(f"{weights.location}/model.safetensors")
        # Two that are sent first: every rank knows whether the tensors have passed, else some would wait for ever.
        for version, is_sent in ((3, True), (4, False)):
            follows = learner.publish_weights(version, file_follows=True)
            if is_sent:
                assert len(dict(learner.policy_tensors())) > 0
            learner.write_due_file()
            if learner.engine.rank == 0:
                await_file(follows.location, 60.0)
                assert (
                    load_file(f"{follows.location}/model.safetensors").keys()
                    == published[learner.engine.world_size].keys()
                )
        return [*metrics, evaluations, probes], dict(learner.engine.stream().tensors)

    alone = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    samples, experience = samples_of(alone, world, tokenizer), experience_of(alone, world, tokenizer)
    # Nine responses in mini-batches of three, two epochs: six optimiser steps each, some ranks without a row.
    assert_ranks_agree((2, 5), build, work)
    assert published.keys() == {1, 2, 5}
    assert "lm_head.weight" in published[5]


@pytest.mark.parametrize("critic", ["separate", "value_head"])
def test_shards_and_micro_batches_leave_the_parameters_as_they_are(critic, tiny_policy, world, tokenizer, tmp_path):
    """Evaluation, experience and update on 1, 2 and 4 ranks, from one sequence at a time to all at once."""
    rates = {"policy": OptimiserConfig(learning_rate=1e-3), "critic_learning_rate": 1e-3}
    # Nine responses in mini-batches of three, two epochs: six optimiser steps, in which the fourth rank has no row.
    ppo = ALIGNMENT.ppo.model_copy(update={"critic": critic, "mini_batch_size": 3, "epochs": 2} | rates)

    def updated(world_size, max_tokens):
        config = ALIGNMENT.model_copy(update={"ppo": ppo, "max_tokens_per_micro_batch": max_tokens})

        def build(make_engine):
            return ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config, make_engine=make_engine)

        def work(learner):
            learner.update(experience_from(learner, samples), 0)
            return {name: tensor.clone() for name, tensor in learner.engine.stream().tensors}

        return run_ranks(world_size, build, work)[0]

    alone = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=ALIGNMENT.model_copy(update={"ppo": ppo}))
    samples, start = samples_of(alone, world, tokenizer), dict(alone.engine.stream().tensors)
    assert min(s.tokens.num_tokens for s in samples) > 16
    assert max(s.tokens.num_tokens for s in samples) < 32
    whole = updated(1, 10_000)
    for name, tensor in whole.items():
        assert (tensor - start[name]).abs().max() > 1e-3, f"{name} has not moved"
    # Adam divides a gradient by its own size, so one that is nothing but rounding would move its parameter by the whole
    # learning rate, on other shards perhaps the other way. There is none of those here, so no parameter is left out:
    # gradients that vanish are 0 to the bit on all shards (embeddings of tokens that nobody wrote; the backbone of the
    # critic while its value head is 0), and the others agree to 0.1% in the first step, when Adam keeps only the sign.
    for world_size, max_tokens in itertools.product((1, 2, 4), (16, 40, 64, 10_000)):
        parted = updated(world_size, max_tokens)
        difference = max((parted[name] - whole[name]).abs().max().item() for name in whole)
        assert difference < 1e-5, f"{world_size} ranks, {max_tokens} tokens"
