"""Which responses to sample, and with which seeds: fixed before anyone knows how many workers there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.batching import stable_seed
from pipeline.errors import DataError
from pipeline.records import Prompt, SamplingParams


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """One response to sample."""

    prompt: Prompt
    sample_index: int
    seed: int
    """62 bits: a function of (sampling seed, prompt id, which sample of this prompt), and of nothing else."""


def rollout_requests(prompts: Sequence[Prompt], sampling: SamplingParams) -> list[RolloutRequest]:
    """`samples_per_prompt` requests per prompt, ordered by (prompt, sample).

    A prompt may occur twice in one batch, where one epoch ends and the next begins. The second occurrence continues the
    count of samples, so it is no copy of the first.
    """
    n = sampling.samples_per_prompt
    occurrences: Counter[str] = Counter()
    requests = []
    for prompt in prompts:
        first = occurrences[prompt.id] * n
        occurrences[prompt.id] += 1
        requests += [
            RolloutRequest(
                prompt=prompt, sample_index=i, seed=stable_seed("sample", sampling.seed, prompt.id, first + i)
            )
            for i in range(n)
        ]
    return requests


def require_room(prompts: Sequence[Prompt], sampling: SamplingParams, max_model_len: int) -> None:
    """Raises DataError for a prompt whose longest allowed response does not fit the engine's context."""
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    needed = len(longest.token_ids) + sampling.max_response_tokens
    if needed > max_model_len:
        raise DataError(
            f"prompt {longest.id!r} has {len(longest.token_ids)} tokens; with {sampling.max_response_tokens} response "
            f"tokens it needs {needed}, and the rollout engines hold {max_model_len}. Shorten or drop it "
            "(max_prompt_tokens), or lower max_response_tokens."
        )
