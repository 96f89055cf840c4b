"""PPO and its family, one rank's part of it: evaluate rollouts, update, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.columns import EvaluatedRollouts, Rollouts, TokenEvaluations
from pipeline.config.alignment import AlignmentConfig
from pipeline.learning.algorithm import SampledTokens, policy_loss
from pipeline.learning.engine import TrainEngine
from pipeline.learning.experience import build_experience, summary_of
from pipeline.learning.memory import peak_memory
from pipeline.learning.micro_batches import MicroBatch, RowValues, Sums, own_micro_batches
from pipeline.learning.padded_rows import PaddedRows
from pipeline.learning.parameter_groups import POLICY
from pipeline.learning.response_evaluations import response_evaluations
from pipeline.learning.schedule import learning_rate_factor
from pipeline.learning.training_state import TrainingStatePart
from pipeline.models.backbone import DTYPES, write_causal_lm
from pipeline.models.critic import TokenStatistics
from pipeline.models.packing import PackedTokens
from pipeline.models.tensor_stream import TensorStream
from pipeline.objectives.aggregation import MiniBatchSize
from pipeline.objectives.masked import masked_sum
from pipeline.objectives.policy import importance_ratio
from pipeline.objectives.value import clipped_value_loss
from pipeline.ragged import Ragged
from pipeline.records import (
    CriticTargets,
    Experience,
    ExperienceSummary,
    Metrics,
    PolicyWeights,
    PromptGroup,
    ResponseEvaluations,
    RewardedRows,
)
from pipeline.rollouts.published_versions import PublishedVersions
from pipeline.rollouts.publishing import evaluate_probes


class PPOLearner:
    """Policy gradients with a frozen reference and, where the algorithm has one, a critic. Implements `PolicyLearner`.

    Minimises  L = L_policy + beta L_KL + c_v L_value  per mini-batch, for `ppo.epochs` passes over the batch. Every
    term is a sum over tokens divided by counts of the whole mini-batch. PPO has its KL in the reward, so beta = 0 here.
    The group algorithms have no critic, so no L_value.

    Source: Schulman et al. 2017, arXiv:1707.06347; docs/method.md section 11. The engine's module is a
    `PolicyWithCritic`; without a critic its value head is frozen at zero.
    """

    def __init__(
        self,
        engine: TrainEngine,
        reference: Callable[..., torch.Tensor],
        *,
        config: AlignmentConfig,
        model_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        probes: Sequence[PromptGroup],
        publish_directory: str,
        seed: int,
    ) -> None:
        self.engine = engine
        self.reference = reference
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.probes = probes
        self.publish_directory = publish_directory
        self._published = PublishedVersions(publish_directory, writes=engine.rank == 0)
        self.seed = seed

    def restore(self, checkpoint: str) -> None:
        self.engine.load(checkpoint)

    # ------------------------------------------------------------------ evaluate

    def evaluate(self, rollouts: Rollouts) -> tuple[EvaluatedRollouts, ResponseEvaluations]:
        """`evaluate_tokens`, checked, and what the driver needs to know of it.

        Raises:
            ShapeError, NumericsError: as `response_evaluations`.
        """
        tokens = self.evaluate_tokens(rollouts)
        return EvaluatedRollouts(rollouts=rollouts, tokens=tokens), response_evaluations(rollouts, tokens)

    def evaluate_tokens(self, rollouts: Rollouts) -> TokenEvaluations:
        """Policy and reference log-probabilities and values of every response token, at the sampling temperature."""
        self.engine.module.eval()
        sequences = rollouts.sequences
        response_lengths = sequences.response_ids.lengths
        most_tokens = int(response_lengths.max())
        rows = RowValues(len(rollouts))
        with torch.no_grad():
            for micro, packed in self._packed(sequences):
                arguments = packed, most_tokens, self.config.temperature
                statistics = TokenStatistics(*self.engine.forward(*arguments))
                reference = self.reference(*arguments)
                rows.put(
                    micro.weight, micro.rows, torch.stack([statistics.logprobs, reference, statistics.values], dim=1)
                )
        is_token = torch.arange(most_tokens) < response_lengths.unsqueeze(-1)
        logprobs, references, values = (
            Ragged(dense[is_token], sequences.response_ids.offsets)
            for dense in rows.over_ranks(self.engine).unbind(dim=1)
        )
        return TokenEvaluations(logprobs=logprobs, reference_logprobs=references, values=values)

    def build_experience(
        self, evaluated: EvaluatedRollouts, rewarded: RewardedRows, *, kl_coefficient: float
    ) -> tuple[Experience, ExperienceSummary]:
        """`build_experience`, and what the driver needs to know of it. Calls no other rank."""
        experience, metrics = build_experience(evaluated, rewarded, self.config, kl_coefficient=kl_coefficient)
        return experience, summary_of(experience, metrics)

    # ------------------------------------------------------------------ update

    def update(self, experience: Experience, step: int) -> Metrics:
        """`ppo.epochs` passes of mini-batches; fewer where the KL of a mini-batch exceeds `ppo.target_kl`."""
        self.engine.module.train()
        ppo = self.config.ppo
        factor = learning_rate_factor(step, num_steps=self.config.num_steps, warmup_fraction=ppo.policy.warmup_fraction)
        policy_rests = step < ppo.critic_warmup_steps
        sums, norms, num_tokens = Sums(), [], 0
        for rows in self._mini_batches(len(experience.sequences), step):
            size = MiniBatchSize(
                num_tokens=int(experience.offsets.diff()[rows].sum()),
                num_responses=len(rows),
                max_response_tokens=self.config.max_response_tokens,
            )
            own_kl = self._add_gradients(experience, rows, size, sums, policy_rests=policy_rests)
            norms.append(self.engine.step(factor, resting=POLICY if policy_rests else None))
            num_tokens += size.num_tokens
            if ppo.target_kl is not None:
                approx_kl = own_kl.over_ranks(self.engine)["approximate_kl"] / size.num_tokens
                if approx_kl > ppo.target_kl:
                    break
        totals = {name: float(total) for name, total in sums.over_ranks(self.engine).items()}
        # Losses are already divided by the counts of their mini-batch; average them over optimiser steps.
        losses = {f"ppo/{name}": total / len(norms) for name, total in totals.items() if name.endswith("_loss")}
        return losses | {
            "ppo/entropy": totals["entropy"] / num_tokens,
            "ppo/clip_fraction": totals["clipped"] / num_tokens,
            "ppo/approximate_kl": totals["approximate_kl"] / num_tokens,
            "ppo/ratio_mean": totals["ratio"] / num_tokens,
            "ppo/optimiser_steps": float(len(norms)),
            "grad_norm": max(norms),
            "learning_rate": ppo.policy.learning_rate * factor,
        }

    def _mini_batches(self, num_rows: int, step: int) -> Iterator[torch.Tensor]:
        """Rows of each optimiser step, in an order that is a function of (seed, step, epoch).

        Dropped groups leave a batch that the mini-batch size need not divide: it is cut into equal parts near it.
        """
        ppo = self.config.ppo
        num_parts = max(1, round(num_rows / ppo.mini_batch_size))
        for epoch in range(ppo.epochs):
            order = np.random.default_rng([self.seed, step, epoch]).permutation(num_rows)
            yield from map(torch.from_numpy, np.array_split(order, num_parts))

    def _add_gradients(
        self, experience: Experience, rows: torch.Tensor, size: MiniBatchSize, sums: Sums, *, policy_rests: bool
    ) -> Sums:
        """Adds up the gradients of this rank's share of a mini-batch, micro-batch by micro-batch.

        Args:
            rows: rows of the mini-batch.
            size: size of the mini-batch, over all ranks.
            sums: sums over the whole update; this rank's share of the metrics is added to them.

        Returns:
            This rank's share of `approximate_kl`: the sum over the mini-batch's tokens of r - 1 - ln r, r the ratio of
            policy and policy before the update. An unbiased estimate of their KL divergence.
        """
        own_kl = Sums()
        for micro, packed in self._packed([experience.sequences[row] for row in rows.tolist()]):
            own_rows = rows[micro.rows]
            tokens = self._sampled_tokens(experience, own_rows)
            now = TokenStatistics(*self.engine.forward(packed, tokens.mask.shape[1], self.config.temperature))
            policy = policy_loss(now.logprobs, tokens, ppo=self.config.ppo, kl=self.config.kl, size=size)
            terms = {"policy_loss": policy.surrogate}
            if experience.kl_loss_coefficient > 0:
                terms["kl_loss"] = policy.kl
            if experience.critic is not None:
                padded = PaddedRows.of(experience.offsets, own_rows)
                terms["value_loss"] = self._value_loss(experience.critic, padded, now.values, tokens.mask, size)
            loss = self._weighted_sum(terms, experience.kl_loss_coefficient, policy_rests=policy_rests)
            self.engine.backward(micro.weight * loss, last=micro.last)
            ratio = importance_ratio(now.logprobs.detach(), tokens.logprobs, tokens.mask)
            approximate_kl = masked_sum(ratio - 1.0 - ratio.log(), tokens.mask)
            own_kl.add(micro.weight, approximate_kl=approximate_kl)
            sums.add(
                micro.weight,
                **terms,
                entropy=masked_sum(now.entropy, tokens.mask),
                clipped=policy.num_bounded,
                approximate_kl=approximate_kl,
                ratio=masked_sum(ratio, tokens.mask),
            )
        return own_kl

    def _weighted_sum(
        self, terms: Mapping[str, torch.Tensor], kl_loss_coefficient: float, *, policy_rests: bool
    ) -> torch.Tensor:
        """L_policy + beta L_KL + c_v L_value, each where `terms` has it; c_v L_value alone while the policy rests."""
        loss = terms["policy_loss"]
        if "kl_loss" in terms:
            loss = loss + kl_loss_coefficient * terms["kl_loss"]
        if policy_rests:  # the configuration allows this only for a critic that shares nothing with the policy
            loss = torch.zeros_like(loss)
        if "value_loss" in terms:
            loss = loss + self.config.ppo.value_coefficient * terms["value_loss"]
        return loss

    def _value_loss(
        self, critic: CriticTargets, rows: PaddedRows, values: torch.Tensor, mask: torch.Tensor, size: MiniBatchSize
    ) -> torch.Tensor:
        """L_value of `rows`, whose current values are `values` [n, T]."""
        old_values, returns = self._on_device(rows.take(critic.values), rows.take(critic.returns))
        return clipped_value_loss(
            values,
            old_values,
            returns,
            mask,
            clip_range=self.config.ppo.value_clip_range,
            num_tokens=size.num_tokens,
        )

    def _sampled_tokens(self, experience: Experience, rows: torch.Tensor) -> SampledTokens:
        """What is fixed of these rows, on this rank's device."""
        padded, weights = PaddedRows.of(experience.offsets, rows), experience.importance_weights
        logprobs, reference_logprobs, advantages, importance_weights, mask = self._on_device(
            padded.take(experience.logprobs),
            padded.take(experience.reference_logprobs),
            padded.take(experience.advantages),
            torch.ones(padded.mask.shape) if weights is None else padded.take(weights),
            padded.mask,
        )
        return SampledTokens(
            logprobs=logprobs,
            reference_logprobs=reference_logprobs,
            advantages=advantages,
            importance_weights=importance_weights,
            mask=mask,
        )

    def _on_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.to(self.engine.device) for tensor in tensors]

    def _packed(self, sequences: Sequence[PromptGroup]) -> Iterator[tuple[MicroBatch, PackedTokens]]:
        """This rank's micro-batches of the sequences, on its device."""
        for micro in own_micro_batches(sequences, self.engine, self.config.max_tokens_per_micro_batch):
            yield micro, micro.pack([sequences[row] for row in micro.rows.tolist()]).to(self.engine.device)

    # ------------------------------------------------------------------ publish and save

    def publish_weights(self, version: int, *, file_follows: bool = False) -> PolicyWeights:
        """Writes the policy where rollout workers of this node read it, and evaluates the gate's probes.

        The last two versions are kept. With `file_follows` the file is written behind the next pass through
        `policy_tensors`, or by `write_due_file`.
        """
        self.engine.module.eval()
        # Every rank runs every probe: ZeRO-3 needs the same calls from every rank, and the probes are few.
        probes = evaluate_probes(lambda *a: self.engine.forward(*a)[0], self.probes, self.engine.device)
        written = 0.0
        if file_follows:
            self._published.announce(version)
        else:
            policy = self._policy().to(DTYPES[self.engine.dtype])
            if self.engine.rank == 0:
                written = self._published.write(version, policy)
            else:
                policy.read_to_the_end()
        return PolicyWeights(
            version=version,
            location=str(self._published.location(version)),
            probes=probes,
            written_gb_per_s=written,
            file_follows=file_follows,
        )

    def policy_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What `publish_weights` writes, tensor by tensor on this rank's device. Collective, as `engine.stream`.

        Where its file follows, the first rank writes that once all tensors have been read.
        """
        return self._published.write_behind(self._policy().tensors, DTYPES[self.engine.dtype])

    def write_due_file(self) -> None:
        """Begins to write the file that follows, unless the tensors were read already. Collective."""
        if self._published.is_due:
            for _ in self.policy_tensors():
                pass

    def _policy(self) -> TensorStream:
        """The policy without the critic."""
        return self.engine.stream().merged(self.engine.module).below("policy.")

    def snapshot(self) -> TrainingStatePart:
        return self.engine.snapshot()

    def peak_memory(self) -> Metrics:
        return peak_memory(self.engine.device)

    def export(self, directory: str) -> None:
        policy = self._policy()
        if self.engine.rank == 0:
            write_causal_lm(policy, self.model_config, self.tokenizer, directory)
        else:
            policy.read_to_the_end()


def frozen_reference(
    forward: Callable[..., torch.Tensor], *, dtype: str, device: torch.device
) -> Callable[..., torch.Tensor]:
    """The policy as it was before alignment, as a function: a frozen model of its own."""

    def reference(*arguments: Any) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return forward(*arguments)

    return reference


def reference_without_adapters(engine: TrainEngine) -> Callable[..., torch.Tensor]:
    """The policy as it was before its adapters, as a function: a reference without memory of its own."""

    def reference(packed: PackedTokens, num_columns: int, temperature: float) -> torch.Tensor:
        return engine.forward(packed, num_columns, temperature, True)[0]

    return reference
