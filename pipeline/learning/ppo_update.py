"""PPO, one rank's part of it: evaluate rollouts, update, publish."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.config.schema import AlignmentConfig
from pipeline.errors import ResourceError
from pipeline.learning.engine import TrainEngine
from pipeline.learning.probes import evaluate_probes
from pipeline.learning.schedule import learning_rate_factor
from pipeline.learning.shards import MicroBatch, Rows, Sums, own_micro_batches
from pipeline.models.backbone import save_causal_lm
from pipeline.models.critic import TokenStatistics
from pipeline.models.packing import PackedTokens, pack
from pipeline.objectives.masked import masked_sum
from pipeline.objectives.policy import clipped_policy_loss, clipped_tokens, importance_ratio
from pipeline.objectives.value import clipped_value_loss
from pipeline.records import Experience, Metrics, PolicyWeights, PromptGroup, Rollout, TokenEvaluation

WEIGHTS_FILE = "model.safetensors"


class PPOLearner:
    """Clipped-surrogate PPO with a critic and a frozen reference. Implements `PolicyLearner`.

    Minimises  L = L_policy + c_v L_value  per mini-batch, both summed over tokens and divided by the mini-batch's
    global token count, for `ppo.epochs` passes over the batch.

    Source: Schulman et al. 2017, arXiv:1707.06347; vrm_spec section 11. The engine's module is a `PolicyWithCritic`.
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
        """`ppo.epochs` passes of mini-batches; the order is a function of (seed, step, epoch)."""
        self.engine.module.train()
        ppo = self.config.ppo
        factor = learning_rate_factor(step, num_steps=self.config.num_steps, warmup_fraction=ppo.policy.warmup_fraction)
        sums, norms = Sums(), []
        for epoch in range(ppo.epochs):
            order = np.random.default_rng([self.seed, step, epoch]).permutation(len(experience.sequences))
            for first in range(0, len(order), ppo.mini_batch_size):
                rows = torch.from_numpy(order[first : first + ppo.mini_batch_size])
                norms.append(self._optimiser_step(experience, rows, factor, sums))
        totals = {name: float(total) for name, total in sums.over_ranks(self.engine).items()}
        num_tokens = experience.num_response_tokens * ppo.epochs
        return {
            # The two losses are already divided by their mini-batch's tokens; average them over optimiser steps.
            "ppo/policy_loss": totals["policy_loss"] / len(norms),
            "ppo/value_loss": totals["value_loss"] / len(norms),
            "ppo/entropy": totals["entropy"] / num_tokens,
            "ppo/clip_fraction": totals["clipped"] / num_tokens,
            "ppo/approximate_kl": totals["approximate_kl"] / num_tokens,
            "ppo/ratio_mean": totals["ratio"] / num_tokens,
            "grad_norm": max(norms),
            "learning_rate": ppo.policy.learning_rate * factor,
        }

    def _optimiser_step(self, experience: Experience, rows: torch.Tensor, factor: float, sums: Sums) -> float:
        ppo = self.config.ppo
        num_tokens = int(experience.mask[rows].sum())
        for micro, packed in self._packed([experience.sequences[row] for row in rows.tolist()]):
            own = rows[micro.rows]
            batch = {
                name: getattr(experience, name)[own].to(self.engine.device)
                for name in ("mask", "logprobs", "values", "advantages", "returns")
            }
            now = TokenStatistics(*self.engine.forward(packed, experience.mask.shape[1], self.config.temperature))
            mask = batch["mask"]
            policy_loss = clipped_policy_loss(
                now.logprobs,
                batch["logprobs"],
                batch["advantages"],
                mask,
                clip_range=ppo.clip_range,
                num_tokens=num_tokens,
            )
            value_loss = clipped_value_loss(
                now.values,
                batch["values"],
                batch["returns"],
                mask,
                clip_range=ppo.value_clip_range,
                num_tokens=num_tokens,
            )
            self.engine.backward(micro.weight * (policy_loss + ppo.value_coefficient * value_loss), last=micro.last)
            ratio = importance_ratio(now.logprobs.detach(), batch["logprobs"], mask)
            sums.add(
                micro.weight,
                policy_loss=policy_loss,
                value_loss=value_loss,
                entropy=masked_sum(now.entropy, mask),
                clipped=clipped_tokens(ratio, batch["advantages"], mask, clip_range=ppo.clip_range),
                approximate_kl=masked_sum(ratio - 1.0 - ratio.log(), mask),
                ratio=masked_sum(ratio, mask),
            )
        return self.engine.step(factor)

    def _packed(self, sequences: Sequence[PromptGroup]) -> Iterator[tuple[MicroBatch, PackedTokens]]:
        """This rank's micro-batches of the sequences, on its device."""
        lengths = [sequence.num_tokens for sequence in sequences]
        for micro in own_micro_batches(lengths, self.engine, self.config.max_tokens_per_micro_batch):
            yield micro, pack([sequences[row] for row in micro.rows.tolist()]).to(self.engine.device)

    # ------------------------------------------------------------------ publish and save

    def publish_weights(self, version: int) -> PolicyWeights:
        """Writes the policy where rollout workers of this node read it, with the gate's probes; keeps the last two."""
        self.engine.module.eval()
        # Every rank runs every probe: they are few, and ZeRO-3 needs the company.
        probes = evaluate_probes(lambda *a: self.engine.forward(*a)[0], self.probes, self.engine.device)
        state = self.engine.full_state_dict()
        location = self._location(version)
        if self.engine.rank == 0:
            write_policy_weights(_policy_part(state), location)
            # By name, not by age: a killed run may have left later versions than the one it resumes from.
            kept = {location, self._location(version - 1)}
            for other in set(location.parent.glob("policy-*")) - kept:
                shutil.rmtree(other, ignore_errors=True)
        return PolicyWeights(version=version, location=str(location), probes=probes)

    def _location(self, version: int) -> Path:
        return Path(self.publish_directory) / f"policy-{version:06d}"

    def save(self, directory: str) -> None:
        self.engine.save(directory)

    def export(self, directory: str) -> None:
        state = self.engine.full_state_dict()
        if self.engine.rank == 0:
            save_causal_lm(_policy_part(state), self.model_config, self.tokenizer, directory)


def write_policy_weights(state: dict[str, torch.Tensor], location: Path) -> None:
    """One safetensors file with Hugging Face names, appearing whole or not at all.

    Raises:
        ResourceError: the file system has too little room left, as /dev/shm in a container often has.
    """
    location.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    free = shutil.disk_usage(location).free
    if needed > free:
        raise ResourceError(
            f"publishing the policy's weights needs {needed / 2**20:,.0f} MiB, {location.parent} has "
            f"{free / 2**20:,.0f} MiB free. Enlarge it to hold two versions of the policy (docker run --shm-size, "
            "or mount -o remount,size=... /dev/shm), or delete what else lies there."
        )
    partial = location / f"{WEIGHTS_FILE}.partial"
    # Tied tensors share memory, which safetensors refuses; the engine needs lm_head.weight spelled out anyway.
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, partial)
    os.replace(partial, location / WEIGHTS_FILE)


def _policy_part(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("policy."): t for name, t in state.items() if name.startswith("policy.")}


def frozen_reference(policy: nn.Module, device: torch.device) -> Callable[..., torch.Tensor]:
    """A replicated reference policy as a function; gradients off."""
    module = policy.to(device).eval().requires_grad_(False)

    def reference(*arguments: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(*arguments)

    return reference
