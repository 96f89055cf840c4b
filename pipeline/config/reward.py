"""The reward model: its head, its losses, its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Fraction, Frozen, NonNegative, Positive
from pipeline.config.models import LoRAConfig, OptimiserConfig, _require_one_way_to_train_less


class VRMHeadConfig(Frozen):
    """The variational head (docs/method.md sections 2 and 14)."""

    decoder: Literal["bilinear", "hadamard", "mlp", "film"] = "bilinear"
    """r = g(w, z). "bilinear" <w, S z> and "hadamard" <w, z> explain a reward by its objectives, exactly.
    "mlp" and "film" are networks: they do not, and their posterior mean takes samples."""
    decoder_hidden_size: Count = 256
    """Width of the "mlp" and "film" decoders."""
    inference_draws: Annotated[int, Field(ge=2)] = 16
    """Posterior samples behind a score of the "mlp" and "film" decoders."""
    semantic_dims: Count = 16
    """d; as many as there are objectives for "hadamard"."""
    hidden_size: Count = 512
    """Width of the hidden layer of the weight head and of the feature head."""
    weight_param: Literal["softplus", "mean_conc"] = "mean_conc"
    """Concentrations one by one, or as mean times total concentration; their bounds then hold for the average one."""
    alpha_min: Positive = 0.05
    """Lower bound of the concentrations of the weights' Dirichlet."""
    alpha_max: Positive = 1000.0
    """Upper bound of the concentrations of the weights' Dirichlet."""
    prior_alpha: Positive | tuple[Positive, ...] = 30.0
    """Concentrations of the Dirichlet prior: one for all objectives, or a list with one for each."""
    logvar_min: float = -8.0
    """Lower bound of the log-variance of a feature."""
    logvar_max: float = 4.0
    """Upper bound of the log-variance of a feature."""
    initial_logvar: float = -6.0
    """Log-variance of the features at the first step. A small one starts nearly without noise."""
    learned_scale: bool = True
    """r = tau <w, s> with a learned tau > 0: scores keep the annotators' units, the reward gets the likelihood's. For
    the linear decoders only; the networks have a scale of their own."""

    @model_validator(mode="after")
    def _starts_inside_its_bounds(self) -> VRMHeadConfig:
        if not all(self.alpha_min < alpha < self.alpha_max for alpha in self.prior_concentrations(1)):
            raise ValueError(
                f"prior_alpha = {self.prior_alpha} must lie between alpha_min = {self.alpha_min} and "
                f"alpha_max = {self.alpha_max}, because the head starts at its prior"
            )
        if not self.logvar_min < self.initial_logvar < self.logvar_max:
            raise ValueError(
                f"initial_logvar = {self.initial_logvar} must lie between logvar_min = {self.logvar_min} and "
                f"logvar_max = {self.logvar_max}"
            )
        return self

    def prior_concentrations(self, num_objectives: int) -> tuple[float, ...]:
        """alpha_0: K concentrations, one for each objective."""
        return self.prior_alpha if isinstance(self.prior_alpha, tuple) else (self.prior_alpha,) * num_objectives


class EnsembleConfig(Frozen):
    """Several rewards of one response, and how they become one."""

    members: Annotated[int, Field(ge=2)] = 5
    """Linear rewards; each learns from its own share of the pairs."""
    reward: Literal["mean", "min"] = "mean"
    """How the members' rewards become one. Their standard deviation is reported beside it, so a lower confidence bound
    (`alignment.ppo.reward_transform: lcb`, `lcb` of the scoring service) is mean - c * sd."""


