"""The trained reward model as a function of text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.data.batching import plan_micro_batches
from pipeline.data.chat import encode_prompt, encode_response, fit_prompt, strip_thinking
from pipeline.data.collate import pad_right
from pipeline.errors import DataError
from pipeline.models.reward_model import RewardModel, RewardModelCard, load_reward_model, score_rows
from pipeline.records import Message, RewardScore


class RewardModelScorer:
    """Implements `RewardScorer` in one process. A score does not depend on what shared its batch."""

    def __init__(
        self,
        model: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        card: RewardModelCard,
        *,
        max_tokens_per_batch: int,
        device: str = "cpu",
    ) -> None:
        self.card = card
        self._model = model.to(device)
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens_per_batch
        self._device = device

    @classmethod
    def load(cls, directory: str, *, max_tokens_per_batch: int, device: str = "cpu") -> RewardModelScorer:
        """From a checkpoint directory; bfloat16 backbone on a GPU, float32 on a CPU."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model, tokenizer, card = load_reward_model(directory, dtype=dtype)
        return cls(model, tokenizer, card, max_tokens_per_batch=max_tokens_per_batch, device=device)

    def score(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        """Posterior mean and standard deviation of each reward, with its reasons (vrm_spec section 8).

        Prompts are cut from the left when prompt and response exceed the model's length; an over-long response is cut
        at its end. Either way the end-of-turn token is scored, or truncation would become a feature.
        """
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts but {len(responses)} responses to score")
        rows = [self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        lengths = [len(prompt) + len(response) for prompt, response in rows]
        scores: list[RewardScore | None] = [None] * len(rows)
        if not rows:
            return []
        for batch in plan_micro_batches(lengths, world_size=1, max_tokens=self._max_tokens)[0]:
            output = score_rows(
                self._model,
                pad_right([rows[i][0] + rows[i][1] for i in batch], self._tokenizer.pad_token_id).to(self._device),
                torch.tensor([lengths[i] for i in batch], device=self._device),
                torch.tensor([len(rows[i][0]) for i in batch], device=self._device),
            )
            total = output.alpha.sum(-1)
            weights = output.alpha / total.unsqueeze(-1)
            columns = (output.mean, output.variance.sqrt(), weights, output.scores, total)
            for i, mean, std, weight, score, concentration in zip(batch, *(c.tolist() for c in columns), strict=True):
                scores[i] = RewardScore(
                    mean=mean,
                    std=std,
                    objective_weights=tuple(weight),
                    objective_scores=tuple(score),
                    concentration=concentration,
                )
        return [score for score in scores if score is not None]

    def _encode(self, prompt: tuple[Message, ...], response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        response_ids = encode_response(self._tokenizer, strip_thinking(response))
        if len(response_ids) >= self.card.max_length:
            response_ids = (*response_ids[: self.card.max_length - 2], response_ids[-1])
        prompt_ids = fit_prompt(encode_prompt(self._tokenizer, prompt), response_ids, self.card.max_length)
        return prompt_ids, response_ids
