"""Scores texts with the reward that a policy implies (docs/method.md section 16)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.data.batching import plan_micro_batches
from pipeline.data.chat import encode_prompt, encode_response, fit_prompt, strip_thinking
from pipeline.data.chat_rendering import require_chat_template
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.reward_scorer import share_prompts
from pipeline.models.backbone import differing_tokens, load_causal_lm, load_config, load_tokenizer
from pipeline.models.critic import Policy
from pipeline.models.packing import PackedTokens, in_packed_order, pack
from pipeline.objectives.implicit_rewards import ImplicitForm, implicit_rewards
from pipeline.records import Message, PromptGroup, RewardScore


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
        self._tokenizer = tokenizer
        self._max_length = int(policy.config.max_position_embeddings)
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

        If prompt and response exceed the policy's context, the prompt is cut from the left. A response that alone
        exceeds it is cut at its end.
        """
        if len(prompts) != len(responses):
            raise DataError(f"{len(prompts)} prompts but {len(responses)} responses to score")
        encoded = [self._encode(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        shared = share_prompts(encoded, max_tokens=self._max_tokens)
        groups = [
            PromptGroup(prompt_ids=encoded[rows[0]][0], response_ids=tuple(encoded[row][1] for row in rows))
            for rows in shared
        ]
        rewards: dict[int, float] = {}
        if not groups:
            return []
        lengths = [group.num_tokens for group in groups]
        for batch in plan_micro_batches(lengths, world_size=1, max_tokens=self._max_tokens)[0]:
            scored = self._rewards(pack([groups[g] for g in batch]).to(self._device))
            rewards |= zip(in_packed_order([shared[g] for g in batch]), scored.tolist(), strict=True)
        return [
            RewardScore(mean=rewards[row], std=0.0, objective_weights=(), objective_scores=())
            for row in range(len(encoded))
        ]

    def fits(self, prompt: tuple[Message, ...], response: str) -> bool:
        """Whether prompt and response fit in the policy's context, so that `score` cuts neither."""
        response_ids = encode_response(self._tokenizer, strip_thinking(response))
        return len(encode_prompt(self._tokenizer, prompt)) + len(response_ids) <= self._max_length

    @torch.inference_mode()
    def _rewards(self, packed: PackedTokens) -> torch.Tensor:
        """[R] in the order of `pack`."""
        columns = int(packed.response_lengths.max())
        reference = None if self._reference is None else self._reference(packed, columns, 1.0).sum(-1)
        logprobs = self._policy(packed, columns, 1.0).sum(-1)
        return implicit_rewards(self._form, logprobs, reference, packed.response_lengths, beta=self._beta)

    def _encode(self, prompt: tuple[Message, ...], response: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        response_ids = encode_response(self._tokenizer, strip_thinking(response))
        if len(response_ids) >= self._max_length:
            response_ids = (*response_ids[: self._max_length - 2], response_ids[-1])
        return fit_prompt(encode_prompt(self._tokenizer, prompt), response_ids, self._max_length), response_ids


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
