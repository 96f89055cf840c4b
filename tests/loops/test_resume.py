"""A run killed anywhere and started again ends with the same weights, bit for bit."""

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.alignment import AlignmentConfig
from pipeline.config.models import LoRAConfig
from pipeline.data.batching import step_indices
from pipeline.data.prompts import PromptStream
from pipeline.errors import NumericsError, Preempted
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.alignment import align
from pipeline.loops.training import train
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.preemption import PreemptionNotice
from pipeline.stages.workspace import StageDirectory
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.learners import ALIGNMENT, collator, ppo_learner, prompts_of, reward_trainer, tokenised
from tests.support.rewards import rewards_of


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def stage_at(path, name, **options):
    return StageDirectory(str(path), name, "0" * 64, **options)


def weights(path):
    return load_file(path / "result" / "model.safetensors")


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def run_reward_training(tiny_policy, world, tokenizer, path, *, kill_before_update=None, preempt_in_update=None):
    learner = reward_trainer(tiny_policy, world, tokenizer, num_steps=6)
    update = learner.update
    notice = PreemptionNotice()

    def mortal_update(batch, step):
        if step == kill_before_update:
            raise Killed
        if step == preempt_in_update:
            signal.raise_signal(signal.SIGTERM)
        return update(batch, step)

    learner.update = mortal_update
    pairs, collate = tokenised(world, tokenizer), collator(world, tokenizer)
    with notice.watching():
        return train(
            learner,
            stage_at(path, "train_reward_model", notice=notice),
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


@pytest.mark.parametrize("step", [0, 1, 2, 4])
def test_a_preempted_run_commits_the_step_it_is_in_and_its_successor_ends_with_the_same_weights(
    step, tiny_policy, world, tokenizer, tmp_path
):
    whole = run_reward_training(tiny_policy, world, tokenizer, tmp_path / "whole")
    with pytest.raises(Preempted, match=rf"train_reward_model is committed after step {step + 1}\. The same command"):
        run_reward_training(tiny_policy, world, tokenizer, tmp_path / "preempted", preempt_in_update=step)
    committed = stage_at(tmp_path / "preempted", "train_reward_model").checkpoints.latest()
    assert committed.step == step
    assert run_reward_training(tiny_policy, world, tokenizer, tmp_path / "preempted") == whole
    assert_bit_equal(weights(tmp_path / "preempted"), weights(tmp_path / "whole"))


def run_alignment(
    tiny_policy,
    world,
    tokenizer,
    path,
    *,
    kill=None,
    config=ALIGNMENT,
    change=lambda learner, rollouts: None,
    scorer=None,
    **options,
):
    learner = ppo_learner(tiny_policy, world, tokenizer, path / "published", config=config)
    rollouts = FakeRollouts(tokenizer)
    change(learner, rollouts)
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
        rewards_of(scorer or FakeScorer()),
        learner,
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        stage_at(path, "align_policy", **options),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    return metrics, rollouts


def timeless(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith(("seconds/", "tokens_per_s/"))}


@pytest.mark.parametrize(
    "kill", [("update", 4), ("publish_weights", 5), ("snapshot", 2), ("evaluate", 6), ("export", 1)]
)
def test_resumed_alignment_equals_the_uninterrupted_run(kill, tiny_policy, world, tokenizer, tmp_path):
    whole, _ = run_alignment(tiny_policy, world, tokenizer, tmp_path / "whole")
    with pytest.raises(Killed):
        run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed", kill=kill)
    resumed, rollouts = run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed")
    assert timeless(resumed) == timeless(whole)
    assert_bit_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert rollouts.loaded[0] in (2, 4)  # it went on behind a commit, not from the start


def test_resumed_alignment_without_a_critic_equals_the_uninterrupted_run(tiny_policy, world, tokenizer, tmp_path):
    dapo = AlignmentConfig.model_validate(
        ALIGNMENT.model_dump(exclude_unset=True, exclude={"kl"}) | {"algorithm": "dapo", "num_steps": 4}
    )
    whole, _ = run_alignment(tiny_policy, world, tokenizer, tmp_path / "whole", config=dapo)
    with pytest.raises(Killed):
        run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed", kill=("update", 3), config=dapo)
    resumed, rollouts = run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed", config=dapo)
    assert timeless(resumed) == timeless(whole)
    assert_bit_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert rollouts.loaded == [2, 3, 4]
    # Two samples with equally many e's are a uniform group; somewhere in the run one was left out.
    assert any(row["group/uniform"] > 0 for row in read_metrics(tmp_path / "whole" / METRICS_FILE))


def test_resumed_alignment_of_adapters_equals_the_uninterrupted_run(tiny_policy, world, tokenizer, tmp_path):
    ppo = ALIGNMENT.ppo.model_copy(update={"lora": LoRAConfig(rank=4), "critic": "separate"})
    config = ALIGNMENT.model_copy(update={"num_steps": 4, "ppo": ppo})
    whole, _ = run_alignment(tiny_policy, world, tokenizer, tmp_path / "whole", config=config)
    with pytest.raises(Killed):
        run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed", kill=("update", 3), config=config)
    committed = stage_at(tmp_path / "killed", "align_policy").checkpoints.latest()
    names = {key.split("/", 2)[2] for key in load_file(f"{committed.uri}/part-00000-of-00001.safetensors")}
    assert names
    assert all("lora_" in name or name.startswith("value_head.") for name in names)
    resumed, _ = run_alignment(tiny_policy, world, tokenizer, tmp_path / "killed", config=config)
    assert timeless(resumed) == timeless(whole)
    assert resumed["kl/per_response"] != 0.0
    assert_bit_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert weights(tmp_path / "whole").keys() == load_file(f"{tiny_policy}/model.safetensors").keys()


def test_every_step_samples_its_own_prompts_from_the_policy_of_that_step(tiny_policy, world, tokenizer, tmp_path):
    _, rollouts = run_alignment(tiny_policy, world, tokenizer, tmp_path)
    assert rollouts.loaded == [0, 1, 2, 3, 4, 5, 6]
    stream = PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0)
    assert rollouts.prompts_seen == [p.id for step in range(6) for p in stream.batch(step, 4)]


