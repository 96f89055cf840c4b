"""Validation while aligning: what it measures, that it disturbs nothing, and that the best validated policy is kept."""

import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.alignment import AlignmentConfig
from pipeline.config.load import load_recipe
from pipeline.data.prompts import PromptStream, tokenise_prompts
from pipeline.errors import ConfigError, DataError, Preempted
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.align_policy import alignment_stage
from pipeline.loops.alignment import align
from pipeline.loops.alignment_observer import AlignmentObserver, KeptRollouts
from pipeline.loops.validation import Validation, ValidationPlan, drawn_from_the_end
from pipeline.rollouts.kept_rollouts import RolloutFiles, what_was_kept
from pipeline.rollouts.kept_samples import SamplesOverTime, read_samples
from pipeline.rollouts.prefetch import StepPlan
from pipeline.rollouts.requests import rollout_requests
from pipeline.rollouts.rollout_queries import RolloutQueries
from pipeline.rollouts.torch_rollouts import TorchRollouts
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.preemption import PreemptionNotice
from pipeline.stages.workspace import StageDirectory
from tests.support.fakes import FakeScorer
from tests.support.learners import ALIGNMENT, ppo_learner, prompts_of
from tests.support.rewards import rewards_of

# Policies 0, 1, 2 and the finished one, 4, are validated. Of these a commit holds policy 2.
VALIDATED = ALIGNMENT.model_copy(
    update={"num_steps": 4, "checkpoint_every": 2, "max_response_tokens": 8, "eval_every": 1, "eval_prompts": 5}
)
TIMED = ("seconds/", "tokens_per_s/", "time", "weights/")


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


class Watched(TorchRollouts):
    """Notes what it is asked to sample, and can be killed while it samples."""

    def __init__(self, directory, *, die_at=None):
        super().__init__(directory, dtype="float32")
        self.asked = []
        self.die_at = die_at

    def generate(self, prompts, sampling):
        self.asked.append((self._version, tuple(prompt.id for prompt in prompts), sampling))
        if len(self.asked) == self.die_at:
            raise Killed
        return super().generate(prompts, sampling)


class MoodyScorer(FakeScorer):
    """Likes held-out answers as it is told to, policy by policy; knows them by the prompts."""

    def __init__(self, heldout, moods):
        self.heldout = {repr(prompt.messages) for prompt in heldout}
        self.moods = list(moods)

    def score(self, prompts, responses):
        scores = super().score(prompts, responses)
        if all(repr(prompt) in self.heldout for prompt in prompts):
            mood = self.moods.pop(0)
            return [replace(score, mean=mood) for score in scores]
        return scores


def heldout_of(world, tokenizer):
    return tokenise_prompts([(p.id, p.messages) for p in world.heldout_prompts], tokenizer, max_prompt_tokens=32)


def run(
    tiny_policy,
    world,
    tokenizer,
    path,
    config=VALIDATED,
    *,
    scorer=None,
    kill=None,
    change=lambda learner: None,
    is_observed=True,
    max_mib=10.0,
    **options,
):
    """`kill` is the step in whose update the process dies."""
    stage = StageDirectory(str(path), "align_policy", "0" * 64, keep_best=config.keep_best, **options)
    learner = ppo_learner(tiny_policy, world, tokenizer, path / "published", config=config)
    update = learner.update
    change(learner)

    def mortal_update(experience, step):
        if step == kill:
            stage.checkpoints.settle()  # a save in the background would be cut short, or not
            raise Killed
        return update(experience, step)

    learner.update = mortal_update
    rollouts, rewards = Watched(tiny_policy), rewards_of(scorer or FakeScorer())
    validation = Validation(
        ValidationPlan.of(config, heldout_of(world, tokenizer), seed=0),
        rollouts,
        rewards,
        learner,
        SamplesOverTime(stage.uri, num_steps=config.num_steps),
        objectives=(),
        gold=None,
    )
    stream = PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0)
    files = RolloutFiles(stage.uri, keep="all", token_ids=True, max_mib=max_mib, objectives=(), seed=0)
    kept = KeptRollouts(files=files, plan=StepPlan(prompts=stream, config=config), stage=stage.name)
    metrics = align(
        rollouts,
        rewards,
        learner,
        stream,
        stage,
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
        observer=AlignmentObserver(validation=validation, kept=kept) if is_observed else AlignmentObserver(),
    )
    return metrics, rollouts


