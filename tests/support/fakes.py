"""Stand-ins for the outside world: pure functions of their arguments, so that runs can be compared bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline.columns import Rollouts
from pipeline.data.batching import stable_seed
from pipeline.data.chat import decode_response
from pipeline.records import Message, Metrics, PolicyWeights, Prompt, RewardScore, Rollout, SamplingParams


class FakeRollouts:
    """Draws random tokens; the policy only decides the version and, through its weights' checksum, the draw."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.loaded: list[int] = []
        self.prompts_seen: list[str] = []
        self._checksum = 0.0
        self._begun = Rollouts.of([])

    def sleep(self) -> None:
        """Has no GPU to leave."""

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        from safetensors.torch import load_file

        state = load_file(f"{weights.location}/model.safetensors")
        self._checksum = sum(tensor.double().sum().item() for tensor in state.values())
        self.loaded.append(weights.version)
        return {"gate/mean": 0.0, "gate/max": 0.0}

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Rollouts:
        rollouts = []
        for prompt in prompts:
            self.prompts_seen.append(prompt.id)
            for i in range(sampling.samples_per_prompt):
                rng = np.random.default_rng(stable_seed(sampling.seed, prompt.id, i, repr(self._checksum)))
                length = int(rng.integers(2, sampling.max_response_tokens))
                tokens = (*(int(t) for t in rng.integers(10, 100, size=length)), self.tokenizer.eos_token_id)
                rollouts.append(
                    Rollout(
                        prompt=prompt,
                        sample_index=i,
                        response_ids=tokens,
                        response_text=decode_response(self.tokenizer, tokens),
                        logprobs=(-4.0,) * len(tokens),
                        policy_version=self.loaded[-1],
                        finish_reason="stop",
                    )
                )
        return Rollouts.of(rollouts)

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, resample_unfinished: bool) -> None:
        """As if sampling ended before the next weights came."""
        self._begun = self.generate(prompts, sampling)

    def collect(self) -> Rollouts:
        return self._begun

    def stream(self, waiting: deque[tuple[Prompt, SamplingParams]]) -> Iterator[Rollout]:
        while waiting:
            prompt, sampling = waiting.popleft()
            yield from self.generate([prompt], sampling)


class FakeScorer:
    """Likes the letter e."""

    def score(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        return [
            RewardScore(mean=text.count("e") / 10, std=0.1, objective_weights=(), objective_scores=())
            for text in responses
        ]
