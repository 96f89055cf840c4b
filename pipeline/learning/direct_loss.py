"""The loss of direct alignment that a recipe asks for, from the terms in `pipeline/objectives/direct_alignment.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.config.direct_alignment import DirectConfig
from pipeline.objectives.direct_alignment import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    length_normalised,
    likelihood_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    wpo_pair_weights,
    wpo_response_weights,
)
from pipeline.objectives.preference import ranked_correctly
from pipeline.records import DirectBatch, Metrics


@dataclass(frozen=True, kw_only=True)
class Responses:
    """k responses to each of n prompts: the chosen and the rejected one of a pair, or one with a label."""

    logprobs: torch.Tensor
    """[n, k] log pi(y|x), nats; carries gradient in training."""
    log_collisions: torch.Tensor
    """[n, k] sum_t log sum_v pi(v)^2, nats; 0 where the loss does not weigh pairs by the policy."""
    lengths: torch.Tensor
    """[n, k] tokens."""
    desirable: torch.Tensor
    """[n, k] bool."""
    reference_logprobs: torch.Tensor | None
    """[n, k] log pi_ref(y|x), nats."""

    def log_ratios(self) -> torch.Tensor:
        """[n, k] h = log pi(y|x) - log pi_ref(y|x), nats."""
        assert self.reference_logprobs is not None, "the configuration of a loss with a reference asks for it"
        return self.logprobs - self.reference_logprobs


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Denominators of the losses of a step, over all shards and micro-batches."""

    rows: int
    responses: int
    desirable: int
    desirable_tokens: int
    undesirable_tokens: int

    @classmethod
    def of(cls, batch: DirectBatch, rows: torch.Tensor) -> StepCounts:
        """Of those rows [n] of a batch that the step trains on."""
        desirable = batch.desirable[rows]
        lengths = response_lengths(batch, rows)
        return cls(
            rows=len(rows),
            responses=desirable.numel(),
            desirable=int(desirable.sum()),
            desirable_tokens=int(lengths[desirable].sum()),
            undesirable_tokens=int(lengths[~desirable].sum()),
        )


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What the loss of a step takes from the whole batch; without gradient."""

    counts: StepCounts
    beta: torch.Tensor
    """A scalar, or [B] with one for each row of the batch."""
    reference_point: torch.Tensor
    """KTO's z0, a scalar, nats."""

    def betas(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows [n] of the batch: a scalar, or [n]."""
        return self.beta if self.beta.dim() == 0 else self.beta[rows.to(self.beta.device)]


def response_lengths(batch: DirectBatch, rows: torch.Tensor) -> torch.Tensor:
    """[n, k] int64 tokens of the responses of rows [n]."""
    return torch.tensor([[len(ids) for ids in batch.groups[row].response_ids] for row in rows.tolist()])


def loss_terms(
    responses: Responses, config: DirectConfig, *, counts: StepCounts, beta: torch.Tensor, reference_point: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The terms that the recipe gives a weight, by the names of `LossWeights`.

    Args:
        responses: n rows of the step.
        counts: of the whole step.
        beta: a scalar, or [n].
        reference_point: KTO's z0, nats.

    Returns:
        Scalars. Terms of shards and micro-batches add up to the term of the step.
    """
    losses = config.losses
    terms: dict[str, torch.Tensor] = {}
    if losses.of_margins:
        margins = _margin_losses(responses, config, beta)
        weights = _pair_weights(responses, config)
        terms |= {name: (weights * loss).sum() / counts.rows for name, loss in margins.items()}
    if losses.odds_ratio:
        means = length_normalised(responses.logprobs, responses.lengths)
        terms["odds_ratio"] = orpo_loss(*means.unbind(1)).sum() / counts.rows
    if losses.kto:
        value = kto_loss(
            responses.log_ratios(),
            responses.desirable,
            reference_point,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        terms["kto"] = value.sum() / counts.responses
    if losses.likelihood:
        nll = likelihood_loss(
            responses.logprobs[responses.desirable],
            responses.lengths[responses.desirable],
            average=config.likelihood_average,
            tokens_per_row=counts.desirable_tokens / max(1, counts.desirable),
        )
        terms["likelihood"] = nll.sum() / max(1, counts.desirable)
    return terms


def weighted_sum(terms: dict[str, torch.Tensor], config: DirectConfig) -> torch.Tensor:
    """The loss: sum_name w_name term_name."""
    return torch.stack([getattr(config.losses, name) * term for name, term in terms.items()]).sum()


def _margin_losses(responses: Responses, config: DirectConfig, beta: torch.Tensor) -> dict[str, torch.Tensor]:
    """[n] each."""
    chosen, rejected = unscaled_rewards(responses, config).unbind(1)
    losses, eps = config.losses, config.label_smoothing
    found: dict[str, torch.Tensor] = {}
    if losses.sigmoid and config.target_margin:
        found["sigmoid"] = simpo_loss(
            chosen, rejected, beta=config.beta, margin=config.target_margin, label_smoothing=eps
        )
    elif losses.sigmoid and not config.reference:
        found["sigmoid"] = cpo_loss(chosen, rejected, beta=config.beta, label_smoothing=eps)
    elif losses.sigmoid:
        found["sigmoid"] = dpo_loss(chosen - rejected, beta=beta, label_smoothing=eps)
    if losses.robust:
        found["robust"] = robust_dpo_loss(chosen - rejected, beta=config.beta, label_smoothing=eps)
    if losses.squared:
        found["squared"] = ipo_loss(chosen - rejected, beta=config.beta)
    return found


def _pair_weights(responses: Responses, config: DirectConfig) -> torch.Tensor:
    """[n], without gradient."""
    if config.weighting == "none":
        return torch.ones_like(responses.logprobs[:, 0])
    weights = wpo_response_weights(responses.logprobs, responses.log_collisions, responses.lengths)
    return wpo_pair_weights(*weights.unbind(1), clamp=config.wpo_clamp)


def unscaled_rewards(responses: Responses, config: DirectConfig) -> torch.Tensor:
    """[n, k] u(y): the implicit rewards are beta u(y) (`DirectConfig`)."""
    logprobs = responses.log_ratios() if config.reference else responses.logprobs
    return length_normalised(logprobs, responses.lengths) if config.length_normalised else logprobs


# ------------------------------------------------------------------ metrics


def metric_sums(responses: Responses, config: DirectConfig) -> dict[str, torch.Tensor]:
    """Scalars that add up over shards and micro-batches; `metric_means` divides them."""
    rewards = config.beta * unscaled_rewards(responses, config).detach()
    desirable = responses.desirable
    sums = {"chosen_reward": rewards[desirable].sum(), "rejected_reward": rewards[~desirable].sum()}
    if rewards.shape[1] == 2:
        sums["accuracy"] = ranked_correctly(rewards[:, 0] - rewards[:, 1]).sum()
    if config.weighting == "policy":
        sums["pair_weight"] = _pair_weights(responses, config).sum()
    if responses.reference_logprobs is not None:
        changes = responses.log_ratios().detach()
        sums |= {
            "chosen_change": changes[desirable].sum(),
            "rejected_change": changes[~desirable].sum(),
            "squared_change": changes.square().sum(),
        }
    return sums


def metric_means(sums: dict[str, torch.Tensor], counts: StepCounts, split: str) -> Metrics:
    """`<split>/*`: rewards, their margin and accuracy; how far the log-probabilities moved, a response and a token.

    `change_rms` is the root mean square of log pi(y) - log pi_ref(y) over the responses of the data, nats. It is no KL:
    the policy did not sample them.
    """
    totals = {name: float(total) for name, total in sums.items()}
    num_desirable, num_undesirable = counts.desirable, counts.responses - counts.desirable
    means = {
        "chosen_reward": totals["chosen_reward"] / max(1, num_desirable),
        "rejected_reward": totals["rejected_reward"] / max(1, num_undesirable),
    }
    means["margin"] = means["chosen_reward"] - means["rejected_reward"]
    means |= {name: totals[name] / counts.rows for name in ("accuracy", "pair_weight") if name in totals}
    if "squared_change" in totals:
        means |= {
            "chosen_change": totals["chosen_change"] / max(1, num_desirable),
            "rejected_change": totals["rejected_change"] / max(1, num_undesirable),
            "chosen_change_per_token": totals["chosen_change"] / max(1, counts.desirable_tokens),
            "rejected_change_per_token": totals["rejected_change"] / max(1, counts.undesirable_tokens),
            "change_rms": math.sqrt(totals["squared_change"] / counts.responses),
        }
    return {f"{split}/{name}": mean for name, mean in means.items()}