def rows_of(path):
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMED)}
        for row in read_metrics(path / METRICS_FILE)
    ]


def trained_on(rows):
    """The rows of steps, without what was only looked at; the last row is the finished policy's."""
    looked_at = ("eval/", "rollout/kept", "rollout/left_out")
    return [{name: value for name, value in row.items() if not name.startswith(looked_at)} for row in rows[:4]]


def validations(rows):
    return [(row["step"], row["eval/updates"], row["eval/reward"]) for row in rows if "eval/updates" in row]


def weights(path):
    return load_file(path / "result" / "model.safetensors")


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def whole(tiny_policy, world, tokenizer, tmp_path_factory):
    """A run that nobody ended: its place, metrics and engine."""
    path = tmp_path_factory.mktemp("validated")
    return path, *run(tiny_policy, world, tokenizer, path)


@pytest.mark.parametrize("prefetch", [None, "continue"])
def test_a_training_is_bit_equal_with_and_without_validation(prefetch, tiny_policy, world, tokenizer, tmp_path):
    ppo = ALIGNMENT.ppo.model_copy(update={"tis_cap": 2.0})
    validated = VALIDATED.model_copy(update={"ppo": ppo, "prefetch": prefetch})
    _, with_it = run(tiny_policy, world, tokenizer, tmp_path / "with", validated)
    _, without = run(tiny_policy, world, tokenizer, tmp_path / "without", validated, is_observed=False)
    rows = rows_of(tmp_path / "with")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    assert trained_on(rows) == rows_of(tmp_path / "without")
    assert_bit_equal(weights(tmp_path / "with"), weights(tmp_path / "without"))
    heldout = {prompt.id for prompt in heldout_of(world, tokenizer)}
    asked = [[each for each in engine.asked if not heldout & {*each[1]}] for engine in (with_it, without)]
    assert asked[0] == asked[1]
    # Each of the policies that its metrics name, whatever was sampled ahead of it.
    assert [version for version, prompts, _ in with_it.asked if heldout & {*prompts}] == [0, 1, 2, 4]


def test_the_same_unseen_prompts_are_answered_each_time_with_the_same_seeds(whole, world, tokenizer):
    path, metrics, rollouts = whole
    heldout = heldout_of(world, tokenizer)
    of_validation = [(prompts, sampling) for _, prompts, sampling in rollouts.asked if len(prompts) == 5]
    assert len(of_validation) == 4
    assert len({*of_validation}) == 1
    assert {*of_validation[0][0]} <= {prompt.id for prompt in heldout}
    assert not {*of_validation[0][0]} & {prompt.id for prompt in prompts_of(world, tokenizer)}
    rows = rows_of(path)
    assert [(step, updates) for step, updates, _ in validations(rows)] == [(0, 0), (1, 1), (2, 2), (3, 4)]
    for row in rows:
        if "eval/updates" in row:
            assert row["eval/reward_low"] <= row["eval/reward"] <= row["eval/reward_high"]
            assert row["eval/length"] > 1
    assert rows[0]["eval/kl"] == pytest.approx(0.0, abs=1e-4)  # the policy is the reference
    assert abs(rows[-1]["eval/kl"]) > 1e-3
    assert metrics["eval/reward"] == rows[-1]["eval/reward"]


def test_a_validation_prefers_prompts_that_the_benchmark_does_not_take(world, tokenizer):
    from pipeline.loops.benchmark import drawn

    heldout = heldout_of(world, tokenizer)
    validation, benchmark = drawn_from_the_end(heldout, 8, 3), drawn(heldout, 8, 3)
    assert len(heldout) == 16
    assert {prompt.id for prompt in (*validation, *benchmark)} == {prompt.id for prompt in heldout}


# Killed in step 1 the run starts anew; in step 2 it resumes with policy 2, which is committed and was validated.
@pytest.mark.parametrize(("kill", "repeated"), [(1, [0, 1, 2, 4]), (2, [4])])
def test_a_resumed_run_validates_no_committed_policy_again(
    kill, repeated, whole, tiny_policy, world, tokenizer, tmp_path
):
    path, metrics, _ = whole
    with pytest.raises(Killed):
        run(tiny_policy, world, tokenizer, tmp_path, kill=kill)
    resumed, rollouts = run(tiny_policy, world, tokenizer, tmp_path)
    assert [version for version, prompts, _ in rollouts.asked if len(prompts) == 5] == repeated
    assert rows_of(tmp_path) == rows_of(path)
    assert_bit_equal(weights(tmp_path), weights(path))
    assert resumed["eval/reward"] == metrics["eval/reward"]
    assert read_samples(str(tmp_path)) == read_samples(str(path))
    assert kept_in(tmp_path) == kept_in(path)


