"""Reward-model training, one rank's part of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pipeline.config.reward import PairLossConfig, VariationalLossConfig
from pipeline.evaluation.alarms import check_alarms
from pipeline.evaluation.reward_diagnostics import mismatched_accuracy, reward_diagnostics
from pipeline.learning.engine import TrainEngine
from pipeline.learning.memory import peak_memory
from pipeline.learning.micro_batches import MicroBatch, RowValues, Sums, own_micro_batches
from pipeline.learning.reward_calibration import calibrate_head
from pipeline.learning.schedule import LearningRateSchedule, warmup_factor
from pipeline.learning.training_state import TrainingStatePart
from pipeline.models.last_layer import pair_differences
from pipeline.models.reward_heads import (
    SCALE_SPEED,
    BradleyTerryAuxiliaryHead,
    GateHead,
    RegressionHead,
    RewardHead,
    RewardOutput,
    VRMHead,
)
from pipeline.models.reward_model import RewardModel, describe_reward_model, write_reward_weights
from pipeline.models.reward_model_card import RewardCalibration, RewardModelCard
from pipeline.objectives.preference import (
    bradley_terry_loss,
    margin_loss,
    ranked_correctly,
    scaled_loss,
    score_error,
    tie_loss,
)
from pipeline.objectives.variational import (
    dirichlet_kl,
    expected_log_weights,
    gaussian_kl,
    kl_penalty,
    log_weights,
    sample_dirichlet,
    weight_supervision,
)
from pipeline.records import Metrics, PreferenceBatch

SCORE_WEIGHT = 0.3
"""Where the recipe names none (docs/LOG.md, 2026-11-29): accuracy and the fidelity of scores are flat around it."""


class RewardTrainer:
    """Minimises the negative pairwise ELBO plus supervision. Implements `Learner[PreferenceBatch]`.

    L = 1/B sum_b [ -log sigmoid(r_w - r_l) + beta_w KL_w + beta_z (KL_zw + KL_zl) ] + lambda / B_sup sum_b L_sup

    The rewards are of one posterior sample. The betas are warmed up linearly from 0. B counts pairs, B_sup pairs with a
    supervision target, both over the whole batch and all ranks.

    Source: VRM, arXiv 2603.04974, Eqs. 11-14. The KL weights are far below 1: at 1 with fixed priors the optimum is a
    constant reward (docs/method.md section 3).

    The engine's module is a `RewardModel`. A gate has no KL. A Bradley-Terry head, or an ensemble of them, has only the
    first term. A regression head has only the squared error of its scores, averaged over the annotated ones.
    """

    def __init__(
        self,
        engine: TrainEngine,
        *,
        card: RewardModelCard,
        backbone_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        loss: VariationalLossConfig,
        pair_loss: PairLossConfig,
        schedule: LearningRateSchedule,
        max_tokens_per_micro_batch: int,
    ) -> None:
        self.engine = engine
        self.card = card
        self.backbone_config = backbone_config
        self.tokenizer = tokenizer
        self.loss = loss
        self.pair_loss = pair_loss
        self.schedule = schedule
        self.max_tokens = max_tokens_per_micro_batch
        self.score_weight = score_weight(engine.module.head, loss)
        self.training: Metrics = {}
        """Metrics of the latest update, for the alarms that compare training with held-out pairs."""
        self._squared_gradient = torch.zeros((), device=engine.device)
        """Squared norm of the loss's gradient at the output of the weight head, in the latest micro-batch."""
        if isinstance(engine.module.head, VRMHead | GateHead):
            engine.module.head.weight_head.register_forward_hook(self._record_gradient_norm)

    def restore(self, checkpoint: str) -> None:
        self.engine.load(checkpoint)

    def update(self, batch: PreferenceBatch, step: int) -> Metrics:
        self.engine.module.train()
        num_pairs, num_supervised, num_scores = _counts(batch)
        kl_factor = warmup_factor(step, num_steps=self.schedule.num_steps, warmup_fraction=self.loss.kl_warmup_fraction)
        sums = Sums()
        for micro in self._micro_batches(batch):
            output = self._forward(batch, micro)
            terms = self._terms(batch, micro, output)
            loss = (terms["pair_loss"] + kl_factor * terms["kl_penalty"]).sum() / num_pairs
            loss = loss + self.loss.supervision_weight * terms["supervision"].sum() / max(1, num_supervised)
            if self.score_weight:
                loss = loss + self.score_weight * terms["score_error"].sum() / max(1, num_scores)
            self.engine.backward(micro.weight * loss, last=micro.last)
            terms |= {"reward": output.mean.double(), "squared_reward": output.mean.double() ** 2}
            sums.add(micro.weight, **{name: term.sum() for name, term in terms.items()})
            sums.add(micro.weight, squared_gradient=self._squared_gradient)
        grad_norm = self.engine.step(self.schedule.factor(step))
        totals = sums.over_ranks(self.engine)
        mean, square = (float(totals[name]) / (2 * num_pairs) for name in ("reward", "squared_reward"))
        self.training = self._means(totals, batch, "train") | {
            "train/reward_std": max(0.0, square - mean**2) ** 0.5,
            "train/pairs": float(num_pairs),
        }
        if isinstance(self.engine.module.head, VRMHead | GateHead):
            norm = float(totals["squared_gradient"]) ** 0.5
            self.training["train/weight_head_gradient_norm"] = norm / self.engine.loss_factor
        return {
            **self.training,
            "grad_norm": grad_norm,
            "clipped": float(grad_norm > self.engine.max_grad_norm),
            "pairs": float(num_pairs),
            "tokens": float(sum(pair.num_tokens for pair in batch.pairs)),
        }

    def score(self, batch: PreferenceBatch) -> RewardOutput:
        """The head's output for the 2B rows of a whole batch, without gradient; on the CPU, equal on every rank."""
        self.engine.module.eval()
        rows = RowValues(2 * batch.num_pairs)
        with torch.no_grad():
            for micro in self._micro_batches(batch):
                output = self._forward(batch, micro)
                rows.put(micro.weight, _both(micro, batch), _side_by_side(output))
        return _split_fields(rows.over_ranks(self.engine), like=output)

    def evaluate(self, batch: PreferenceBatch) -> Metrics:
        return self._measure(batch, self.score(batch), None)

    def calibrate(
        self, batches: Sequence[PreferenceBatch], heldout: PreferenceBatch, mismatched: PreferenceBatch | None
    ) -> Metrics:
        """Fits error bar and calibration of the finished model (`calibrate_head`); returns its held-out metrics.

        Every rank computes the same numbers, because `score` gathers the rows of all ranks.
        """
        output = self.score(heldout)
        calibration, deviations = calibrate_head(
            self._head,
            map(self.score, batches),
            output,
            heldout.pairs,
            error=self.card.calibration.answer_error,
            delta=self.card.calibration.answer_delta,
        )
        self.card = self.card.model_copy(update={"calibration": calibration})
        metrics = self._measure(heldout, output._replace(deviations=deviations), calibration)
        if mismatched is not None:
            metrics |= mismatched_accuracy(pair_differences(self.score(mismatched).mean))
            self.card = self.card.model_copy(update={"metrics": metrics})
        return metrics

    @property
    def _head(self) -> RewardHead:
        model = self.engine.module
        assert isinstance(model, RewardModel), "a reward trainer trains a reward model"
        return model.head

    def _measure(self, batch: PreferenceBatch, output: RewardOutput, calibration: RewardCalibration | None) -> Metrics:
        """The metrics of an output, which also go into the card: the loop measures once more before it exports."""
        whole_batch = MicroBatch(rows=torch.arange(batch.num_pairs), weight=1.0, last=True, most_response_tokens=0)
        terms = self._terms(batch, whole_batch, output._replace(sampled=output.mean))
        totals = {name: term.double().sum() for name, term in terms.items()}
        metrics = self._means(totals, batch, "eval") | reward_diagnostics(
            RewardOutput(*(field.double() for field in output)), batch, self.card.objectives, calibration
        )
        metrics |= check_alarms(self.training | metrics)
        self.card = self.card.model_copy(
            update={
                "reward_mean": metrics["eval/reward_mean"],
                "reward_std": max(metrics["eval/reward_std"], 1e-6),
                "mean_contributions": mean_contributions(output),
                "metrics": metrics,
            }
        )
        return metrics

    def snapshot(self) -> TrainingStatePart:
        return self.engine.snapshot()

    def peak_memory(self) -> Metrics:
        return peak_memory(self.engine.device)

    def export(self, directory: str) -> None:
        last_layer = self._head.last_layer.named_buffers()
        # Under ZeRO-3 the engine knows parameters alone.
        stream = self.engine.stream().followed_by({f"head.last_layer.{name}": buffer for name, buffer in last_layer})
        weights, passed = stream.merged(self.engine.module).noting("head.units.rho")
        if self.engine.rank != 0:
            weights.read_to_the_end()
            return
        write_reward_weights(directory, weights)
        describe_reward_model(
            directory,
            backbone_config=self.backbone_config.to_dict(),
            tokenizer=self.tokenizer,
            card=self.card.model_copy(update={"scale": learned_scale(passed)}),
        )

    # ------------------------------------------------------------------ one micro-batch

    def _record_gradient_norm(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """A forward hook of the weight head."""

        def keep(gradient: torch.Tensor) -> None:
            self._squared_gradient = gradient.double().square().sum()

        if output.requires_grad:
            output.register_hook(keep)

    def _micro_batches(self, batch: PreferenceBatch) -> list[MicroBatch]:
        return list(own_micro_batches(batch.pairs, self.engine, self.max_tokens))

    def _forward(self, batch: PreferenceBatch, micro: MicroBatch) -> RewardOutput:
        packed = micro.pack([batch.pairs[row] for row in micro.rows.tolist()])
        return RewardOutput(*self.engine.forward(packed.to(self.engine.device), batch.noise_seeds[micro.rows]))

    def _terms(self, batch: PreferenceBatch, micro: MicroBatch, output: RewardOutput) -> dict[str, torch.Tensor]:
        """[n] per pair: the terms of the loss, and numbers that show a collapse of the posterior."""
        n = len(micro.rows)
        margins = output.sampled[:n] - output.sampled[n:]
        zeros = torch.zeros_like(margins)
        terms = {
            "nll": bradley_terry_loss(margins),
            "accuracy": ranked_correctly(margins),
            "margin": margins.abs(),
            "pair_loss": zeros,
            "kl_w": zeros,
            "kl_z": zeros,
            "kl_penalty": zeros,
            "supervision": zeros,
            "score_error": zeros,
        }
        head, alpha = self.engine.module.head, output.alpha[:n]
        if not isinstance(head, RegressionHead):
            terms["pair_loss"] = pair_loss(margins, batch.margins[micro.rows].to(margins.device), self.pair_loss)
        if isinstance(head, VRMHead):
            terms |= self._divergences(alpha, output)
        if isinstance(head, VRMHead | GateHead):
            terms["supervision"] = self._supervision(batch, micro, alpha, output.weights[:n])
        if self.score_weight:
            both = _both(micro, batch)
            device = margins.device
            error = score_error(
                output.annotation_scores, batch.scores[both].to(device), batch.score_mask[both].to(device)
            )
            terms["score_error"] = error[:n] + error[n:]
        return terms

    def _divergences(self, alpha: torch.Tensor, output: RewardOutput) -> dict[str, torch.Tensor]:
        """[n] nats per pair, and their weighted sum in the loss; `alpha` [n, K] is the chosen rows'."""
        n, prior, zero = len(alpha), self.card.vrm.prior_concentrations(alpha.shape[1]), output.mu.new_zeros(1)
        kl_w, kl_z = dirichlet_kl(alpha, alpha.new_tensor(prior)), gaussian_kl(output.mu, output.logvar, zero, zero)
        kl_z = kl_z[:n] + kl_z[n:]
        mean = self.loss.kl_reduction == "mean"
        penalty = kl_penalty(
            kl_w / (alpha.shape[-1] if mean else 1),
            kl_z / (output.mu.shape[-1] if mean else 1),
            weight_w=self.loss.kl_weight_w,
            weight_z=self.loss.kl_weight_z,
            free_bits=self.loss.free_bits,
        )
        return {"kl_w": kl_w, "kl_z": kl_z, "kl_penalty": penalty}

    def _supervision(
        self, batch: PreferenceBatch, micro: MicroBatch, alpha: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """[n] distance of the objective weights from their target; a gate has no `alpha` [n, K], only `weights`."""
        target, mask = (t[micro.rows].to(weights.device) for t in (batch.target, batch.target_mask))
        if not alpha.shape[1]:
            log_w = log_weights(weights, mask)
        elif self.loss.supervision_on == "mean":
            log_w = log_weights(alpha, mask)
        elif self.loss.supervision_on == "sample":  # equal seeds give the weights that made the reward
            log_w = log_weights(sample_dirichlet(alpha, batch.noise_seeds[micro.rows]), mask)
        else:
            log_w = expected_log_weights(alpha, mask)
        return weight_supervision(target, mask, log_w, self.loss.supervision)

    def _means(self, totals: dict[str, torch.Tensor], batch: PreferenceBatch, split: str) -> Metrics:
        """`<split>/*`: the totals of a whole batch, divided by their denominators."""
        num_pairs, num_supervised, num_scores = _counts(batch)
        names = ("nll", "accuracy", "margin", "kl_w", "kl_z")
        means = {f"{split}/{name}": float(totals[name]) / num_pairs for name in names}
        means[f"{split}/supervision"] = float(totals["supervision"]) / max(1, num_supervised)
        if self.score_weight:
            means[f"{split}/score_error"] = float(totals["score_error"]) / max(1, num_scores)
        return means


def mean_contributions(output: RewardOutput) -> tuple[float, ...]:
    """[K] mean of w_bar_k * s_k over rows; empty where the reward is no sum over objectives."""
    if not output.scores.shape[1]:
        return ()
    return tuple((output.weights.double() * output.scores.double()).mean(0).tolist())


def learned_scale(state_dict: Mapping[str, torch.Tensor]) -> float:
    """tau of a reward model's parameters; 1 where it has none."""
    rho = state_dict.get("head.units.rho")
    return 1.0 if rho is None else math.exp(SCALE_SPEED * float(rho))


def score_weight(head: object, loss: VariationalLossConfig) -> float:
    """Weight of the squared error of the scores: 1 where it is the whole loss, 0 where a head predicts no scores."""
    if isinstance(head, RegressionHead):
        return 1.0
    linear_vrm = isinstance(head, VRMHead) and head.decoder is None
    if not linear_vrm and not isinstance(head, GateHead | BradleyTerryAuxiliaryHead):
        return 0.0
    return SCORE_WEIGHT if loss.score_weight is None else loss.score_weight


def pair_loss(margins: torch.Tensor, annotated: torch.Tensor, config: PairLossConfig) -> torch.Tensor:
    """[B] the configured negative log-likelihood of B comparisons; `annotated` is NaN where the margin is unknown."""
    match config.form:
        case "bt":
            return bradley_terry_loss(margins, label_smoothing=config.label_smoothing)
        case "margin":
            return margin_loss(margins, annotated, scale=config.margin_scale)
        case "scaled":
            return scaled_loss(margins, annotated, scale=config.margin_scale)
        case "ties":
            return tie_loss(margins, annotated, threshold=config.tie_threshold)


def _counts(batch: PreferenceBatch) -> tuple[int, int, int]:
    """The denominators of the whole batch: pairs, pairs with a supervision target, annotated scores."""
    return batch.num_pairs, int(batch.target_mask.any(-1).sum()), int(batch.score_mask.sum())


def _both(micro: MicroBatch, batch: PreferenceBatch) -> torch.Tensor:
    """[2n] rows of the chosen, then of the rejected responses of n pairs."""
    return torch.cat([micro.rows, micro.rows + batch.num_pairs])


def _side_by_side(output: RewardOutput) -> torch.Tensor:
    """[n, columns]: the fields of n rows as one tensor, for one collective."""
    return torch.cat([field.view(len(field), _width(field)) for field in output], dim=1)


def _split_fields(packed: torch.Tensor, *, like: RewardOutput) -> RewardOutput:
    """The inverse of `_side_by_side`; the fields are as wide as those of `like`."""
    columns = packed.split([_width(field) for field in like], dim=1)
    return RewardOutput(*(c.squeeze(1) if field.dim() == 1 else c for c, field in zip(columns, like, strict=True)))


def _width(field: torch.Tensor) -> int:
    """Columns that a field takes in `_side_by_side`."""
    return 1 if field.dim() == 1 else field.shape[1]