@pytest.fixture(scope="module")
def undisturbed(tiny_policy, world, tokenizer, tmp_path_factory):
    """Metrics and weights of a run that nobody ended."""
    path = tmp_path_factory.mktemp("undisturbed")
    metrics, _ = run_alignment(tiny_policy, world, tokenizer, path)
    return timeless(metrics), weights(path)


def sigterm_soon():
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()


# Commits are due behind steps 1 and 3. Call n of `generate` is that of step n - 1.
@pytest.mark.parametrize(("call", "committed"), [(1, None), (3, 1), (4, 2), (6, 4)])
def test_a_notice_during_rollouts_that_would_outlast_the_grace_commits_the_step_before_and_leaves_at_once(
    call, committed, tiny_policy, world, tokenizer, undisturbed, tmp_path
):
    hung = threading.Event()

    def make_slow(learner, rollouts):
        generate, calls = rollouts.generate, []

        def slow(*arguments):
            calls.append(arguments)
            if len(calls) == call:
                sigterm_soon()
                assert hung.wait(100), "the rollouts went on without end"
            return generate(*arguments)

        rollouts.generate = slow

    metrics, policy = undisturbed
    notice = PreemptionNotice()
    told = "starts again from its beginning" if committed is None else rf"is committed after step {committed + 1}\."
    with notice.watching(), pytest.raises(Preempted, match=f"align_policy {told}"):
        run_alignment(tiny_policy, world, tokenizer, tmp_path / "cut", change=make_slow, notice=notice)
    found = stage_at(tmp_path / "cut", "align_policy").checkpoints.latest()
    assert (found and found.step) == committed
    resumed, rollouts = run_alignment(tiny_policy, world, tokenizer, tmp_path / "cut")
    assert rollouts.loaded[0] == call - 1
    assert timeless(resumed) == metrics
    assert_bit_equal(weights(tmp_path / "cut"), policy)
    assert [row["step"] for row in read_metrics(tmp_path / "cut" / METRICS_FILE)] == [0, 1, 2, 3, 4, 5]


