"""Direct alignment of a policy, one rank's part of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.config.direct_alignment import DirectConfig, DynamicBetaConfig
from pipeline.evaluation.alarms import DIRECT_ALARMS, check_alarms
from pipeline.learning.direct_loss import (
    Responses,
    StepCounts,
    StepValues,
    loss_terms,
    metric_means,
    metric_sums,
    response_lengths,
    unscaled_rewards,
    weighted_sum,
)
from pipeline.learning.engine import TrainEngine
from pipeline.learning.memory import peak_memory
from pipeline.learning.micro_batches import MicroBatch, RowValues, Sums, own_micro_batches
from pipeline.learning.schedule import LearningRateSchedule
from pipeline.learning.training_state import TrainingStatePart
from pipeline.models.backbone import write_causal_lm
from pipeline.models.packing import pack
from pipeline.objectives.direct_alignment import (
    RewardGaps,
    dynamic_beta,
    filter_weights,
    kto_reference_point,
    pairs_that_stay,
)
from pipeline.records import DirectBatch, Metrics, PromptGroup
from pipeline.stages import storage

GAPS_FILE = "reward_gaps.json"


class DirectAlignmentTrainer:
    """Minimises a weighted sum of direct-alignment losses. Implements `DirectLearner`.

    L = sum_name w_name / N_name sum_b L_name,b

    The terms are in `pipeline/objectives/direct_alignment.py`. N counts the pairs of the whole step, for KTO its
    responses. What a loss takes from the whole batch (KTO's reference point, beta-DPO's beta) is measured before the
    gradient, in a forward pass of its own, so it does not depend on shards or micro-batches.

    The engine's module is a `ResponsePolicy`. Log-probabilities of the reference come with the batch.
    """

    def __init__(
        self,
        engine: TrainEngine,
        *,
        config: DirectConfig,
        model_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        schedule: LearningRateSchedule,
        max_tokens_per_micro_batch: int,
    ) -> None:
        self.engine = engine
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.max_tokens = max_tokens_per_micro_batch
        self.gaps = RewardGaps(mean=0.0, std=1.0)
        """beta-DPO's running statistics; part of a checkpoint."""

    def restore(self, checkpoint: str) -> None:
        self.engine.load(checkpoint)
        if self.config.dynamic_beta is not None:
            with open(os.path.join(checkpoint, GAPS_FILE)) as stream:
                self.gaps = RewardGaps(**json.load(stream))

    def logprobs(self, groups: Sequence[PromptGroup]) -> torch.Tensor:
        """[B, k] float32 on the CPU, equal on every rank: log pi(y|x) of every response."""
        return self._measured(groups, with_collisions=False)[..., 0]

    # ------------------------------------------------------------------ update

    def update(self, batch: DirectBatch, step: int) -> Metrics:
        stay, values = self._step_values(batch)
        self.engine.module.train()
        sums = Sums()
        groups = [batch.groups[row] for row in stay.tolist()]
        for micro in own_micro_batches(groups, self.engine, self.max_tokens):
            rows = stay[micro.rows]
            responses = self._forward(batch, rows, micro)
            terms = self._terms(responses, values, rows)
            loss = weighted_sum(terms, self.config)
            self.engine.backward(micro.weight * loss, last=micro.last)
            sums.add(micro.weight, loss=loss, **{f"loss_{name}": term for name, term in terms.items()})
            sums.add(micro.weight, **metric_sums(responses, self.config))
        factor = self.schedule.factor(step)
        grad_norm = self.engine.step(factor)
        totals = sums.over_ranks(self.engine)
        return {
            **self._losses(totals, "train"),
            **metric_means(totals, values.counts, "train"),
            **self._measured_of_the_step(batch, values),
            "grad_norm": grad_norm,
            "clipped": float(grad_norm > self.engine.max_grad_norm),
            "learning_rate": self.config.optimiser.learning_rate * factor,
            "rows": float(values.counts.rows),
            "tokens": float(sum(group.num_tokens for group in groups)),
        }

    def _step_values(self, batch: DirectBatch) -> tuple[torch.Tensor, StepValues]:
        """The rows [n] of the batch that the step trains on, and what their losses take from the whole batch."""
        values = self._plain_values(batch)
        stay = torch.arange(batch.num_rows)
        dynamic = self.config.dynamic_beta
        if dynamic is None:
            return stay, values
        measured = self._responses(batch, self._measured(batch.groups, with_collisions=False))
        chosen, rejected = unscaled_rewards(measured, self.config).unbind(1)
        margins = chosen - rejected
        if dynamic.keep_share < 1.0:
            generator = torch.Generator().manual_seed(batch.seed)
            weights = filter_weights(margins, self.gaps)
            stay = pairs_that_stay(weights, share=dynamic.keep_share, generator=generator).nonzero().squeeze(1)
        beta = self._dynamic_beta(margins, stay, dynamic)
        self.gaps = self.gaps.updated(margins, momentum=dynamic.momentum)
        return stay, replace(values, counts=StepCounts.of(batch, stay), beta=beta.to(self.engine.device, torch.float32))

    def _dynamic_beta(self, margins: torch.Tensor, stay: torch.Tensor, dynamic: DynamicBetaConfig) -> torch.Tensor:
        """A scalar from the pairs that stay, or one for each of all pairs [B]."""
        compared = margins[stay].mean() if dynamic.form == "batch" else margins
        return dynamic_beta(compared, self.gaps, beta=self.config.beta, sensitivity=dynamic.sensitivity)

    def _plain_values(self, batch: DirectBatch) -> StepValues:
        """Of a step that trains on all rows with the beta of the recipe."""
        device = self.engine.device
        reference_point = torch.zeros(())
        if batch.mismatched is not None:
            logprobs = self._measured(batch.mismatched.groups, with_collisions=False)[..., 0]
            reference_point = kto_reference_point((logprobs - batch.mismatched.reference_logprobs).flatten())
        return StepValues(
            counts=StepCounts.of(batch, torch.arange(batch.num_rows)),
            beta=torch.tensor(self.config.beta, device=device),
            reference_point=reference_point.to(device),
        )

    def _measured_of_the_step(self, batch: DirectBatch, values: StepValues) -> Metrics:
        measured = {}
        if self.config.losses.kto:
            measured["kto/reference_point"] = float(values.reference_point)
        if self.config.dynamic_beta is not None:
            measured |= {
                "beta_dpo/beta": float(values.beta.mean()),
                "beta_dpo/running_margin": self.gaps.mean,
                "beta_dpo/left_out": float(batch.num_rows - values.counts.rows),
            }
        return measured

    # ------------------------------------------------------------------ evaluate

    def evaluate(self, batch: DirectBatch) -> Metrics:
        """`eval/*` of held-out pairs, with the beta of the recipe and every pair; changes nothing."""
        values = self._plain_values(batch)
        measured = self._measured(batch.groups, with_collisions=self._needs_collisions)
        responses = self._responses(batch, measured)
        terms = loss_terms(
            responses,
            self.config,
            counts=values.counts,
            beta=values.beta.cpu(),
            reference_point=values.reference_point.cpu(),
        )
        sums = metric_sums(responses, self.config) | {f"loss_{name}": term for name, term in terms.items()}
        sums["loss"] = weighted_sum(terms, self.config)
        metrics = self._losses(sums, "eval") | metric_means(sums, values.counts, "eval")
        return metrics | check_alarms(metrics, DIRECT_ALARMS)

    def _losses(self, sums: dict[str, torch.Tensor], split: str) -> Metrics:
        """The loss, and its terms where there are several."""
        names = [name for name in sums if name.startswith("loss_")]
        losses = {f"{split}/loss": float(sums["loss"])}
        return losses | ({f"{split}/{name}": float(sums[name]) for name in names} if len(names) > 1 else {})

    # ------------------------------------------------------------------ forward passes

    @property
    def _needs_collisions(self) -> bool:
        return self.config.weighting == "policy"

    def _forward(self, batch: DirectBatch, rows: torch.Tensor, micro: MicroBatch) -> Responses:
        """The rows [n] of a micro-batch, with gradient."""
        device = self.engine.device
        packed = pack([batch.groups[row] for row in rows.tolist()], most_response_tokens=micro.most_response_tokens).to(
            device
        )
        logprobs, collisions = self.engine.forward(packed, self._needs_collisions)
        reference = batch.reference_logprobs
        return Responses(
            logprobs=_by_row(logprobs, len(rows)),
            log_collisions=_by_row(collisions, len(rows)),
            lengths=_by_row(packed.response_lengths, len(rows)),
            desirable=batch.desirable[rows].to(device),
            reference_logprobs=None if reference is None else reference[rows].to(device),
        )

    def _terms(self, responses: Responses, values: StepValues, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return loss_terms(
            responses,
            self.config,
            counts=values.counts,
            beta=values.betas(rows),
            reference_point=values.reference_point,
        )

    def _measured(self, groups: Sequence[PromptGroup], *, with_collisions: bool) -> torch.Tensor:
        """[B, k, 2] float32 on the CPU, equal on every rank: both sums of `ResponsePolicy`, without gradient."""
        self.engine.module.eval()
        values = RowValues(len(groups))
        with torch.no_grad():
            for micro in own_micro_batches(groups, self.engine, self.max_tokens):
                own = [groups[row] for row in micro.rows.tolist()]
                packed = pack(own, most_response_tokens=micro.most_response_tokens).to(self.engine.device)
                both = [_by_row(sums, len(own)) for sums in self.engine.forward(packed, with_collisions)]
                values.put(micro.weight, micro.rows, torch.stack(both, dim=-1))
        return values.over_ranks(self.engine)

    def _responses(self, batch: DirectBatch, measured: torch.Tensor) -> Responses:
        """The whole batch, on the CPU in float64."""
        reference = batch.reference_logprobs
        return Responses(
            logprobs=measured[..., 0].double(),
            log_collisions=measured[..., 1].double(),
            lengths=response_lengths(batch, torch.arange(batch.num_rows)),
            desirable=batch.desirable,
            reference_logprobs=None if reference is None else reference.double(),
        )

    # ------------------------------------------------------------------ save

    def snapshot(self) -> DirectSnapshot:
        gaps = None if self.config.dynamic_beta is None else self.gaps
        return DirectSnapshot(part=self.engine.snapshot(), gaps=gaps)

    def peak_memory(self) -> Metrics:
        return peak_memory(self.engine.device)

    def export(self, directory: str) -> None:
        policy = self.engine.stream().merged(self.engine.module).below("policy.")
        if self.engine.rank == 0:
            write_causal_lm(policy, self.model_config, self.tokenizer, directory)
        else:
            policy.read_to_the_end()


@dataclass(frozen=True, kw_only=True)
class DirectSnapshot:
    """A copy of one rank's part of the state, and beta-DPO's running statistics. A `Snapshot`."""

    part: TrainingStatePart
    gaps: RewardGaps | None

    def write(self, uri: str) -> None:
        self.part.write(uri)
        if self.gaps is not None and self.part.part == 0:
            with storage.writing(uri) as directory, open(os.path.join(directory, GAPS_FILE), "w") as stream:
                json.dump(asdict(self.gaps), stream)


def _by_row(per_response: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[R] in packed order, the first responses of all rows before the second ones, to [num_rows, k]."""
    return per_response.view(-1, num_rows).T