class VariationalLossConfig(Frozen):
    """L = BT + kl_weight_w KL_w + kl_weight_z (KL_zw + KL_zl) + supervision_weight L_sup (docs/method.md section 3).

    The gate has the supervision and no KL.
    """

    kl_weight_w: NonNegative = 1e-4
    """Weight of the KL of the objective weights. At 1, with z's at 1, the reward collapses to a constant."""
    kl_weight_z: NonNegative = 1e-4
    """Weight of the KL of the semantic features."""
    kl_warmup_fraction: Fraction = 0.3
    """Share of the steps in which both KL weights rise from 0."""
    kl_reduction: Literal["sum", "mean"] = "sum"
    """How the KL is taken over the dimensions of w and of z; the paper's KL is the sum."""
    free_bits: NonNegative = 0.0
    """KL_w below this, and the pair's KL_z below twice this, is free; in nats after `kl_reduction`."""
    score_weight: NonNegative | None = None
    """Weight of the squared error of the objective scores against their annotations, where there are any. None is 0.3
    for a head with objective scores and 0 for the others. At 0 nothing ties a score to the objective in its name."""
    supervision_weight: NonNegative = 0.1
    """Weight of the supervision loss that ties objective weights to annotated scores."""
    supervision_temperature: Positive = 1.0
    """tau of Eq. 13: a small one makes targets that follow the best objective alone."""
    supervision: Literal["kl", "mse", "mae", "rank"] = "kl"
    """Distance of the objective weights from their target (docs/method.md section 5)."""
    supervision_on: Literal["mean", "sample", "expected_log"] = "mean"
    """What is compared with the target: the weights' posterior mean, the sample that made the reward, or E_q[ln w]."""
    target_from: Literal["chosen", "diff", "both"] = "chosen"
    """Whose scores make the target: the chosen response's (the paper), the difference of the pair, the pair's mean."""

    @model_validator(mode="after")
    def _distance_fits_what_it_compares(self) -> VariationalLossConfig:
        if self.supervision_on == "expected_log" and self.supervision not in ("kl", "rank"):
            raise ValueError(
                f"supervision = {self.supervision!r} compares weights, but supervision_on = 'expected_log' gives "
                "logarithms that belong to no weights; use supervision 'kl' or 'rank', or supervision_on 'mean'"
            )
        return self


class PairLossConfig(Frozen):
    """The likelihood of a comparison: that of Eq. 12, or a variant that uses how clear the preference was."""

    form: Literal["bt", "margin", "scaled", "ties"] = "bt"
    """"margin" and "scaled" use the annotated margin of a pair, "ties" reads a margin of 0 as a tie.
    The metrics do not follow: nll is always the Bradley-Terry one, and a tie counts as any other pair."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of labels taken to be wrong; for "bt"."""
    margin_scale: Positive = 1.0
    """Multiplies the annotated margin in "margin" and "scaled"."""
    tie_threshold: Positive = 0.5
    """Rewards about this close tie in "ties"."""

    @model_validator(mode="after")
    def _smooths_plain_labels(self) -> PairLossConfig:
        if self.label_smoothing and self.form != "bt":
            raise ValueError(
                f"label_smoothing = {self.label_smoothing} belongs to form 'bt', not to {self.form!r}; "
                "set one of the two"
            )
        return self


