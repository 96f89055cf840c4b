"""A trained reward model in this process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.config.cluster import ScoringConfig
from pipeline.data.prompts import parse_messages
from pipeline.errors import DataError, NumericsError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.checkpoint_files import check_reward_model, find_reward_model
from pipeline.records import Message, RewardScore
from pipeline.serving.answers import compare_answer, explained_reward
from pipeline.serving.client import Client
from pipeline.serving.protocol import CompareAnswer, ModelDescription
from pipeline.serving.scoring_service import describe_model
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.stages.runner import installed_versions
from vrm.score_table import ScoreTable

PromptInput = str | Sequence[Message]
"""The text of one user, or every turn before the response of the assistant."""


class TrainedRewardModel:
    """A reward model that scores and compares. Its numbers are those of the scoring service for the same checkpoint."""

    def __init__(self, scorer: RewardModelScorer, description: ModelDescription, directory: str) -> None:
        self._scorer = scorer
        self.description = description
        """Objectives, calibration and held-out metrics, as `GET /v1/model` answers them."""
        self.directory = directory
        """The checkpoint."""

    def score(self, prompt: PromptInput, responses: str | Sequence[str]) -> ScoreTable:
        """Scores the responses to one prompt.

        Args:
            prompt: a text, or messages `{"role": ..., "content": ...}`.
            responses: N texts, or one.

        Returns:
            N rows in the order of the responses. Rewards have no zero: only differences between responses to one prompt
            mean something. One unit is one unit of log-odds, before calibration.

        Raises:
            DataError: no prompt, no response, a response that is no text, or turns that the chat template refuses.
            NumericsError: a reward is not finite.
        """
        texts = [responses] if isinstance(responses, str) else list(responses)
        return self.score_rows([prompt] * len(texts), texts)

    def score_rows(self, prompts: Sequence[PromptInput], responses: Sequence[str]) -> ScoreTable:
        """Scores one response to each of N prompts. Raises as `score` does, or where there are not N of both."""
        if len(prompts) != len(responses) or not responses:
            raise DataError(f"{len(prompts)} prompts and {len(responses)} responses: give one prompt for each response")
        conversations = [
            parse_messages(prompt, place="the prompt" if len(prompts) == 1 else f"prompts[{i}]")
            for i, prompt in enumerate(prompts)
        ]
        return ScoreTable(
            prompts=tuple(messages[-1]["content"] for messages in conversations),
            responses=tuple(responses),
            scores=tuple(explained_reward(self.description, s) for s in self._scores(conversations, responses)),
            verified_objectives=tuple(self.description.verified_objectives),
        )

    def compare(self, prompt: PromptInput, a: str, b: str) -> CompareAnswer:
        """P(a > b), whether the model is confident of it, and the verified objective that decided, if one did.

        Raises:
            DataError, NumericsError: as `score`.
        """
        messages = parse_messages(prompt, place="the prompt")
        return compare_answer(self.description, *self._scores([messages] * 2, [a, b]))

    def _scores(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        for response in responses:
            if not isinstance(response, str):
                raise DataError(f"response {response!r:.80} is no text; give the text of the assistant's turn")
        scores = self._scorer.score(prompts, responses)
        for response, score in zip(responses, scores, strict=True):
            if not (math.isfinite(score.mean) and math.isfinite(score.std)):
                raise NumericsError(
                    f"the reward of {response!r:.80} is {score.mean} with a standard deviation of {score.std}. The "
                    f"weights in {self.directory} hold numbers that are not finite: train again."
                )
        return scores

    def __repr__(self) -> str:
        model = self.description
        return f"<{model.head} reward model {model.model_fingerprint[:12]}: {', '.join(model.objectives)}>"


def load_reward_model(
    directory: str | Path, *, device: str | None = None, max_tokens_per_batch: int | None = None
) -> TrainedRewardModel:
    """Loads a checkpoint.

    Args:
        directory: a result of train_reward_model, a directory or a URI; or a workspace, whose newest finished reward
            model is taken.
        device: None is "cuda" where there is one, else "cpu". A GPU computes in bfloat16, a CPU in float32.
        max_tokens_per_batch: bounds the memory of a forward pass and changes no score; None is the default of the
            scoring service.

    Raises:
        CheckpointError: there is no reward model, or its files are missing, cut short, or do not belong together.
    """
    uri = find_reward_model(str(directory))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    config = ScoringConfig()
    with storage.reading(uri) as local:
        check_reward_model(local)
        scorer = RewardModelScorer.load(
            local, max_tokens_per_batch=max_tokens_per_batch or config.max_tokens_per_batch, device=device
        )
        fingerprint = directory_fingerprint(local)
    return TrainedRewardModel(scorer, describe_model(scorer.card, config, fingerprint, installed_versions()), uri)


def compare(
    reward_model: str | Path | TrainedRewardModel | Client, prompt: PromptInput, a: str, b: str
) -> CompareAnswer:
    """Compares two responses to one prompt.

    Args:
        reward_model: a directory, which is loaded for this call alone; or a loaded model, or the client of a service.

    Raises what `load_reward_model` and the model's `compare` raise.
    """
    model = load_reward_model(reward_model) if isinstance(reward_model, str | Path) else reward_model
    return model.compare(prompt, a, b)
