"""A run killed anywhere and started again ends with the same weights, bit for bit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.data.batching import step_indices
from pipeline.data.prompts import PromptStream
from pipeline.learning.experience import RewardScale
from pipeline.loops.alignment import align
from pipeline.loops.supervised_training import train
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.fakes import FakeRollouts, FakeScorer
from tests.learners import ALIGNMENT, collator, ppo_learner, prompts_of, reward_trainer, tokenised


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def stage_at(path, name):
    return StageDirectory(str(path), name, "0" * 64)


def weights(path):
    return load_file(path / "result" / "model.safetensors")


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def run_reward_training(tiny_policy, world, tokenizer, path, *, kill_before_update=None):
    learner = reward_trainer(tiny_policy, world, tokenizer, num_steps=6)
    update = learner.update

    def mortal_update(batch, step):
        if step == kill_before_update:
            raise Killed
        return update(batch, step)

    learner.update = mortal_update
    pairs, collate = tokenised(world, tokenizer), collator(world, tokenizer)
    return train(
        learner,
        stage_at(path, "train_reward_model"),
        batch_of=lambda step: collate([pairs[i] for i in step_indices(len(pairs), 8, step, 0)], step),
        heldout=collate(tokenised(world, tokenizer, "heldout"), 0),
        num_steps=6,
        eval_every=3,
        checkpoint_every=2,
    )


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_resumed_reward_training_equals_the_uninterrupted_run(step, tiny_policy, world, tokenizer, tmp_path):
    whole = run_reward_training(tiny_policy, world, tokenizer, tmp_path / "whole")
    with pytest.raises(Killed):
        run_reward_training(tiny_policy, world, tokenizer, tmp_path / "killed", kill_before_update=step)
    resumed = run_reward_training(tiny_policy, world, tokenizer, tmp_path / "killed")
    assert resumed == whole
    assert_bit_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    rows = read_metrics(tmp_path / "killed" / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 5]  # no step twice but the final evaluation


def run_alignment(tiny_policy, world, tokenizer, path, *, kill=None):
    learner = ppo_learner(tiny_policy, world, tokenizer, path / "published")
    rollouts = FakeRollouts(tokenizer)
    if kill is not None:
        method, call = kill
        original, calls = getattr(learner, method), []

        def mortal(*args):
            calls.append(args)
            if len(calls) == call:
                raise Killed
            return original(*args)

        setattr(learner, method, mortal)
    metrics = align(
        rollouts,
        FakeScorer(),
        learner,
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        stage_at(path, "align_policy"),
        ALIGNMENT,
        reward_scale=RewardScale(mean=0.0, std=1.0),
        pad_token_id=tokenizer.pad_token_id,
        seed=0,
    )
    return metrics, rollouts


def timeless(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith(("seconds/", "tokens_per_s/"))}


@pytest.mark.parametrize("kill", [("update", 4), ("publish_weights", 5), ("save", 2), ("evaluate", 6), ("export", 1)])
def test_resumed_alignment_equals_the_uninterrupted_run(kill, tiny_policy, world, tokenizer, tmp_path):
    whole, _ = run_alignment(tiny_policy, world, tokenizer, tmp_path / "whole")
    with pytest.raises(Killed):
        run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed", kill=kill)
    resumed, rollouts = run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed")
    assert timeless(resumed) == timeless(whole)
    assert_bit_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert rollouts.loaded[0] in (2, 4)  # it went on behind a commit, not from the start


def test_every_step_samples_its_own_prompts_from_the_policy_of_that_step(tiny_policy, world, tokenizer, tmp_path):
    _, rollouts = run_alignment(tiny_policy, world, tokenizer, tmp_path)
    assert rollouts.loaded == [0, 1, 2, 3, 4, 5, 6]
    stream = PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0)
    assert rollouts.prompts_seen == [p.id for step in range(6) for p in stream.batch(step, 4)]


def test_alignment_stops_when_the_policy_has_left_its_reference(tiny_policy, world, tokenizer, tmp_path):
    config = ALIGNMENT.model_copy(update={"kl": ALIGNMENT.kl.model_copy(update={"stop_above": 4.0})})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path / "published", config=config)
    evaluate = learner.evaluate
    # A reference that finds every token one nat less likely: KL per response is the length, five or more.
    learner.evaluate = lambda rollouts: [
        replace(e, reference_logprobs=tuple(logprob - 1.0 for logprob in e.logprobs)) for e in evaluate(rollouts)
    ]
    align(
        FakeRollouts(tokenizer),
        FakeScorer(),
        learner,
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        stage_at(tmp_path, "align_policy"),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
        pad_token_id=tokenizer.pad_token_id,
        seed=0,
    )
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 1
