"""Answers to benchmark prompts, best of n by the reward model."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import BenchmarkConfig
from pipeline.data.batching import stable_seed
from pipeline.ports import RewardScorer, RolloutSource
from pipeline.records import Answer, Prompt, SamplingParams


def answer_prompts(
    rollouts: RolloutSource,
    scorer: RewardScorer,
    prompts: Sequence[Prompt],
    config: BenchmarkConfig,
    *,
    generator: str,
    seed: int,
) -> list[Answer]:
    """One answer per prompt: the best of `config.best_of` samples by reward.

    The engines must hold the policy already. With `best_of` 1 nothing is selected, only scored.
    """
    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=1.0,
        max_response_tokens=config.max_response_tokens,
        samples_per_prompt=config.best_of,
        seed=stable_seed("benchmark", seed),
    )
    samples = rollouts.generate(prompts, sampling)
    scores = scorer.score([s.prompt.messages for s in samples], [s.response_text for s in samples])
    answers = []
    for n, prompt in enumerate(prompts):
        candidates = range(n * config.best_of, (n + 1) * config.best_of)
        best = max(candidates, key=lambda i: scores[i].mean)
        answers.append(
            Answer(
                prompt_id=prompt.id,
                instruction=prompt.messages[-1]["content"],
                output=samples[best].response_text,
                generator=generator,
                score=scores[best],
            )
        )
    return answers
