"""The policy and its critic, as one module with one forward pass over a rollout."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.models.lora import adapters_off
from pipeline.models.packing import PackedTokens, of_all_ranks, packed_states, use_packed_attention
from pipeline.objectives.logprobs import token_logprobs, token_logprobs_and_entropy


class TokenStatistics(NamedTuple):
    """Per response token of B rollouts; 0 on padding."""

    logprobs: torch.Tensor
    """[B, T] float32 nats, carries gradient."""
    entropy: torch.Tensor
    """[B, T] float32 nats, no gradient."""
    values: torch.Tensor
    """[B, T] float32, carries gradient; the value of the state before the token."""


class PolicyWithCritic(nn.Module):
    """log pi(a_t|s_t), entropy and V(s_t) for every response token.

    The value head reads a critic backbone of its own where there is one, else the policy's trunk.
    It starts at zero: a critic that has learned nothing predicts nothing.
    """

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel | None) -> None:
        super().__init__()
        use_packed_attention(policy)
        if critic is not None:
            use_packed_attention(critic)
        self.policy = policy
        self.critic = critic
        width = policy.config.hidden_size if critic is None else critic.config.hidden_size
        self.value_head = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self, packed: PackedTokens, num_columns: int, temperature: float, as_reference: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Evaluates B rollouts.

        Args:
            packed: B responses, on the model's device.
            num_columns: T of the result, at least the longest response.
            temperature: divides the logits, equal to the engine's.
            as_reference: only the log-probabilities, of the policy with its adapters off.

        Returns:
            The fields of `TokenStatistics`, as a plain tuple for the sake of ZeRO-3's hooks.
        """
        if as_reference:
            with adapters_off(self.policy):
                states = packed_states(_trunk(self.policy), packed)
                logprobs = _logprobs_and_entropy(self.policy, states, packed, temperature)[0]
            return (_to_rows(logprobs, packed, num_columns),)
        states = packed_states(_trunk(self.policy), packed)
        logprobs, entropy = _logprobs_and_entropy(self.policy, states, packed, temperature)
        value_states = states if self.critic is None else packed_states(self.critic, packed)
        with torch.autocast(states.device.type, enabled=False):
            values = self.value_head(value_states[packed.predictors].float()).squeeze(-1)
        return tuple(_to_rows(flat, packed, num_columns) for flat in (logprobs, entropy, values))


class Policy(nn.Module):
    """log pi(a_t|s_t) of response tokens, nothing else: supervised fine-tuning, and the frozen reference."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        use_packed_attention(policy)
        self.policy = policy

    def forward(self, packed: PackedTokens, num_columns: int, temperature: float) -> torch.Tensor:
        """[B, T] float32 log-probabilities, 0 on padding; arguments as in `PolicyWithCritic.forward`."""
        states = packed_states(_trunk(self.policy), packed)
        return _to_rows(_logprobs_and_entropy(self.policy, states, packed, temperature)[0], packed, num_columns)


class ResponsePolicy(nn.Module):
    """log pi(y|x) of whole responses: direct alignment."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        use_packed_attention(policy)
        self.policy = policy

    def forward(self, packed: PackedTokens, with_collisions: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] float32 sums over the tokens of each response: log pi(y_t), and log sum_v pi(v)^2 without gradient.

        Args:
            packed: R responses, on the model's device.
            with_collisions: whether to compute the second, which is 0 otherwise.
        """
        states = packed_states(_trunk(self.policy), packed)
        per_token = token_logprobs(
            states[packed.predictors],
            self.policy.get_output_embeddings(),
            packed.targets,
            temperature=1.0,
            most_positions=packed.most_response_tokens,
            diagnostic="log_collision" if with_collisions else "none",
        )
        longest = int(packed.response_lengths.max())
        logprobs, collisions = (_to_rows(flat, packed, longest).sum(-1) for flat in per_token)
        return logprobs, collisions


def _trunk(policy: Any) -> PreTrainedModel:
    """The decoder without its language-model head."""
    return policy.base_model


def _logprobs_and_entropy(
    policy: PreTrainedModel, states: torch.Tensor, packed: PackedTokens, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[M] each, of the response tokens that this rank predicts."""
    return token_logprobs_and_entropy(
        states[packed.predictors],
        policy.get_output_embeddings(),
        packed.targets,
        temperature=temperature,
        most_positions=packed.most_response_tokens,
    )


def _to_rows(flat: torch.Tensor, packed: PackedTokens, num_columns: int) -> torch.Tensor:
    """[M] of the response tokens that this rank predicts -> [B, num_columns], a row per response, 0 on padding."""
    mask = torch.arange(num_columns, device=flat.device) < packed.response_lengths.unsqueeze(-1)
    return flat.new_zeros(mask.shape).masked_scatter(mask, of_all_ranks(flat, packed))