def best_of(config):
    return config.model_copy(update={"keep_best": "eval/reward"})


# Policies 0, 1, 2 and 4. With a commit every 5 steps no validated policy is committed for any other reason.
@pytest.mark.parametrize(
    ("moods", "best", "checkpoint_every"),
    [((9.0, 1.0, 3.0, 2.0), 2, 5), ((0.0, 3.0, 1.0, 2.0), 1, 2), ((0.0, 1.0, 2.0, 3.0), 4, 2)],
)
def test_a_run_ends_with_the_best_validated_policy(
    moods, best, checkpoint_every, tiny_policy, world, tokenizer, tmp_path
):
    policies = {}

    def keep_published(learner):
        publish = learner.publish_weights

        def kept(number):
            published = publish(number)
            policies[number] = {name: tensor.clone() for name, tensor in learner.policy_tensors()}
            return published

        learner.publish_weights = kept

    config = best_of(VALIDATED).model_copy(update={"checkpoint_every": checkpoint_every})
    scorer = MoodyScorer(heldout_of(world, tokenizer), moods)
    metrics, _ = run(
        tiny_policy, world, tokenizer, tmp_path, config, scorer=scorer, change=keep_published, keep_checkpoints=1
    )
    assert metrics["eval/updates"] == best
    # The policy before the first update is the best by its number, and no candidate.
    assert metrics["eval/reward"] == max(moods[1:])
    for name, tensor in weights(tmp_path).items():
        assert torch.equal(tensor, policies[best][name]), name
    assert not torch.equal(policies[1]["model.embed_tokens.weight"], policies[2]["model.embed_tokens.weight"])


def test_a_run_killed_after_its_best_validation_ends_with_the_same_best(tiny_policy, world, tokenizer, tmp_path):
    config = best_of(VALIDATED).model_copy(update={"checkpoint_every": 5})
    heldout = heldout_of(world, tokenizer)
    whole, _ = run(
        tiny_policy, world, tokenizer, tmp_path / "whole", config, scorer=MoodyScorer(heldout, (0.0, 3.0, 1.0, 2.0))
    )
    with pytest.raises(Killed):
        run(
            tiny_policy,
            world,
            tokenizer,
            tmp_path / "killed",
            config,
            scorer=MoodyScorer(heldout, (0.0, 3.0)),
            kill=1,
        )
    # It resumes with the policy that was saved because it is the best, and is told nothing of it again.
    resumed, rollouts = run(
        tiny_policy, world, tokenizer, tmp_path / "killed", config, scorer=MoodyScorer(heldout, (1.0, 2.0))
    )
    assert rollouts.asked[0][0] == 1
    assert (resumed["eval/updates"], resumed["eval/reward"]) == (1, 3.0) == (whole["eval/updates"], 3.0)
    assert_bit_equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_notice_in_the_last_validation_commits_the_last_step(whole, tiny_policy, world, tokenizer, tmp_path):
    path, _, _ = whole
    notice = PreemptionNotice()

    def notify(learner):
        evaluate, calls = learner.evaluate, []

        def notified(samples):
            calls.append(samples)
            if len(calls) == 8:  # four steps and three validations before
                signal.raise_signal(signal.SIGTERM)
            return evaluate(samples)

        learner.evaluate = notified

    with notice.watching(), pytest.raises(Preempted, match=r"align_policy is committed after step 4\."):
        run(tiny_policy, world, tokenizer, tmp_path, change=notify, notice=notice)
    _, rollouts = run(tiny_policy, world, tokenizer, tmp_path)
    assert rollouts.asked == []
    assert rows_of(tmp_path) == rows_of(path)
    assert_bit_equal(weights(tmp_path), weights(path))


def kept_in(path):
    return list(RolloutQueries(str(path / "rollouts")).all_rows())


