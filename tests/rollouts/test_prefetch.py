"""Sampling one step ahead: the same prompts, at most one update old, weighed for it."""

import contextlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.config.alignment import AlignmentConfig
from pipeline.data.prompts import PromptStream
from pipeline.errors import StaleEngineError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.alignment import align
from pipeline.rollouts.prefetch import remark_on_prefetch, staleness
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.learners import ALIGNMENT, ppo_learner, prompts_of
from tests.support.rewards import rewards_of

CAP = 2.0
PLAIN = AlignmentConfig.model_validate(
    ALIGNMENT.model_dump(exclude={"ppo"}) | {"ppo": ALIGNMENT.ppo.model_dump() | {"tis_cap": CAP}}
)
AHEAD = PLAIN.model_copy(update={"prefetch": "continue"})


class Killed(BaseException):
    """Stands for kill -9."""


class HonestRollouts(FakeRollouts):
    """Says of every token what the policy that it holds says."""

    def __init__(self, tokenizer, tiny_policy):
        super().__init__(tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(tiny_policy).eval()

    def load_weights(self, weights):
        self.model.load_state_dict(load_file(f"{weights.location}/model.safetensors"), strict=False)
        return super().load_weights(weights)

    def generate(self, prompts, sampling):
        rollouts = super().generate(prompts, sampling)
        said = torch.cat([logprobs_of(self.model, rollout) for rollout in rollouts])
        return replace(rollouts, logprobs=replace(rollouts.logprobs, values=said))


def logprobs_of(model, rollout):
    tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    first = len(rollout.prompt.token_ids)
    with torch.no_grad():
        logprobs = model(tokens).logits[0, first - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, tokens[0, first:, None]).squeeze(-1)


def run(tiny_policy, world, tokenizer, path, config, *, kill_in_update=None):
    """Returns what was trained on: (step, samples, experience) of every update that ended."""
    learner = ppo_learner(tiny_policy, world, tokenizer, path / "published", config=config)
    rollouts = HonestRollouts(tokenizer, tiny_policy)
    evaluate, update = learner.evaluate, learner.update
    evaluated, trained = [], []

    def recording_evaluate(samples):
        evaluated.append(samples)
        return evaluate(samples)

    def recording_update(experience, step):
        if step == kill_in_update:
            raise Killed
        trained.append((step, evaluated[-1], experience))
        return update(experience, step)

    learner.evaluate, learner.update = recording_evaluate, recording_update
    stage = StageDirectory(str(path), "align_policy", "0" * 64)
    with contextlib.suppress(Killed):
        align(
            rollouts,
            rewards_of(FakeScorer()),
            learner,
            PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
            stage,
            config,
            reward_scale=RewardScale(mean=0.0, std=1.0),
        )
    return trained, stage


def consumed(trained):
    return [(step, [(s.prompt.id, s.sample_index) for s in samples]) for step, samples, _ in trained]


def distance_from_one(experience):
    return (experience.importance_weights - 1.0).abs().max()


def test_a_prefetched_run_consumes_the_prompts_of_the_plain_one_and_weighs_each_sample_for_its_policy(
    tiny_policy, world, tokenizer, tmp_path
):
    plain, _ = run(tiny_policy, world, tokenizer, tmp_path / "plain", PLAIN)
    ahead, _ = run(tiny_policy, world, tokenizer, tmp_path / "ahead", AHEAD)

    assert consumed(ahead) == consumed(plain)
    assert [{s.policy_version for s in samples} for _, samples, _ in plain] == [{0}, {1}, {2}, {3}, {4}, {5}]
    assert [{s.policy_version for s in samples} for _, samples, _ in ahead] == [{0}, {0}, {1}, {2}, {3}, {4}]
    rows = read_metrics(tmp_path / "ahead" / METRICS_FILE)
    assert [row["rollout/staleness_max"] for row in rows] == [0, 1, 1, 1, 1, 1]
    assert [row["rollout/staleness_mean"] for row in rows] == [0, 1, 1, 1, 1, 1]

    for _, samples, experience in ahead:
        for row, sample in enumerate(samples):
            own = slice(*experience.offsets[row : row + 2].tolist())
            # The learner's own policy of this step, over the engine's policy that sampled.
            expected = (experience.logprobs[own] - torch.tensor(sample.logprobs)).exp().clamp(max=CAP)
            torch.testing.assert_close(experience.importance_weights[own], expected)
    assert all(distance_from_one(experience) < 1e-4 for _, _, experience in plain)
    assert distance_from_one(ahead[0][2]) < 1e-4
    assert all(distance_from_one(experience) > 1e-3 for _, _, experience in ahead[1:])


@pytest.mark.parametrize("killed_in", [1, 4])
def test_a_killed_prefetched_run_trains_on_every_prompt_once(killed_in, tiny_policy, world, tokenizer, tmp_path):
    whole, _ = run(tiny_policy, world, tokenizer, tmp_path / "whole", AHEAD)
    before, stage = run(tiny_policy, world, tokenizer, tmp_path / "killed", AHEAD, kill_in_update=killed_in)
    committed = stage.checkpoints.latest()
    first = 0 if committed is None else committed.step + 1
    after, _ = run(tiny_policy, world, tokenizer, tmp_path / "killed", AHEAD)

    assert after[0][0] == first
    assert consumed(before)[:first] + consumed(after) == consumed(whole)
    assert {s.policy_version for s in after[0][1]} == {first}  # nothing to hide behind: on policy


@pytest.mark.parametrize(
    ("sampling_s", "waited_s", "has_effect"), [(6.0, 0.5, True), (6.0, 5.8, False), (0.3, 0.0, False)]
)
def test_prefetch_that_saves_next_to_nothing_is_said(sampling_s, waited_s, has_effect):
    step = {
        "rollout/seconds": sampling_s,
        "rollout/learner_wait_s": waited_s,
        "seconds/rollout": waited_s,
        "seconds/update": 10.0,
    }
    remark = remark_on_prefetch(step)
    assert (remark == "") == has_effect
    if not has_effect:
        assert f"of {sampling_s:.1f} s of sampling the learner waited {waited_s:.1f} s" in remark
    assert remark_on_prefetch({"seconds/update": 10.0}) == ""


def test_samples_older_than_allowed_are_refused(tiny_policy, world, tokenizer, tmp_path):
    trained, _ = run(tiny_policy, world, tokenizer, tmp_path, AHEAD.model_copy(update={"num_steps": 2}))
    samples = trained[1][1]  # version 0, trained on in step 1
    assert staleness(samples, 1, at_most=1) == {"rollout/staleness_mean": 1.0, "rollout/staleness_max": 1.0}
    with pytest.raises(StaleEngineError, match=r"step 1 trains policy version 1, but .* versions \[0\]; at most 0 upd"):
        staleness(samples, 1, at_most=0)
    with pytest.raises(StaleEngineError, match="step 2 trains policy version 2"):
        staleness(samples, 2, at_most=1)
