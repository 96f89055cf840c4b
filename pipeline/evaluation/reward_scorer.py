"""Scores texts with a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import DataError
from pipeline.evaluation.conversation_tokens import ConversationEncoder, packed_batches
from pipeline.models.reward_heads import RewardOutput
from pipeline.models.reward_model import RewardModel, load_reward_model, score_packed
from pipeline.models.reward_model_card import RewardModelCard
from pipeline.objectives.reweighting import Factors, reweighted
from pipeline.records import Message, RewardScore


class RewardModelScorer:
    """Implements `RewardScorer` in one process. A score does not depend on the other rows of its batch."""

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
        self._encode = ConversationEncoder(tokenizer=tokenizer, max_length=card.max_length)
        self._max_tokens = max_tokens_per_batch
        self._device = device

    @classmethod
    def load(cls, directory: str, *, max_tokens_per_batch: int, device: str = "cpu") -> RewardModelScorer:
        """Loads a checkpoint directory, with a bfloat16 backbone on a GPU and float32 on a CPU."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model, tokenizer, card = load_reward_model(directory, dtype=dtype)
        return cls(model, tokenizer, card, max_tokens_per_batch=max_tokens_per_batch, device=device)

    def score(
        self,
        prompts: Sequence[tuple[Message, ...]],
        responses: Sequence[str],
        factors: Sequence[Factors | None] | None = None,
    ) -> list[RewardScore]:
        """Posterior mean and standard deviation of each reward, with weights and scores (docs/method.md section 7).

        What exceeds the model's length is cut as `ConversationEncoder` says.

        Args:
            factors: of each row's objective weights (`reweighted`); None for the model's own.

        Raises:
            DataError: not one prompt a response; or factors for a model that learns no objective weights.
        """
        encoded = self._encode(prompts, responses)
        scores: dict[int, RewardScore] = {}
        for rows, packed in packed_batches(encoded, max_tokens=self._max_tokens):
            output = score_packed(self._model, packed.to(self._device))
            if factors is not None:
                output = self._steered(output, [factors[row] for row in rows])
            scores |= zip(rows, reward_scores(output, temperature=self.card.calibration.temperature), strict=True)
        return [scores[row] for row in range(len(encoded))]

    def _steered(self, output: RewardOutput, factors: Sequence[Factors | None]) -> RewardOutput:
        """The output with other objective weights, and all that follows from them; rows without factors as they are."""
        chosen = [row for row, given in enumerate(factors) if given is not None]
        if not chosen:
            return output
        inputs = output.last_layer_inputs
        if not inputs.weights.shape[1] or not inputs.scores.shape[1]:
            raise DataError(
                f"this reward model has no objective weights of its own to re-weigh (head {self.card.head!r}, decoder "
                f"{self.card.vrm.decoder!r}). Leave `weights` out, or take a vrm model with the bilinear decoder."
            )
        table = torch.tensor([factors[row] for row in chosen], dtype=torch.float32, device=self._device)
        weights = output.weights.clone()
        weights[chosen] = reweighted(weights[chosen], table)
        mean, deviations = output.mean.clone(), output.deviations.clone()
        mean[chosen] = (weights * output.scores)[chosen].sum(-1)
        # The gradient of the re-weighted reward has the same form: the factors only shift the logits of the weights.
        error_bar = self._model.head.last_layer(inputs._replace(weights=weights))
        deviations[chosen] = error_bar.deviations[chosen]
        return output._replace(weights=weights, mean=mean, deviations=deviations)

    def fits(self, prompt: tuple[Message, ...], response: str) -> bool:
        """Whether prompt and response fit in the model's length, so that `score` cuts neither."""
        return self._encode.fits(prompt, response)


def reward_scores(output: RewardOutput, *, temperature: float) -> list[RewardScore]:
    """The N rows of a head's output as plain numbers."""
    columns = (output.weights, output.scores, output.deviations)
    stds = output.deviations.norm(dim=-1)
    return [
        RewardScore(
            mean=mean,
            std=std,
            objective_weights=tuple(weights),
            objective_scores=tuple(scores),
            concentration=concentration,
            deviations=tuple(deviations),
            temperature=temperature,
        )
        for mean, std, concentration, weights, scores, deviations in zip(
            *(c.tolist() for c in (output.mean, stds, output.alpha.sum(-1), *columns)), strict=True
        )
    ]