# Of step 2, behind which no commit is due.
@pytest.mark.parametrize(("method", "committed"), [("evaluate", 1), ("update", 2), ("publish_weights", 2)])
def test_a_notice_before_the_update_gives_the_step_up_and_one_from_there_on_has_it_committed(
    method, committed, tiny_policy, world, tokenizer, undisturbed, tmp_path
):
    def notify(learner, rollouts):
        original, calls = getattr(learner, method), []

        def notified(*arguments):
            calls.append(arguments)
            # The first weights are published before the first step.
            if len(calls) == (4 if method == "publish_weights" else 3):
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments)

        setattr(learner, method, notified)

    metrics, policy = undisturbed
    notice = PreemptionNotice()
    with notice.watching(), pytest.raises(Preempted, match=rf"is committed after step {committed + 1}\."):
        run_alignment(tiny_policy, world, tokenizer, tmp_path / "preempted", change=notify, notice=notice)
    assert stage_at(tmp_path / "preempted", "align_policy").checkpoints.latest().step == committed
    resumed, _ = run_alignment(tiny_policy, world, tokenizer, tmp_path / "preempted")
    assert timeless(resumed) == metrics
    assert_bit_equal(weights(tmp_path / "preempted"), policy)


def test_behind_a_notice_in_scoring_the_step_is_not_evaluated_any_more(
    tiny_policy, world, tokenizer, tmp_path, monkeypatch
):
    score, evaluated, scored = FakeScorer.score, [], []

    def notified(self, *arguments):
        scored.append(arguments)
        if len(scored) == 2:
            signal.raise_signal(signal.SIGTERM)
        return score(self, *arguments)

    def count(learner, rollouts):
        evaluate = learner.evaluate_tokens
        learner.evaluate_tokens = lambda samples: evaluated.append(samples) or evaluate(samples)

    monkeypatch.setattr(FakeScorer, "score", notified)
    notice = PreemptionNotice()
    with notice.watching(), pytest.raises(Preempted, match=r"is committed after step 1\."):
        run_alignment(tiny_policy, world, tokenizer, tmp_path, change=count, notice=notice)
    assert (len(scored), len(evaluated)) == (2, 1)


class RisingScorer(FakeScorer):
    """Likes every batch better than the one before, as a hacked reward model does."""

    batches = 0

    def score(self, prompts, responses):
        self.batches += 1
        return [replace(score, mean=float(self.batches)) for score in super().score(prompts, responses)]


class FallingScorer(FakeScorer):
    """Likes every batch less than the one before."""

    batches = 0

    def score(self, prompts, responses):
        self.batches += 1
        return [replace(score, mean=-float(self.batches)) for score in super().score(prompts, responses)]


# Commits follow steps 1 and 3; step 4 is the last.
@pytest.mark.parametrize(("keep_best", "reward", "version"), [("reward/mean", -2.0, 2), (None, -5.0, 5)])
def test_alignment_ends_with_the_policy_of_the_best_commit_where_the_recipe_prefers_it_to_the_last(
    keep_best, reward, version, tiny_policy, world, tokenizer, tmp_path
):
    policies = {}

    def keep_published(learner, rollouts):
        publish = learner.publish_weights

        def kept(number):
            published = publish(number)
            policies[number] = {name: tensor.clone() for name, tensor in learner.policy_tensors()}
            return published

        learner.publish_weights = kept

    metrics, _ = run_alignment(
        tiny_policy,
        world,
        tokenizer,
        tmp_path,
        config=ALIGNMENT.model_copy(update={"num_steps": 5}),
        change=keep_published,
        scorer=FallingScorer(),
        keep_best=keep_best,
        keep_checkpoints=1,
    )
    rows = read_metrics(tmp_path / METRICS_FILE)
    assert [row["reward/mean"] for row in rows] == [-1.0, -2.0, -3.0, -4.0, -5.0]
    assert metrics["reward/mean"] == reward
    assert metrics.items() <= rows[version - 1].items()
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, policies[version][name]), name
    assert not torch.equal(policies[2]["model.embed_tokens.weight"], policies[5]["model.embed_tokens.weight"])


