"""The rollouts of each step: sampled when the learner asks for them, or one step ahead of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.alignment import AlignmentConfig
from pipeline.data.batching import stable_seed
from pipeline.data.prompts import PromptStream
from pipeline.errors import StaleEngineError
from pipeline.ports import BackgroundRolloutSource, RolloutSource
from pipeline.records import Metrics, Prompt, SamplingParams

if TYPE_CHECKING:
    from pipeline.columns import Rollouts

LEAST_GAIN = 0.05
"""Share of a step's seconds; prefetch that saves less has no effect."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What to sample in each step: a pure function of (seed of the prompts, step)."""

    prompts: PromptStream
    config: AlignmentConfig

    def batch(self, step: int) -> tuple[list[Prompt], SamplingParams]:
        """The prompts of a step, and how to sample from them."""
        config = self.config
        sampling = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_response_tokens=config.max_response_tokens,
            samples_per_prompt=config.samples_per_prompt,
            seed=stable_seed("step", self.prompts.seed, step),
        )
        return self.prompts.batch(step, config.prompts_per_step), sampling


class OnPolicyRollouts:
    """Samples a step when the learner asks for it, from the policy of that step."""

    def __init__(self, source: RolloutSource, plan: StepPlan) -> None:
        self._source = source
        self._plan = plan

    def collect(self, step: int) -> tuple[Rollouts, Metrics]:
        """The rollouts of a step, and `staleness` of them."""
        samples = self._source.generate(*self._plan.batch(step))
        return samples, staleness(samples, step, at_most=0)

    def sample_ahead(self, step: int) -> None:
        """Does nothing: `step` is sampled when the learner asks for it."""


class PrefetchingRollouts:
    """Samples step n + 1 while the learner scores, evaluates and updates on step n: one step off-policy.

    Step n + 1 begins under policy version n and is collected under version n + 1, so a sample is never more than one
    update old. The first step after a start or a resume is on policy, because no step before it sampled for it. Its
    prompts are the same as without prefetch.

    Source: Noukhovitch et al. 2024, arXiv:2410.18252 (one step off-policy); the importance weights of
    `truncated_importance_weights` correct for it. Responses that the next policy continues are Fu et al.'s
    interruptible generation (2025, arXiv:2505.24298), Piché et al.'s in-flight updates (2025, arXiv:2509.19128).
    """

    def __init__(self, source: BackgroundRolloutSource, plan: StepPlan) -> None:
        self._source = source
        self._plan = plan
        self._prefetched_step: int | None = None

    def collect(self, step: int) -> tuple[Rollouts, Metrics]:
        """The rollouts of a step, and `staleness` of them. Until `sample_ahead` the source samples nothing else."""
        samples = (
            self._source.collect() if self._prefetched_step == step else self._source.generate(*self._plan.batch(step))
        )
        return samples, staleness(samples, step, at_most=1)

    def sample_ahead(self, step: int) -> None:
        """Starts to sample `step`, unless the run ends before it, and returns at once."""
        config = self._plan.config
        if step < config.num_steps:
            self._source.begin(*self._plan.batch(step), resample_unfinished=config.prefetch == "discard")
            self._prefetched_step = step


def rollouts_by_step(source: BackgroundRolloutSource, plan: StepPlan) -> OnPolicyRollouts | PrefetchingRollouts:
    """The rollouts of each step, on policy or one step ahead, as `alignment.prefetch` of the recipe says."""
    return OnPolicyRollouts(source, plan) if plan.config.prefetch is None else PrefetchingRollouts(source, plan)


def remark_on_prefetch(step: Metrics) -> str:
    """What to tell where sampling ahead saved next to nothing; empty where it did, or where nothing was ahead.

    Args:
        step: metrics of a step, with the seconds of its phases and who waited for whom.
    """
    if "rollout/seconds" not in step:
        return ""
    sampling_s, waited_s = step["rollout/seconds"], step["rollout/learner_wait_s"]
    step_s = sum(seconds for name, seconds in step.items() if name.startswith("seconds/"))
    if sampling_s - waited_s >= LEAST_GAIN * step_s:
        return ""
    return (
        f"alignment.prefetch has no effect: of {sampling_s:.1f} s of sampling the learner waited {waited_s:.1f} s, "
        f"in a step of {step_s:.1f} s. alignment.prefetch=null takes as long, and samples from the current policy."
    )


def staleness(samples: Rollouts, step: int, *, at_most: int) -> Metrics:
    """Updates between the policy that sampled and the policy of `step`, mean and largest over the responses.

    Raises:
        StaleEngineError: a sample is older than `at_most` updates, or newer than the step.
    """
    updates_since = [step - version for version in samples.policy_versions]
    if not 0 <= min(updates_since) <= max(updates_since) <= at_most:
        versions = sorted({*samples.policy_versions})
        raise StaleEngineError(
            f"step {step} trains policy version {step}, but was given samples of versions {versions}; at most "
            f"{at_most} update(s) may lie between them. Nothing was trained on these samples. Restart the job."
        )
    return {
        "rollout/staleness_mean": sum(updates_since) / len(updates_since),
        "rollout/staleness_max": float(max(updates_since)),
    }
