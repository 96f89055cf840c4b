"""Held-out prompts, answered by the policy while it is trained. Nothing is trained on the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.columns import Rollouts
from pipeline.config.alignment import AlignmentConfig
from pipeline.data.batching import stable_seed
from pipeline.errors import DataError
from pipeline.evaluation.overoptimization import GoldReward
from pipeline.learning.validation_metrics import UPDATES, validation_metrics
from pipeline.loops.alignment_run import AlignmentRun
from pipeline.ports import PolicyLearner, RewardSources, RolloutSource
from pipeline.records import Metrics, Prompt, SamplingParams
from pipeline.rollouts.kept_samples import NUM_PROMPTS, SamplesOverTime


@dataclass(frozen=True, kw_only=True)
class ValidationPlan:
    """Which held-out prompts are answered, how, and by the policies after how many updates."""

    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    updates: frozenset[int]
    """Numbers of updates; that of the finished policy is among them."""
    measures: bool
    """Whether the answers are measured. Otherwise they are only shown in the report."""
    is_greedy: bool

    @classmethod
    def of(cls, config: AlignmentConfig, heldout: Sequence[Prompt], *, seed: int) -> ValidationPlan:
        """`eval_prompts` prompts every `eval_every` steps; without that, a few at the start, in the middle, at the end.

        The policy before the last update is left out: the finished one is measured instead.

        Args:
            heldout: prompts that are never trained on.
            seed: of the run.

        Raises:
            DataError: there is no held-out prompt to validate on.
        """
        if config.eval_every and not heldout:
            raise DataError(
                f"alignment.eval_every = {config.eval_every} answers held-out prompts, and there are none: none of "
                f"them fits in alignment.max_prompt_tokens = {config.max_prompt_tokens}. Raise it or "
                "data.heldout_fraction, or set alignment.eval_every=0."
            )
        n = config.num_steps
        every = config.eval_every
        steps = {0, *(step for step in range(0, n - 1, every))} if every else {0, n // 2}
        return cls(
            prompts=drawn_from_the_end(heldout, config.eval_prompts if every else NUM_PROMPTS, seed),
            sampling=SamplingParams(
                temperature=0.0 if config.eval_greedy else config.temperature,
                top_p=1.0 if config.eval_greedy else config.top_p,
                max_response_tokens=config.max_response_tokens,
                samples_per_prompt=1,
                # Of its own, and the same each time: two policies then differ by more than by luck.
                seed=stable_seed("validation", seed),
            ),
            updates=frozenset({*steps, n}),
            measures=every > 0,
            is_greedy=config.eval_greedy,
        )


def drawn_from_the_end(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[Prompt, ...]:
    """At most `count` of the prompts. The benchmark draws from the beginning of the same permutation.

    So the two share no prompt, as long as there are enough of them: `keep_best` may then choose by the one, and the
    other still judges it on prompts that chose nothing.
    """
    order = np.random.default_rng([seed, len(prompts)]).permutation(len(prompts))
    return tuple(prompts[i] for i in order[::-1][:count])


class Validation:
    """Answers the prompts of a plan with the engines, the scorer and the learner of the training.

    It samples while the engines hold the policy and nothing else is sampled, with seeds of its own. Scorer and learner
    only read. So a training is the same with it and without it.
    """

    def __init__(
        self,
        plan: ValidationPlan,
        rollouts: RolloutSource,
        rewards: RewardSources,
        learner: PolicyLearner[Any, Any],
        samples: SamplesOverTime,
        *,
        objectives: Sequence[str],
        gold: GoldReward | None,
    ) -> None:
        self._plan = plan
        self._rollouts = rollouts
        self._rewards = rewards
        self._learner = learner
        self._samples = samples
        self._objectives = objectives
        self._gold = gold

    def resume(self, run: AlignmentRun) -> None:
        """Forgets the answers of policies that the run trains again."""
        self._samples.forget_after(run.first_step)

    def answers(self, run: AlignmentRun, updates: int) -> Rollouts | None:
        """Answers of the policy after so many updates, which the engines hold; none where it is not its turn.

        Within `given_up_if_preempted`: waits for the engines, which must have nothing else to sample.
        """
        if not self._is_due(run, updates):
            return None
        with run.waiting("validation"):
            return self._rollouts.generate(self._plan.prompts, self._plan.sampling)

    def measure(self, run: AlignmentRun, updates: int, answers: Rollouts | None) -> Metrics:
        """`eval/*` of the answers, which the run is told; empty where nothing is measured.

        A policy that a run resumes with may have been measured before: then these metrics.
        """
        if answers is None:
            return run.known_validation(updates)
        with run.reading("validation"):
            scored = self._rewards.score(answers)
            rows = [row for row, score in enumerate(scored.scores) if score is not None]
            answers, scores = (
                answers.select(torch.tensor(rows)),
                [score for score in scored.scores if score is not None],
            )
            conversations, texts = answers.conversations, answers.response_texts
            metrics: Metrics = {}
            if self._plan.measures:
                _, evaluations = self._learner.evaluate(answers)
                metrics = validation_metrics(
                    answers,
                    scores,
                    evaluations,
                    objectives=self._objectives,
                    gold=None if self._gold is None else self._gold.rewards(conversations, texts),
                    is_greedy=self._plan.is_greedy,
                    seed=self._plan.sampling.seed,
                )
                metrics |= {UPDATES: float(updates), "eval/dropped": scored.metrics["reward/dropped"]}
            self._samples.add(updates, answers, scores)
        if metrics:
            run.take_validation(updates, metrics)
        return metrics

    def _is_due(self, run: AlignmentRun, updates: int) -> bool:
        is_done = self._samples.holds(updates) and updates == run.first_step
        if self._plan.measures:
            is_done = is_done and bool(run.known_validation(updates))
        return updates in self._plan.updates and not is_done
