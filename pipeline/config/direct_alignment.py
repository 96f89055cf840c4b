"""Direct alignment: a policy learns from preference pairs, without a reward model and without sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Frozen, NonNegative, Positive
from pipeline.config.models import LoRAConfig, OptimiserConfig, _require_one_way_to_train_less


class LossWeights(Frozen):
    """The loss is a weighted sum of these (pipeline/objectives/direct_alignment.py); 0 leaves a term out."""

    sigmoid: NonNegative = 1.0
    """-log sigmoid of the margin of the implicit rewards: DPO, SimPO, CPO."""
    robust: NonNegative = 0.0
    """The same, unbiased where a share `label_smoothing` of the labels is flipped."""
    squared: NonNegative = 0.0
    """The squared distance of the margin, in nats, from 1 / (2 beta): IPO."""
    odds_ratio: NonNegative = 0.0
    """-log sigmoid of the log odds ratio: ORPO, where this weight is lambda."""
    kto: NonNegative = 0.0
    """KTO's value of single responses."""
    likelihood: NonNegative = 0.0
    """The negative log-likelihood of the chosen responses: the second term of CPO and ORPO."""

    @property
    def of_margins(self) -> float:
        """What the weights of the policy multiply."""
        return self.sigmoid + self.robust + self.squared

    @property
    def of_pairs(self) -> float:
        """More than 0 where a term compares the two responses of a pair."""
        return self.of_margins + self.odds_ratio


class DynamicBetaConfig(Frozen):
    """beta-DPO (Wu et al. 2024, arXiv:2407.08639): clear pairs pull the policy less far than unclear ones."""

    form: Literal["batch", "instance"] = "batch"
    """One beta for a step, from the mean margin of its pairs, or one for each pair."""
    sensitivity: NonNegative = 0.6
    """alpha, 1 / nats."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of the running mean and standard deviation of the margins, which start at 0 and 1 nat."""
    keep_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """rho: share of the pairs of a step that stay; pairs far from the running mean are drawn less often."""


