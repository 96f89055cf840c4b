"""PPO and its family, one rank's part of it: evaluate rollouts, update, publish."""

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
from pipeline.data.collate import pad_right
from pipeline.errors import ResourceError
from pipeline.learning.algorithm import policy_loss
from pipeline.learning.engine import TrainEngine
from pipeline.learning.schedule import learning_rate_factor
from pipeline.learning.shards import Rows, Sums, own_micro_batches
from pipeline.models.backbone import save_causal_lm
from pipeline.models.critic import TokenStatistics
from pipeline.objectives.aggregation import MiniBatchSize
from pipeline.objectives.masked import masked_sum
from pipeline.objectives.policy import importance_ratio
from pipeline.objectives.value import clipped_value_loss
from pipeline.records import Experience, Metrics, PolicyWeights, ProbeSequence, Rollout, TokenEvaluation

WEIGHTS_FILE = "model.safetensors"


class PPOLearner:
    """Policy gradients with a frozen reference and, where the algorithm has one, a critic. Implements `PolicyLearner`.

    Minimises  L = L_policy + beta L_KL + c_v L_value  per mini-batch, for `ppo.epochs` passes over the batch. Every
    term is a sum over tokens divided by counts of the whole mini-batch. PPO has its KL in the reward (beta = 0 here),
    the group algorithms have no critic (no L_value).

    Source: Schulman et al. 2017, arXiv:1707.06347; vrm_spec sections 11 and 20. The engine's module is a
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
        probes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
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
        sequences = [r.prompt.token_ids + r.response_ids for r in rollouts]
        prompt_lengths = torch.tensor([len(r.prompt.token_ids) for r in rollouts])
        response_lengths = torch.tensor([len(r.response_ids) for r in rollouts])
        width = int(response_lengths.max())
        rows = Rows(len(rollouts))
        with torch.no_grad():
            for micro in own_micro_batches([len(s) for s in sequences], self.engine, self._max_tokens):
                arguments = self._arguments(
                    pad_right([sequences[row] for row in micro.rows.tolist()], self.tokenizer.pad_token_id),
                    prompt_lengths[micro.rows],
                    response_lengths[micro.rows],
                    width,
                )
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
            for b, n in enumerate(response_lengths.tolist())
        ]

    # ------------------------------------------------------------------ update

    def update(self, experience: Experience, step: int) -> Metrics:
        """`ppo.epochs` passes of mini-batches, or fewer when the policy has moved too far from the one that sampled."""
        self.engine.module.train()
        ppo = self.config.ppo
        factor = learning_rate_factor(step, num_steps=self.config.num_steps, warmup_fraction=ppo.policy.warmup_fraction)
        sums, norms, num_tokens = Sums(), [], 0
        for rows in self._mini_batches(len(experience.input_ids), step):
            size = MiniBatchSize(
                num_tokens=int(experience.mask[rows].sum()),
                num_responses=len(rows),
                max_response_tokens=self.config.max_response_tokens,
            )
            drift = Sums()
            norms.append(self._optimiser_step(experience, rows, size, factor, sums, drift))
            num_tokens += size.num_tokens
            if ppo.stop_update_above_kl is not None:
                moved = drift.over_ranks(self.engine)["approximate_kl"] / size.num_tokens
                if moved > ppo.stop_update_above_kl:
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
        self, experience: Experience, rows: torch.Tensor, size: MiniBatchSize, factor: float, sums: Sums, drift: Sums
    ) -> float:
        """Returns the gradient norm; adds this rank's share of the metrics to `sums`, and of the KL to `drift`."""
        ppo = self.config.ppo
        lengths = (experience.prompt_lengths + experience.response_lengths)[rows]
        for micro in own_micro_batches(lengths.tolist(), self.engine, self._max_tokens):
            own = rows[micro.rows]
            mask, old_logprobs, reference_logprobs, advantages, weights = self._on_device(
                own,
                experience.mask,
                experience.logprobs,
                experience.reference_logprobs,
                experience.advantages,
                experience.importance_weights,
            )
            width = int(lengths[micro.rows].max())
            now = TokenStatistics(
                *self.engine.forward(
                    *self._arguments(
                        experience.input_ids[own, :width],
                        experience.prompt_lengths[own],
                        experience.response_lengths[own],
                        experience.mask.shape[1],
                    )
                )
            )
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
            drift.add(micro.weight, approximate_kl=approximate_kl)
            sums.add(
                micro.weight,
                **terms,
                entropy=masked_sum(now.entropy, mask),
                clipped=policy.num_bounded,
                approximate_kl=approximate_kl,
                ratio=masked_sum(ratio, mask),
            )
        return self.engine.step(factor)

    def _on_device(self, rows: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[rows].to(self.engine.device) for tensor in tensors]

    def _arguments(
        self, input_ids: torch.Tensor, prompt_lengths: torch.Tensor, response_lengths: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, float]:
        device = self.engine.device
        return (
            input_ids.to(device),
            prompt_lengths.to(device),
            response_lengths.to(device),
            width,
            self.config.temperature,
        )

    @property
    def _max_tokens(self) -> int:
        return self.config.max_tokens_per_micro_batch

    # ------------------------------------------------------------------ publish and save

    def publish_weights(self, version: int) -> PolicyWeights:
        """Writes the policy where rollout workers of this node read it, with the gate's probes; keeps the last two."""
        probes = self._evaluate_probes()
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

    def _evaluate_probes(self) -> tuple[ProbeSequence, ...]:
        """Every rank runs every probe: they are few, and ZeRO-3 needs the company."""
        self.engine.module.eval()
        device = self.engine.device
        prompt_lengths = torch.tensor([len(p) for p, _ in self.probes], device=device)
        response_lengths = torch.tensor([len(r) for _, r in self.probes], device=device)
        input_ids = pad_right([p + r for p, r in self.probes], self.tokenizer.pad_token_id).to(device)
        width = int(response_lengths.max())
        with torch.no_grad():
            rows = TokenStatistics(
                *self.engine.forward(input_ids, prompt_lengths, response_lengths, width, 1.0)
            ).logprobs.tolist()
        return tuple(
            ProbeSequence(prompt_ids=p, response_ids=r, logprobs=tuple(row[: len(r)]))
            for (p, r), row in zip(self.probes, rows, strict=True)
        )

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