def test_the_rollouts_of_every_step_are_kept_with_what_was_said_of_them(whole, world, tokenizer):
    path, _, _ = whole
    rows = kept_in(path)
    assert [(row["step"], row["position"]) for row in rows] == [(step, i) for step in range(4) for i in range(8)]
    plan = StepPlan(prompts=PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0), config=VALIDATED)
    requests = [request for step in range(4) for request in rollout_requests(*plan.batch(step))]
    told = [(row["prompt_id"], row["sample"], row["seed"], tuple(row["prompt_ids"])) for row in rows]
    assert told == [(r.prompt.id, r.sample_index, r.seed, r.prompt.token_ids) for r in requests]
    for step, metrics in enumerate(rows_of(path)[:4]):
        of_step = [row for row in rows if row["step"] == step]
        assert {row["policy_version"] for row in of_step} == {step}
        assert sum(row["reward"] for row in of_step) / 8 == pytest.approx(metrics["reward/mean"], rel=1e-6)
        assert sum(row["kl"] for row in of_step) / 8 == pytest.approx(metrics["kl/per_response"], abs=1e-5)
        assert max(row["logprob_gap"] for row in of_step) == pytest.approx(metrics["engine_gap/max"], abs=1e-6)
        # Whitened over the tokens of the step: their mean is 0.
        assert sum(row["advantage"] * row["tokens"] for row in of_step) == pytest.approx(0.0, abs=1e-4)
        assert (metrics["rollout/kept"], metrics["rollout/left_out"]) == (8.0, 0.0)


def test_what_is_kept_is_no_part_of_what_a_run_is():
    def identity(*settings):
        return alignment_stage(load_recipe("tiny", settings), "policy", "reward model").fingerprint

    kept = ("alignment.keep_rollouts=0.5", "alignment.keep_rollouts_mib=1", "alignment.keep_token_ids=true")
    assert identity(*kept) == identity()
    assert identity("alignment.eval_every=3") != identity()


@pytest.mark.parametrize("share", ["1.5", "0", "1", "-0.1", "some", "true"])
def test_a_share_that_is_none_is_refused_with_its_place_and_the_cure(share):
    with pytest.raises(
        ConfigError, match=r"alignment\.keep_rollouts: .* is no share; give all, none, or a number above"
    ):
        load_recipe("tiny", [f"alignment.keep_rollouts={share}"])


def test_files_that_are_full_are_said_once_and_the_rest_is_counted(tiny_policy, world, tokenizer, tmp_path, capsys):
    config = VALIDATED.model_copy(update={"eval_every": 0, "num_steps": 3})
    run(tiny_policy, world, tokenizer, tmp_path, config, max_mib=0.001)
    assert kept_in(tmp_path) == []
    assert capsys.readouterr().out.count("rollouts from step 1 on are left out: those before take 0.0 of") == 1
    assert what_was_kept(rows_of(tmp_path)) == "0 of 24 in 0.0 MiB"


def test_greedy_answers_have_a_log_ratio_and_no_kl(tiny_policy, world, tokenizer, tmp_path):
    config = VALIDATED.model_copy(update={"eval_greedy": True, "num_steps": 2})
    metrics, rollouts = run(tiny_policy, world, tokenizer, tmp_path, config)
    assert "eval/kl" not in metrics
    assert "eval/log_ratio" in metrics
    assert {sampling.temperature for _, prompts, sampling in rollouts.asked if len(prompts) == 5} == {0.0}


def test_without_validation_few_prompts_are_answered_at_the_start_in_the_middle_and_at_the_end(
    tiny_policy, world, tokenizer, tmp_path
):
    run(tiny_policy, world, tokenizer, tmp_path, VALIDATED.model_copy(update={"eval_every": 0}))
    assert [kept.updates for kept in read_samples(str(tmp_path))] == [0, 2, 4]
    assert [len(kept.samples) for kept in read_samples(str(tmp_path))] == [8, 8, 8]
    assert validations(rows_of(tmp_path)) == []
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 3]


def test_validation_without_a_held_out_prompt_is_refused():
    with pytest.raises(DataError, match=r"eval_every = 1 answers held-out prompts, and there are none.*eval_every=0"):
        ValidationPlan.of(VALIDATED, [], seed=0)


def test_the_best_by_validation_needs_a_validation():
    with pytest.raises(ValueError, match=r"keep_best = eval/reward .* but eval_every = 0 validates none; set eval_ev"):
        AlignmentConfig(keep_best="eval/reward")
    AlignmentConfig(keep_best="eval/reward", eval_every=10)
