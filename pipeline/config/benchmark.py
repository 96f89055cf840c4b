"""Answers of the base and the aligned policy, and their win rate."""

from __future__ import annotations

from pydantic import model_validator

from pipeline.config.base import Count, Frozen, NonNegative


class BenchmarkConfig(Frozen):
    """Answers of the base and the aligned policy on held-out prompts, and their win rate."""

    prompts: tuple[str, ...] = ()
    """Prompt files; empty uses the held-out prompts of the data source."""
    num_prompts: Count = 128
    """Prompts that are drawn, at most."""
    max_prompt_tokens: Count = 1024
    """Longest prompt, in tokens. Longer ones are left out and counted."""
    max_response_tokens: Count = 1024
    """Longest answer, in tokens, at which generation ends."""
    temperature: NonNegative = 0.0
    """Divides the logits; 0 is greedy."""
    best_of: Count = 1
    """Responses sampled to a prompt, of which the reward model keeps the best; 1 samples one."""
    keep_thoughts: bool = False
    """Answers keep their `<think>` blocks. The reward model never reads them."""

    @model_validator(mode="after")
    def _the_best_is_one_of_many(self) -> BenchmarkConfig:
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError(
                f"best_of = {self.best_of} at temperature = 0 samples the same answer so many times; set "
                "temperature=1, or best_of=1"
            )
        return self