def run_until_the_kl_limit(
    tiny_policy, world, tokenizer, path, *, too_far_from, kill_before_export=False, keep_best=None
):
    """Policies of version `too_far_from` on find their reference 100 nats away on every token."""
    config = ALIGNMENT.model_copy(update={"kl": ALIGNMENT.kl.model_copy(update={"stop_above": 50.0})})
    learner = ppo_learner(tiny_policy, world, tokenizer, path / "published", config=config)
    evaluate = learner.evaluate_tokens

    def evaluate_far(rollouts):
        gap = 100.0 if rollouts[0].policy_version >= too_far_from else 0.0
        evaluations = evaluate(rollouts)
        further = replace(evaluations.logprobs, values=evaluations.logprobs.values - gap)
        return replace(evaluations, reference_logprobs=further)

    def die(directory):
        raise Killed

    learner.evaluate_tokens = evaluate_far
    if kill_before_export:
        learner.export = die
    stage = stage_at(path, "align_policy", keep_best=keep_best)
    metrics = align(
        FakeRollouts(tokenizer),
        rewards_of(RisingScorer()),
        learner,
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        stage,
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    return metrics, stage


# Commits follow steps 1 and 3. Version 5 is measured at step 5 and good is version 4; version 4 is measured at step 4,
# and the newest commit holds it, so good is version 2.
# That commit has the better reward, for which `keep_best` must not take it.
@pytest.mark.parametrize("keep_best", [None, "reward/mean"])
@pytest.mark.parametrize(("too_far_from", "good_step"), [(5, 3), (4, 1)])
def test_past_the_kl_limit_alignment_ends_with_the_last_policy_measured_below_it(
    too_far_from, good_step, keep_best, tiny_policy, world, tokenizer, tmp_path
):
    metrics, stage = run_until_the_kl_limit(
        tiny_policy, world, tokenizer, tmp_path, too_far_from=too_far_from, keep_best=keep_best
    )
    assert [row["step"] for row in read_metrics(tmp_path / METRICS_FILE)] == list(range(too_far_from + 1))
    assert metrics["kl/stopped_at_step"] == too_far_from
    committed = load_file(f"{stage.checkpoints.uri(good_step)}/part-00000-of-00001.safetensors")
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor.flatten(), committed[f"weight/0/policy.{name}"]), name


def test_a_run_killed_at_the_kl_limit_stops_there_again(tiny_policy, world, tokenizer, tmp_path):
    whole, _ = run_until_the_kl_limit(tiny_policy, world, tokenizer, tmp_path / "whole", too_far_from=4)
    with pytest.raises(Killed):
        run_until_the_kl_limit(
            tiny_policy, world, tokenizer, tmp_path / "killed", too_far_from=4, kill_before_export=True
        )
    resumed, _ = run_until_the_kl_limit(tiny_policy, world, tokenizer, tmp_path / "killed", too_far_from=4)
    assert timeless(resumed) == timeless(whole)
    assert_bit_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_past_the_kl_limit_without_a_good_checkpoint_is_an_error_that_says_what_to_change(
    tiny_policy, world, tokenizer, tmp_path
):
    with pytest.raises(NumericsError, match=r"nats per response at step 1, above .*stop_above = 50.*kl.coefficient"):
        run_until_the_kl_limit(tiny_policy, world, tokenizer, tmp_path, too_far_from=1)