class RewardConfig(Frozen):
    """Reward-model training (docs/method.md section 14)."""

    head: Literal["vrm", "gate", "regression", "bt", "bt_aux", "ensemble"] = "vrm"
    """The baselines are "gate", VRM without its posterior: a deterministic gate over objective scores as in ArmoRM.
    "regression" has a score per objective, fitted to the annotations as in HelpSteer2. "bt" is one linear reward, and
    "ensemble" several. "bt_aux" is "bt" with the annotations as an auxiliary task, weighed by `loss.score_weight`."""
    reward_weights: tuple[float, ...] = ()
    """Weight of each objective's score in the reward of "regression"; empty is the mean."""
    backbone: str | None = None
    """A checkpoint for the backbone; None starts from the prepared policy."""
    backbone_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """"auto" is bfloat16 where the processor of the job's driver multiplies it natively, else float32."""
    backbone_layers: Count | None = None
    """Keep only the first n transformer layers of the backbone, and its final norm; None keeps all. The last layers of
    a language model turn towards its next word: where the backbone does not train, layers in the middle may say more of
    a response, and cost less."""
    pooling: Literal["last", "mean"] = "last"
    """The state of a response that the head reads: that of its last token, or the mean over its tokens."""
    trainable_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only the last n transformer layers (and the final norm); None trains all, 0 freezes the backbone."""
    lora: LoRAConfig | None = None
    """Train adapters of the backbone; the checkpoint holds them merged."""
    vrm: VRMHeadConfig = VRMHeadConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    loss: VariationalLossConfig = VariationalLossConfig()
    pair_loss: PairLossConfig = PairLossConfig()
    batch_pairs: Count = 128
    """Pairs of an optimiser step, over all ranks."""
    num_steps: Count | None = None
    """Optimiser steps; None is one pass over the training pairs."""
    max_length: Count = 2048
    """Longest prompt with response, in tokens. Longer training pairs are left out and counted."""
    max_tokens_per_micro_batch: Count = 8192
    """Tokens of one forward and backward pass of a rank; bounds its memory and changes no result."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory for a third more time."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=9e-6)
    head_learning_rate: Positive = 9e-5
    """Peak learning rate of the head; that of the backbone is `optimiser.learning_rate`."""
    eval_every: Count = 50
    """Optimiser steps between two evaluations on held-out pairs."""
    max_eval_pairs: Count = 2048
    """Held-out pairs of an evaluation, at most."""
    checkpoint_every: Count = 50
    """Optimiser steps between two commits."""
    error_bar_pairs: Count = 2048
    """Training pairs that are read once more after training, for the error bars of rewards."""
    answer_error: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of confident answers of a comparison that may be wrong. Below the confidence that this takes, the service
    says that it cannot tell."""
    keep_best: Literal["eval/accuracy", "-eval/nll"] | None = None
    """End with the checkpoint that is best by this held-out metric (minus: lowest is best); None ends with the last."""

    @model_validator(mode="after")
    def _checkpoints_to_choose_from_are_evaluated(self) -> RewardConfig:
        if self.keep_best and self.checkpoint_every % self.eval_every:
            raise ValueError(
                f"keep_best = {self.keep_best!r} needs an evaluation at every checkpoint, but checkpoint_every = "
                f"{self.checkpoint_every} is no multiple of eval_every = {self.eval_every}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_train_less(self) -> RewardConfig:
        _require_one_way_to_train_less(self.trainable_layers, self.lora)
        return self

    @model_validator(mode="after")
    def _head_supports_its_options(self) -> RewardConfig:
        if self.head == "gate" and self.loss.supervision_on == "expected_log":
            raise ValueError("head = 'gate' has no posterior, so loss.supervision_on = 'expected_log' means nothing")
        if self.head == "gate" and self.vrm.decoder != "bilinear":
            raise ValueError(f"head = 'gate' is bilinear; vrm.decoder = {self.vrm.decoder!r} needs head = 'vrm'")
        if self.head == "vrm" and self.loss.score_weight and self.vrm.decoder in ("mlp", "film"):
            raise ValueError(
                f"loss.score_weight = {self.loss.score_weight}, but vrm.decoder = {self.vrm.decoder!r} has no "
                "objective scores; use 'bilinear' or 'hadamard'"
            )
        if self.reward_weights and self.head != "regression":
            raise ValueError(f"reward_weights belong to head = 'regression', not to {self.head!r}")
        return self


class JudgeConfig(Frozen):
    """A second reward model, which judges the aligned policy and which the policy is not trained on.

    It is trained as `reward` says, on prompts that the reward model does not see. What the policy learns to exploit in
    one of them is then less often a weakness of the other.
    """

    head: Literal["vrm", "gate", "regression", "bt", "bt_aux", "ensemble"] = "bt"
    """Head of the judge, one of `reward.head`."""
    seed: int = 1
    """Decides its first parameters, the order of its pairs, and which prompts are its own."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the training prompts that are the judge's; the reward model gets the others."""
