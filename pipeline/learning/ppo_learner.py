"""PPO and its family, one rank's part of it: evaluate rollouts, update, publish."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.config.alignment import AlignmentConfig
from pipeline.learning.algorithm import policy_loss
from pipeline.learning.engine import TrainEngine
from pipeline.learning.memory import peak_memory
from pipeline.learning.micro_batches import MicroBatch, Rows, Sums, own_micro_batches
from pipeline.learning.parameter_groups import POLICY
from pipeline.learning.schedule import learning_rate_factor
from pipeline.learning.training_state import Snapshot
from pipeline.models.backbone import DTYPES, save_causal_lm
from pipeline.models.critic import TokenStatistics
from pipeline.models.lora import merged_tensors
from pipeline.models.packing import PackedTokens, pack
from pipeline.objectives.aggregation import MiniBatchSize
from pipeline.objectives.masked import masked_sum
from pipeline.objectives.policy import importance_ratio
from pipeline.objectives.value import clipped_value_loss
from pipeline.records import Experience, Metrics, PolicyWeights, PromptGroup, Rollout, TokenEvaluation
from pipeline.rollouts.policy_files import PolicyFiles
from pipeline.rollouts.publishing import evaluate_probes


class PPOLearner:
    """Policy gradients with a frozen reference and, where the algorithm has one, a critic. Implements `PolicyLearner`.

    Minimises  L = L_policy + beta L_KL + c_v L_value  per mini-batch, for `ppo.epochs` passes over the batch. Every
    term is a sum over tokens divided by counts of the whole mini-batch. PPO has its KL in the reward (beta = 0 here),
    the group algorithms have no critic (no L_value).

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
        self._files = PolicyFiles()
        self.seed = seed

    def restore(self, checkpoint: str) -> None:
        self.engine.load(checkpoint)

    # ------------------------------------------------------------------ evaluate

    def evaluate(self, rollouts: Sequence[Rollout]) -> list[TokenEvaluation]:
        """Policy and reference log-probabilities and values of every response token, at the sampling temperature."""
        self.engine.module.eval()
        sequences = [rollout.tokens for rollout in rollouts]
        response_lengths = [sequence.num_response_tokens for sequence in sequences]
        rows = Rows(len(rollouts))
        with torch.no_grad():
            for micro, packed in self._packed(sequences):
                arguments = packed, max(response_lengths), self.config.temperature
                statistics = TokenStatistics(*self.engine.forward(*arguments))
                reference = self.reference(*arguments)
                rows.put(
                    micro.weight, micro.rows, torch.stack([statistics.logprobs, reference, statistics.values], dim=1)
                )
        logprobs, references, values = rows.over_ranks(self.engine).transpose(0, 1).tolist()
        return [
            TokenEvaluation(
                logprobs=tuple(logprobs[b][:n]),
                reference_logprobs=tuple(references[b][:n]),
                values=tuple(values[b][:n]),
            )
            for b, n in enumerate(response_lengths)
        ]

    # ------------------------------------------------------------------ update

    def update(self, experience: Experience, step: int) -> Metrics:
        """`ppo.epochs` passes of mini-batches, or fewer when the policy has moved too far from the one that sampled."""
        self.engine.module.train()
        ppo = self.config.ppo
        factor = learning_rate_factor(step, num_steps=self.config.num_steps, warmup_fraction=ppo.policy.warmup_fraction)
        sums, norms, num_tokens = Sums(), [], 0
        for rows in self._mini_batches(len(experience.sequences), step):
            size = MiniBatchSize(
                num_tokens=int(experience.mask[rows].sum()),
                num_responses=len(rows),
                max_response_tokens=self.config.max_response_tokens,
            )
            approx_kl = Sums()
            policy_rests = step < ppo.critic_warmup_steps
            norms.append(
                self._optimiser_step(experience, rows, size, factor, sums, approx_kl, policy_rests=policy_rests)
            )
            num_tokens += size.num_tokens
            if ppo.target_kl is not None:
                moved = approx_kl.over_ranks(self.engine)["approximate_kl"] / size.num_tokens
                if moved > ppo.target_kl:
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

    def _optimiser_step(
        self,
        experience: Experience,
        rows: torch.Tensor,
        size: MiniBatchSize,
        factor: float,
        sums: Sums,
        approx_kl: Sums,
        *,
        policy_rests: bool,
    ) -> float:
        """Returns the gradient norm; adds this rank's share of the metrics to `sums`, and of the KL to `approx_kl`."""
        ppo = self.config.ppo
        for micro, packed in self._packed([experience.sequences[row] for row in rows.tolist()]):
            own = rows[micro.rows]
            mask, old_logprobs, reference_logprobs, advantages, weights = self._on_device(
                own,
                experience.mask,
                experience.logprobs,
                experience.reference_logprobs,
                experience.advantages,
                experience.importance_weights,
            )
            now = TokenStatistics(*self.engine.forward(packed, experience.mask.shape[1], self.config.temperature))
            policy = policy_loss(
                now.logprobs,
                old_logprobs,
                reference_logprobs,
                advantages,
                weights,
                mask,
                ppo=ppo,
                kl=self.config.kl,
                size=size,
            )
            loss, terms = policy.surrogate, {"policy_loss": policy.surrogate}
            if experience.kl_loss_coefficient > 0:
                loss = loss + experience.kl_loss_coefficient * policy.kl
                terms["kl_loss"] = policy.kl
            if policy_rests:  # the schema sees to it that the critic shares nothing with the policy
                loss = torch.zeros_like(loss)
            if experience.critic is not None:
                values, returns = self._on_device(own, experience.critic.values, experience.critic.returns)
                value_loss = clipped_value_loss(
                    now.values,
                    values,
                    returns,
                    mask,
                    clip_range=ppo.value_clip_range,
                    num_tokens=size.num_tokens,
                )
                loss = loss + ppo.value_coefficient * value_loss
                terms["value_loss"] = value_loss
            self.engine.backward(micro.weight * loss, last=micro.last)
            ratio = importance_ratio(now.logprobs.detach(), old_logprobs, mask)
            approximate_kl = masked_sum(ratio - 1.0 - ratio.log(), mask)
            approx_kl.add(micro.weight, approximate_kl=approximate_kl)
            sums.add(
                micro.weight,
                **terms,
                entropy=masked_sum(now.entropy, mask),
                clipped=policy.num_bounded,
                approximate_kl=approximate_kl,
                ratio=masked_sum(ratio, mask),
            )
        return self.engine.step(factor, resting=POLICY if policy_rests else None)

    def _on_device(self, rows: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[rows].to(self.engine.device) for tensor in tensors]

    def _packed(self, sequences: Sequence[PromptGroup]) -> Iterator[tuple[MicroBatch, PackedTokens]]:
        """This rank's micro-batches of the sequences, on its device."""
        for micro in own_micro_batches(sequences, self.engine, self.config.max_tokens_per_micro_batch):
            own = [sequences[row] for row in micro.rows.tolist()]
            yield micro, pack(own, most_response_tokens=micro.most_response_tokens).to(self.engine.device)

    # ------------------------------------------------------------------ publish and save

    def publish_weights(self, version: int) -> PolicyWeights:
        """Writes the policy where rollout workers of this node read it, with the gate's probes; keeps the last two."""
        self.engine.module.eval()
        # Every rank runs every probe: they are few, and ZeRO-3 needs the company.
        probes = evaluate_probes(lambda *a: self.engine.forward(*a)[0], self.probes, self.engine.device)
        location = self._location(version)
        policy = self._policy_on_first_rank(DTYPES[self.engine.dtype])
        written = 0.0
        if self.engine.rank == 0:
            written = self._files.write(policy, location, over=self._location(version - 2))
            # By name, not by age: a killed run may have left later versions than the one it resumes from.
            kept = {location, self._location(version - 1)}
            for other in set(location.parent.glob("policy-*")) - kept:
                shutil.rmtree(other, ignore_errors=True)
        return PolicyWeights(version=version, location=str(location), probes=probes, written_gb_per_s=written)

    def policy_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What `publish_weights` writes, tensor by tensor on this rank's device. Collective, as `full_tensors`."""
        return self._policy_part(self.engine.full_tensors())

    def _policy_on_first_rank(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """On its CPU, without the critic; empty elsewhere. Collective."""
        tensors = self.policy_tensors()
        return {name: tensor.to(dtype).cpu() for name, tensor in tensors if self.engine.rank == 0}

    def _policy_part(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in merged_tensors(tensors, self.engine.module):
            if name.startswith("policy."):
                yield name.removeprefix("policy."), tensor

    def _location(self, version: int) -> Path:
        return Path(self.publish_directory) / f"policy-{version:06d}"

    def snapshot(self) -> Snapshot:
        return self.engine.snapshot()

    def peak_memory(self) -> Metrics:
        return peak_memory(self.engine.device)

    def export(self, directory: str) -> None:
        policy = self._policy_on_first_rank(torch.float32)
        if self.engine.rank == 0:
            save_causal_lm(policy, self.model_config, self.tokenizer, directory)


def frozen_reference(
    forward: Callable[..., torch.Tensor], *, dtype: str, device: torch.device
) -> Callable[..., torch.Tensor]:
    """The policy as it was, a model of its own that learns nothing, as a function."""

    def reference(*arguments: Any) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return forward(*arguments)

    return reference


def reference_without_adapters(engine: TrainEngine) -> Callable[..., torch.Tensor]:
    """The policy as it was before its adapters, as a function: the reference that takes no memory of its own."""

    def reference(packed: PackedTokens, num_columns: int, temperature: float) -> torch.Tensor:
        return engine.forward(packed, num_columns, temperature, True)[0]

    return reference
