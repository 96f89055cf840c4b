"""The policy and its critic, as one module with one forward pass over a rollout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.objectives.logprobs import token_logprobs_and_entropy


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

    With a critic backbone of its own the value head reads that; without one it reads the policy's trunk.
    The value head starts at zero: a critic that knows nothing predicts nothing.
    """

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        width = policy.config.hidden_size if critic is None else critic.config.hidden_size
        self.value_head = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        prompt_lengths: torch.Tensor,
        response_lengths: torch.Tensor,
        num_columns: int,
        temperature: float,
    ) -> tuple[torch.Tensor, ...]:
        """Evaluates B right-padded rollouts.

        Args:
            input_ids: [B, L] int64, prompt then response.
            prompt_lengths, response_lengths: [B] int64.
            num_columns: T of the result, at least the longest response.
            temperature: divides the logits, equal to the engine's.

        Returns:
            The fields of `TokenStatistics`, as a plain tuple for the sake of ZeRO-3's hooks.
        """
        states = ResponseStates.locate(input_ids, prompt_lengths, response_lengths, num_columns)
        hidden = self.policy.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        logprobs, entropy = states.logprobs_and_entropy(self.policy, hidden, temperature)
        value_hidden = (
            hidden if self.critic is None else self.critic(input_ids=input_ids, use_cache=False).last_hidden_state
        )
        with torch.autocast(input_ids.device.type, enabled=False):
            values = self.value_head(states.select(value_hidden).float()).squeeze(-1)
        return logprobs, entropy, states.scatter(values)


class Policy(nn.Module):
    """log pi(a_t|s_t) of response tokens, nothing else: supervised fine-tuning, and the frozen reference."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self,
        input_ids: torch.Tensor,
        prompt_lengths: torch.Tensor,
        response_lengths: torch.Tensor,
        num_columns: int,
        temperature: float,
    ) -> torch.Tensor:
        """[B, T] float32 log-probabilities, 0 on padding; arguments as in `PolicyWithCritic.forward`."""
        states = ResponseStates.locate(input_ids, prompt_lengths, response_lengths, num_columns)
        hidden = self.policy.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return states.logprobs_and_entropy(self.policy, hidden, temperature)[0]


class ResponseStates:
    """Where in a padded batch the states lie that predict the response tokens.

    Response token t of row b stands at position prompt_lengths[b] + t and is predicted one position earlier.
    """

    def __init__(
        self, mask: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor
    ) -> None:
        self.mask = mask
        self.rows = rows
        self.positions = positions
        self.token_ids = token_ids

    @classmethod
    def locate(
        cls, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, response_lengths: torch.Tensor, num_columns: int
    ) -> ResponseStates:
        columns = torch.arange(num_columns, device=input_ids.device)
        mask = columns < response_lengths.unsqueeze(-1)
        rows, t = mask.nonzero(as_tuple=True)
        positions = prompt_lengths[rows] - 1 + t
        return cls(mask, rows, positions, input_ids[rows, positions + 1])

    def select(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, L, H] -> [N, H], the states of the N real response tokens."""
        return hidden[self.rows, self.positions]

    def scatter(self, flat: torch.Tensor) -> torch.Tensor:
        """[N] -> [B, T], 0 on padding."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(self.mask, flat)

    def logprobs_and_entropy(
        self, policy: PreTrainedModel, hidden: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] log-probabilities and entropies of the response tokens."""
        logprobs, entropy = token_logprobs_and_entropy(
            self.select(hidden), policy.get_output_embeddings(), self.token_ids, temperature=temperature
        )
        return self.scatter(logprobs), self.scatter(entropy)
