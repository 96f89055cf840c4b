"""Rollouts in one process, as `TorchEngine` trains in one process: for models that are small enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from pipeline.columns import Rollouts
from pipeline.data.chat import decode_response
from pipeline.data.end_of_turn import end_of_turn_ids
from pipeline.errors import ConfigError, StaleEngineError
from pipeline.models.backbone import load_causal_lm
from pipeline.ragged import Ragged
from pipeline.records import Metrics, PolicyWeights, ProbeSequence, Prompt, SamplingParams
from pipeline.repetition import repeated_shares
from pipeline.rollouts.numerics_gate import GATE_TOLERANCE, check_engine
from pipeline.rollouts.policy_files import PolicyFiles
from pipeline.rollouts.requests import RolloutRequest, require_room, rollout_requests


class TorchRollouts:
    """Samples with a plain Hugging Face decoder, a whole batch at a time. Implements `BackgroundRolloutSource`.

    A response depends on the policy, its prompt and its seed; what shares the batch changes it by rounding at most.
    """

    def __init__(self, directory: str, *, dtype: str, gate_tolerance: float | None = None, device: str = "cpu") -> None:
        """
        Args:
            directory: holds the policy's architecture and tokenizer; its weights are never sampled from.
            gate_tolerance: largest mean difference to the learner's log-probabilities, nats; None is the dtype's.
        """
        model, self._tokenizer = load_causal_lm(directory, dtype=dtype)
        self._model = model.eval().requires_grad_(False).to(device)
        # Behind a prompt the head reads a slice with gaps; for each of its rows a CPU would copy the whole head.
        self._model.get_output_embeddings().register_forward_pre_hook(_without_gaps)
        self._ends = torch.tensor(end_of_turn_ids(self._tokenizer, model.config.eos_token_id), device=device)
        self._tolerance = gate_tolerance or GATE_TOLERANCE[dtype]
        self._files = PolicyFiles()
        self._version: int | None = None
        self._prefetched = Rollouts.of([])

    def load_weights(self, weights: PolicyWeights) -> Metrics:
        """Loads a published policy and passes the gate. Nothing is sampled before that."""
        self._version = None
        self._model.load_state_dict(self._files.read(weights.location))
        gate = check_engine(
            weights.probes,
            [self._logprobs_of(probe) for probe in weights.probes],
            tolerance=self._tolerance,
            engine="the in-process sampler",
            version=weights.version,
            differing_groups=dict,  # every tensor was loaded by name
        )
        self._version = weights.version
        return gate

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Rollouts:
        """`samples_per_prompt` rollouts per prompt, ordered by (prompt, sample).

        Raises:
            StaleEngineError: no policy was loaded that passed the gate.
            ConfigError: nucleus sampling.
            DataError: a prompt leaves no room for its longest response.
        """
        if self._version is None:
            raise StaleEngineError("the in-process sampler was asked to sample before it passed the numerics gate")
        if sampling.top_p != 1:
            raise ConfigError(
                f"top_p = {sampling.top_p:g}: the in-process sampler draws from the whole distribution. Use top_p = 1."
            )
        require_room(prompts, sampling, self._model.config.max_position_embeddings)
        requests = rollout_requests(prompts, sampling)
        tokens, logprobs = self._sample(requests, sampling)
        ends = torch.isin(tokens, self._ends)
        stopped = ends.any(-1)
        lengths = torch.where(stopped, ends.int().argmax(-1) + 1, tokens.shape[1]).cpu()
        is_token = torch.arange(tokens.shape[1]) < lengths.unsqueeze(-1)
        response_ids = Ragged.divided(tokens.cpu()[is_token].int(), lengths)
        return Rollouts(
            prompts=tuple(request.prompt for request in requests),
            sample_indices=tuple(request.sample_index for request in requests),
            response_ids=response_ids,
            response_texts=tuple(decode_response(self._tokenizer, ids.tolist()) for ids in response_ids),
            logprobs=Ragged(logprobs.cpu()[is_token], response_ids.offsets),
            policy_versions=(self._version,) * len(requests),
            finish_reasons=tuple("stop" if has_ended else "length" for has_ended in stopped.tolist()),
            repetition=tuple(repeated_shares(response_ids).tolist()),
        )

    def begin(self, prompts: Sequence[Prompt], sampling: SamplingParams, *, resample_unfinished: bool) -> None:
        """Samples the whole batch now: one process has no background. So no response is unfinished at a load."""
        self._prefetched = self.generate(prompts, sampling)

    def collect(self) -> Rollouts:
        """The rollouts that `begin` sampled."""
        return self._prefetched

    def sleep(self) -> None:
        """Does nothing: between batches this sampler holds nothing but the policy."""

    def _sample(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T] token ids and their log-probabilities; tokens after the first end of turn mean nothing.

        Inverse transform sampling: the t-th uniform number of a request's own generator picks its t-th token. So the
        response depends neither on what shares the batch nor on when the others end. At temperature 0 each token is the
        most likely one, with its log-probability at temperature 1.
        """
        num_tokens, device = sampling.max_response_tokens, self._model.device
        uniform = torch.from_numpy(np.stack([np.random.default_rng(r.seed).random(num_tokens) for r in requests])).to(
            device
        )
        inputs, mask = _left_padded([r.prompt.token_ids for r in requests], self._tokenizer.pad_token_id, device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache()
        running = torch.ones(len(requests), dtype=torch.bool, device=device)
        tokens, logprobs = [], []
        with torch.no_grad():
            for t in range(num_tokens):
                logits = self._model(
                    input_ids=inputs,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
                distribution = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), dim=-1)
                inputs = _drawn(distribution, uniform[:, t : t + 1], is_greedy=sampling.temperature == 0)
                tokens.append(inputs)
                logprobs.append(distribution.gather(-1, inputs))
                running &= ~torch.isin(inputs.squeeze(-1), self._ends)
                if not running.any():
                    break
                positions = positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=-1)
        return torch.cat(tokens, dim=-1), torch.cat(logprobs, dim=-1)

    def _logprobs_of(self, probe: ProbeSequence) -> list[float]:
        """Log-probabilities of a probe's response tokens at temperature 1."""
        ids = torch.tensor([[*probe.prompt_ids, *probe.response_ids]], device=self._model.device)
        with torch.no_grad():
            distribution = torch.log_softmax(self._model(input_ids=ids, use_cache=False).logits[0].float(), dim=-1)
        first = len(probe.prompt_ids)
        rows: list[float] = distribution[first - 1 : -1].gather(-1, ids[0, first:, None]).squeeze(-1).tolist()
        return rows


def _without_gaps(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].contiguous(),)


def _drawn(distribution: torch.Tensor, uniform: torch.Tensor, *, is_greedy: bool) -> torch.Tensor:
    """[B, 1] tokens: the most likely ones, or those that [B, 1] uniform numbers pick from [B, V] log-probabilities."""
    if is_greedy:
        return distribution.argmax(-1, keepdim=True)
    cumulative = distribution.double().exp().cumsum(-1)
    # Scaled to its own last entry: rounding must not leave a gap above the last token.
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.clamp_max(distribution.shape[-1] - 1)


def _left_padded(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, P] ids that all end in the last column, and [B, P] 1 on real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
