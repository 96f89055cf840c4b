"""Scores texts with the reward that a policy implies (docs/method.md section 16)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.chat_rendering import require_chat_template
from pipeline.errors import ConfigError
from pipeline.evaluation.conversation_tokens import ConversationEncoder, packed_batches
from pipeline.models.backbone import differing_tokens, load_causal_lm, load_config, load_tokenizer
from pipeline.models.critic import Policy
from pipeline.models.packing import PackedTokens
from pipeline.objectives.implicit_rewards import ImplicitForm, implicit_rewards
from pipeline.records import Message, RewardScore


class ImplicitRewardScorer:
    """Implements `RewardScorer` in one process. A score does not depend on the other rows of its batch."""

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        form: ImplicitForm,
        *,
        beta: float,
        max_tokens_per_batch: int,
        device: str = "cpu",
    ) -> None:
        self._form = form
        self._beta = beta
        self._policy = Policy(policy).to(device).eval()
        self._reference = None if reference is None else Policy(reference).to(device).eval()
        max_length = int(policy.config.max_position_embeddings)
        self._encode = ConversationEncoder(tokenizer=tokenizer, max_length=max_length)
        self._max_tokens = max_tokens_per_batch
        self._device = device

    @classmethod
    def load(
        cls,
        policy: str,
        reference: str | None,
        form: ImplicitForm,
        *,
        beta: float,
        max_tokens_per_batch: int,
        device: str = "cpu",
    ) -> ImplicitRewardScorer:
        """Loads checkpoint directories, in bfloat16 on a GPU and float32 on a CPU; log-probabilities are float32."""
        dtype = "float32" if device == "cpu" else "bfloat16"
        model, tokenizer = load_causal_lm(policy, dtype=dtype)
        other = None if reference is None else load_causal_lm(reference, dtype=dtype)[0]
        return cls(model, other, tokenizer, form, beta=beta, max_tokens_per_batch=max_tokens_per_batch, device=device)

    def score(self, prompts: Sequence[tuple[Message, ...]], responses: Sequence[str]) -> list[RewardScore]:
        """The implicit reward of each response, end token included. It has no posterior and no reasons: std is 0.

        What exceeds the policy's context is cut as `ConversationEncoder` says.
        """
        encoded = self._encode(prompts, responses)
        rewards: dict[int, float] = {}
        for rows, packed in packed_batches(encoded, max_tokens=self._max_tokens):
            rewards |= zip(rows, self._rewards(packed.to(self._device)).tolist(), strict=True)
        return [
            RewardScore(mean=rewards[row], std=0.0, objective_weights=(), objective_scores=())
            for row in range(len(encoded))
        ]

    def fits(self, prompt: tuple[Message, ...], response: str) -> bool:
        """Whether prompt and response fit in the policy's context, so that `score` cuts neither."""
        return self._encode.fits(prompt, response)

    @torch.inference_mode()
    def _rewards(self, packed: PackedTokens) -> torch.Tensor:
        """[R] in the order of `pack`."""
        columns = int(packed.response_lengths.max())
        reference = None if self._reference is None else self._reference(packed, columns, 1.0).sum(-1)
        logprobs = self._policy(packed, columns, 1.0).sum(-1)
        return implicit_rewards(self._form, logprobs, reference, packed.response_lengths, beta=self._beta)


def require_scorable(policy: str, reference: str | None) -> None:
    """Raises before weights are read, where the two checkpoints cannot score a conversation together.

    Raises:
        CheckpointError: a directory holds no causal decoder or no tokenizer.
        ConfigError: the reference reads other tokens than the policy.
        DataError: the policy's tokenizer has no chat template.
    """
    tokenizer = load_tokenizer(policy)
    require_chat_template(tokenizer)
    load_config(policy)
    if reference is None:
        return
    num_rows = int(load_config(reference).vocab_size)
    differing = differing_tokens(tokenizer, load_tokenizer(reference), num_rows=num_rows)
    if differing:
        raise ConfigError(
            f"the reference {reference!r} has another vocabulary: {len(differing):,} of the policy's "
            f"{len(tokenizer):,} tokens are other tokens to it or none ({differing[0]!r}, ...). A log-ratio needs one "
            "vocabulary: give the checkpoint from which the policy was aligned."
        )