class DifficultyConfig(Frozen):
    """Cross-fitting: each half of the prompts is scored by models that trained on the other half (Selective DPO).

    Source: Gao et al. 2025, "Principled data selection for alignment", and its code.
    """

    seeds: Count = 3
    """Splits into halves; each gives two models."""
    beta: Positive = 0.01
    """beta of the models that measure difficulty."""
    epochs: Count = 1
    """Passes of each of these models over its half of the pairs."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=6e-6)
    lora: LoRAConfig | None = LoRAConfig(rank=16, alpha=32)


class DirectConfig(Frozen):
    """Direct alignment (docs/method.md). `alignment.algorithm` chooses the values that make a method.

    The implicit reward of a response y is r(y) = beta * u(y). u(y) is log pi(y) - log pi_ref(y), summed over the tokens
    of the response; without `reference` it is log pi(y). With `length_normalised` it is divided by the tokens.
    """

    losses: LossWeights = LossWeights()
    beta: Positive = 0.1
    """How strongly the policy holds on to its reference; in SimPO the scale of the reward."""
    reference: bool = True
    """Compare with the policy before alignment. Its log-probabilities are computed once, before training."""
    reference_checkpoint: str | None = None
    """Another reference, a directory or a hub name with the same tokens; None is the policy before alignment."""
    length_normalised: bool = False
    """Divide log-probabilities by the tokens of their response: SimPO, and TRL's form of IPO (the paper's sums)."""
    target_margin: NonNegative = 0.0
    """SimPO's gamma, subtracted from the margin of rewards. Absolute: the authors' code asks for gamma / beta."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong, of the losses "sigmoid" (conservative DPO) and "robust"."""
    likelihood_average: Literal["none", "sequence", "token"] = "token"
    """Of the loss "likelihood": sums over tokens (CPO's paper), means of responses, or the mean over all tokens (the
    authors' code and TRL)."""
    weighting: Literal["none", "policy"] = "none"
    """"policy" weighs a pair by how likely the current policy is to write it: WPO (arXiv:2406.11827)."""
    wpo_clamp: bool = False
    """Hold WPO's weight of a pair at 1 or below, as the authors' code does; the paper and TRL do not."""
    dynamic_beta: DynamicBetaConfig | None = None
    desirable_weight: Positive = 1.0
    """KTO's lambda_D. With n_D desirable and n_U undesirable responses, lambda_D n_D / (lambda_U n_U) should lie in
    [1, 4/3]."""
    undesirable_weight: Positive = 1.0
    """KTO's lambda_U."""
    labelled_responses: tuple[str, ...] = ()
    """Files of single responses for KTO, JSONL or Parquet with `prompt`, `response` and `label`, a boolean. Training
    reads them in place of the pairs."""
    order: Literal["shuffled", "easy_first"] = "shuffled"
    """"easy_first" goes through the pairs from easy to hard, without shuffling: Selective DPO."""
    keep_easiest: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the pairs to train on, the easiest."""
    difficulty: DifficultyConfig = DifficultyConfig()
    """How the difficulty of a pair is measured; read where `order` or `keep_easiest` asks for it."""

    batch_pairs: Count = 128
    """Pairs of an optimiser step, over all shards; with `labelled_responses` single responses."""
    epochs: Count | None = None
    """Passes over the pairs; None is 1, where `num_steps` does not say how long to train."""
    num_steps: Count | None = None
    """Optimiser steps, in place of `epochs`; they also replace the epochs that `alignment.algorithm` stands for."""
    max_length: Count = 1024
    """Longest prompt with response, in tokens. Longer training pairs are left out and counted."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=5e-7, warmup_fraction=0.1)
    trainable_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only the last n layers, as `reward.trainable_layers` does."""
    lora: LoRAConfig | None = None
    """Train adapters; the reference is the policy without them, and the result holds them merged."""
    eval_every: Count = 50
    """Optimiser steps between two evaluations on held-out pairs."""
    max_eval_pairs: Count = 1024
    """Held-out pairs of an evaluation, at most."""
    checkpoint_every: Count = 50
    """Optimiser steps between two commits."""
    keep_best: Literal["eval/accuracy", "-eval/loss"] | None = None
    """End with the checkpoint that is best by this held-out metric (minus: lowest is best); None ends with the last."""

    @property
    def needs_difficulty(self) -> bool:
        return self.order == "easy_first" or self.keep_easiest < 1.0

    @field_validator("beta", mode="before")
    @classmethod
    def _beta_is_not_zero(cls, beta: Any) -> Any:
        if isinstance(beta, int | float) and beta == 0:
            raise ValueError("0 would make all implicit rewards 0; 0.1 is usual, in SimPO 2 to 10")
        return beta

    @model_validator(mode="after")
    def _one_way_to_train_less(self) -> DirectConfig:
        _require_one_way_to_train_less(self.trainable_layers, self.lora)
        return self

    @model_validator(mode="after")
    def _one_way_to_say_how_long(self) -> DirectConfig:
        if self.epochs is not None and self.num_steps is not None:
            raise ValueError(
                f"epochs = {self.epochs} and num_steps = {self.num_steps} both say how long to train; set one of the "
                "two to null"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_to_choose_from_are_evaluated(self) -> DirectConfig:
        if self.keep_best and self.checkpoint_every % self.eval_every:
            raise ValueError(
                f"keep_best = {self.keep_best!r} needs an evaluation at every checkpoint, but checkpoint_every = "
                f"{self.checkpoint_every} is no multiple of eval_every = {self.eval_every}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _there_is_a_loss(self) -> DirectConfig:
        losses = self.losses
        if not (losses.of_pairs or losses.kto or losses.likelihood):
            raise ValueError(
                "losses: no term has a weight above 0; set one of sigmoid, robust, squared, odds_ratio, kto and "
                "likelihood"
            )
        return self

    @model_validator(mode="after")
    def _settings_belong_to_a_loss(self) -> DirectConfig:
        losses = self.losses
        requirements = (
            (self.target_margin > 0, losses.sigmoid > 0, "target_margin", "losses.sigmoid"),
            (self.label_smoothing > 0, losses.sigmoid + losses.robust > 0, "label_smoothing", "losses.sigmoid"),
            (losses.robust > 0, self.label_smoothing > 0, "losses.robust", "label_smoothing"),
            (self.likelihood_average != "token", losses.likelihood > 0, "likelihood_average", "losses.likelihood"),
            (self.weighting == "policy", losses.of_margins > 0, "weighting = policy", "losses.sigmoid"),
            (self.wpo_clamp, self.weighting == "policy", "wpo_clamp", "weighting = policy"),
            (self.dynamic_beta is not None, losses.sigmoid > 0, "dynamic_beta", "losses.sigmoid"),
            (self.dynamic_beta is not None, self.reference, "dynamic_beta", "reference = true"),
            (self.desirable_weight != 1, losses.kto > 0, "desirable_weight", "losses.kto"),
            (self.undesirable_weight != 1, losses.kto > 0, "undesirable_weight", "losses.kto"),
            (bool(self.labelled_responses), losses.kto > 0, "labelled_responses", "losses.kto"),
            (losses.kto > 0, self.reference, "losses.kto", "reference = true"),
            (self.reference_checkpoint is not None, self.reference, "reference_checkpoint", "reference = true"),
        )
        for is_set, has_use, setting, needed in requirements:
            if is_set and not has_use:
                raise ValueError(f"{setting} means nothing without {needed}; set one of the two")
        if self.beta != 1 and not losses.of_margins and not losses.kto:
            raise ValueError(
                f"beta = {self.beta:g} scales no term of this loss; the strength of ORPO is losses.odds_ratio. Leave "
                "beta at 1"
            )
        return self

    @model_validator(mode="after")
    def _single_responses_are_not_compared(self) -> DirectConfig:
        if self.labelled_responses and self.losses.of_pairs:
            raise ValueError("labelled_responses are no pairs, so only losses.kto and losses.likelihood can use them")
        if self.labelled_responses and self.needs_difficulty:
            raise ValueError(
                "labelled_responses are no pairs and have no difficulty; set order=shuffled and keep_easiest=1"
            )
        if self.losses.kto and self.batch_pairs < 2:
            raise ValueError(
                "batch_pairs = 1: KTO compares every prompt with the response to another one of the same step, so it "
                "needs 2 at least; 128 is usual"
            )
        return self
