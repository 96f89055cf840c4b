"""The nouns that travel between rooms.

Every record is frozen, keyword-only and complete when it is created: a rollout gains a score by
becoming part of an `Experience`, never by having a field filled in later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Message = Mapping[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """One comparison in the one schema of the project (VRM spec section 7.3)."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    scores_chosen: Mapping[str, float] | None
    scores_rejected: Mapping[str, float] | None
    source: str
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """B tokenised pairs, right-padded; rows [0, B) are the chosen, rows [B, 2B) the rejected.

    `prompt_lengths[b]` is shared by rows b and b + B, whose first tokens are the same prompt.
    """

    input_ids: torch.Tensor
    """[2B, L] int64."""
    lengths: torch.Tensor
    """[2B] int64: prompt + response tokens of each row; the last one is the end-of-turn token."""
    prompt_lengths: torch.Tensor
    """[B] int64."""
    target: torch.Tensor
    """[B, K] float32: supervision distribution over the objectives, 0 where masked."""
    target_mask: torch.Tensor
    """[B, K] bool: which objectives were annotated; all False for a pair without scores."""
    noise_seeds: torch.Tensor
    """[B] int64: seed of each pair's posterior sample; a function of (seed, step, position), so
    neither sharding nor micro-batching changes the noise."""

    @property
    def num_pairs(self) -> int:
        return self.prompt_lengths.shape[0]


@dataclass(frozen=True, kw_only=True)
class TokenisedText:
    """One training text for supervised fine-tuning: loss on the tokens after the prompt."""

    token_ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt to answer, in words and in the policy's tokens."""

    id: str
    messages: tuple[Message, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the engine samples; `seed` is mixed with (step, prompt, sample) per request."""

    temperature: float
    top_p: float
    max_response_tokens: int
    samples_per_prompt: int
    seed: int


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response, with the engine's own log-probabilities of its tokens."""

    prompt: Prompt
    sample_index: int
    response_ids: tuple[int, ...]
    """Ends with the end-of-turn token when `finish_reason` is "stop"."""
    response_text: str
    logprobs: tuple[float, ...]
    """Natural log-probabilities of `response_ids` under the engine, in the distribution it sampled from (temperature
    applied)."""
    policy_version: int
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class RewardScore:
    """The reward of one response, with its reason and its error bar (VRM spec section 8).

    `mean = sum_k objective_weights[k] * objective_scores[k]` exactly, for the bilinear decoder.
    A Bradley-Terry head has no reasons: both tuples are empty and `std` is 0.
    """

    mean: float
    std: float
    objective_weights: tuple[float, ...]
    objective_scores: tuple[float, ...]
    concentration: float = 0.0
    """A = sum_k alpha_k of the Dirichlet over the weights; 0 where the weights are not random."""


@dataclass(frozen=True, kw_only=True)
class TokenEvaluation:
    """The learner's view of one rollout's response tokens, before the update."""

    logprobs: tuple[float, ...]
    reference_logprobs: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Experience:
    """A rollout batch ready for the update: B sequences, T response tokens at most.

    Column t of every [B, T] tensor is response token t; `mask` is True on real tokens.
    """

    input_ids: torch.Tensor
    """[B, L] int64: prompt and response, right-padded."""
    prompt_lengths: torch.Tensor
    """[B] int64."""
    response_lengths: torch.Tensor
    """[B] int64."""
    mask: torch.Tensor
    """[B, T] bool."""
    logprobs: torch.Tensor
    """[B, T] under the policy before the update."""
    values: torch.Tensor
    """[B, T] under the critic before the update."""
    advantages: torch.Tensor
    """[B, T], whitened over the masked tokens of the whole batch."""
    returns: torch.Tensor
    """[B, T]: advantages before whitening, plus values."""
    num_response_tokens: int
    """The loss denominator of the whole batch, counted before sharding."""


@dataclass(frozen=True, kw_only=True)
class ProbeSequence:
    """One probe of the numerics gate: a sequence and what the learner says of it."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Float32 learner log-probabilities of `response_ids` at temperature 1."""


@dataclass(frozen=True, kw_only=True)
class PolicyWeights:
    """A published version of the policy: where its weights lie and how to recognise them."""

    version: int
    location: str
    """A directory holding `model.safetensors` with Hugging Face parameter names, with
    `lm_head.weight` always explicit."""
    probes: tuple[ProbeSequence, ...]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A finished stage: where its artefacts lie and what it measured."""

    name: str
    fingerprint: str
    location: str
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One benchmark answer, as AlpacaEval's `model_outputs.json` holds it, plus its reward."""

    prompt_id: str
    instruction: str
    output: str
    generator: str
    score: RewardScore
