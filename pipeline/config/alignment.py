"""Alignment of the policy: the KL penalty, the update, the loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.algorithms import DIRECT, Algorithm, with_standard_values
from pipeline.config.base import Count, Fraction, Frozen, NonNegative, Positive
from pipeline.config.direct_alignment import DirectConfig
from pipeline.config.models import LoRAConfig, OptimiserConfig, _require_one_way_to_train_less
from pipeline.config.policy_pairs import PolicyPairsConfig
from pipeline.config.rewards import THIS_RUNS_MODEL, RewardSourceConfig, require_usable_rewards

WHAT_IS_KEPT_OF_ROLLOUTS = frozenset({"keep_rollouts", "keep_token_ids", "keep_rollouts_mib"})
"""Settings of `alignment` that change no result, and so are no part of a stage's identity."""


def _share_of_prompts(written: Any) -> Any:
    """ "all", "none" or a number between them, or an error that says so."""
    if written in ("all", "none"):
        return written
    is_share = isinstance(written, int | float) and not isinstance(written, bool) and 0 < written < 1
    if not is_share:
        raise ValueError(f"{written!r:.80} is no share; give all, none, or a number above 0 and below 1, as in 0.1")
    return float(written)


class KLConfig(Frozen):
    """The KL penalty to the reference policy."""

    coefficient: NonNegative = 0.01
    """beta, reward per nat: what a nat away from the reference costs. With `target` it is the cost in the first step
    (Ziegler et al. 2019, arXiv:1909.08593). 0 is no penalty."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimates a token's KL, in nats, with k = log pi - log pi_ref: k, k^2 / 2, or exp(-k) - 1 + k (Schulman 2020).
    The logged KL, `target` and `stop_above` always use k1."""
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
    """The update of the policy: PPO and its family (docs/method.md section 11).

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
    """The ratio pi / pi_old of each token, or of the whole response: its geometric mean per token, or its product."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """"clip" bounds what a token can gain; "cispo" bounds its weight and keeps its gradient."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """Average over all tokens; over tokens of a response, then over responses; or the sum of tokens divided by
    responses * max_response_tokens."""
    clip_range: Positive = 0.2
    """The ratio is clipped to [1 - clip_range, 1 + clip_range_high] (Schulman et al. 2017, Eq. 7: epsilon)."""
    clip_range_high: Positive | None = None
    """Upper bound of the clip; None takes clip_range."""
    dual_clip_ratio: Annotated[float, Field(gt=1)] | None = None
    """Bounds the surrogate of a token with a negative advantage A at dual_clip_ratio * A; 3 is usual, None no bound."""
    tis_cap: Annotated[float, Field(ge=1)] | None = None
    """Weigh each token by min(pi_learner / pi_engine, tis_cap). It corrects for an engine whose distribution differs
    slightly from the learner's. 2 is usual, None weighs all tokens alike."""
    target_kl: Positive | None = None
    """End the update of a step, not the stage, after a mini-batch with a larger KL. It is the mean KL per token from
    the sampling policy, in nats; 0.01 to 0.05 is usual."""
    value_clip_range: Positive | None = 0.2
    """How far a value may move in one update, in units of the reward. A value farther from its old one gives a gradient
    only if that makes its error larger (PPO2; docs/method.md section 11). None is the plain squared error."""
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
    """How mean and standard deviation become the reward, in units of held-out rewards (docs/method.md section 11)."""
    lcb_coefficient: NonNegative = 1.0
    """lcb subtracts this many standard deviations of the reward (docs/method.md section 7) before the z-score."""
    reward_clip: Positive | None = 5.0
    """The transformed reward is clipped to +- this, before penalties (docs/method.md section 14); None is no bound."""
    whiten_rewards: bool = False
    """Divide the token rewards, KL included, by their standard deviation over the batch; their mean stays."""
    missing_eos_penalty: NonNegative = 1.0
    """Subtracted, after scaling, from responses cut at the length limit."""
    overlong_buffer: Fraction = 0.0
    """Share of max_response_tokens, at its end, over which the reward falls by 1, after scaling; 0 is no penalty."""
    drop_uniform_groups: bool = False
    """Leave out prompts whose responses all have the same reward."""
    policy: OptimiserConfig = OptimiserConfig(learning_rate=5e-7)
    """Optimiser of the policy, and of the critic but for the learning rate (docs/method.md section 14)."""
    critic_learning_rate: Positive = 9e-6
    """Peak rate of the critic and its value head; warm-up and decay are the policy's (docs/method.md section 14)."""
    critic: Literal["separate", "value_head"] = "separate"
    """"separate": a critic with its own backbone, initialised from the reward model's.
    "value_head": a scalar head on the policy's trunk. Read only where `advantages` is "gae"."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the beginning that train a separate critic alone, so that the policy's first advantages mean something;
    they are part of `num_steps`."""
    trainable_layers: Annotated[int, Field(ge=0)] | None = None
    """Train only the last n layers of the policy and of a separate critic, as `reward.trainable_layers` does."""
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
    def _critic_and_token_rewards_exist_where_options_need_them(self) -> PPOConfig:
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
    """Alignment of the policy: against the reward model, by PPO or an algorithm of its family, or to pairs directly.

    A direct method reads `direct`, `max_tokens_per_micro_batch`, `gradient_checkpointing` and `keep_checkpoints`.
    """

    num_steps: Count = 100
    """Steps: each samples, scores, updates and publishes once."""
    algorithm: Algorithm = "ppo"
    """A name for values of `kl` and `ppo`, or of `direct` (pipeline/config/algorithms.py). What stands beside it wins
    over them."""
    prompts_per_step: Count = 256
    """Prompts of a step."""
    samples_per_prompt: Count = 1
    """Responses sampled to each prompt of a step."""
    max_prompt_tokens: Count = 1024
    """Longest prompt, in tokens. Longer ones are left out and counted."""
    max_response_tokens: Count = 1024
    """Longest response, in tokens, at which sampling ends."""
    temperature: Positive = 1.0
    """Divides the logits, where responses are sampled and where the learner evaluates them."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling. The learner's probabilities are of the whole vocabulary, so keep it at 1
    (docs/method.md section 14)."""
    rewards: Annotated[tuple[RewardSourceConfig, ...], Field(min_length=1)] = (THIS_RUNS_MODEL,)
    """Where the reward of a response comes from; the reward model of this run where nothing else is written. Without
    `model: this_run` in it, no reward model is trained (docs/rewards.md)."""
    combine_rewards: Literal["sum", "gdpo"] = "sum"
    """How several sources become one reward. "sum": each in units of its held-out spread, times its weight; a single
    source keeps its own units. "gdpo": each normalised over the responses to its prompt, times its weight."""
    kl: KLConfig = KLConfig()
    ppo: PPOConfig = PPOConfig()
    direct: DirectConfig = DirectConfig()
    pairs: Literal["data", "policy"] = "data"
    """Where a direct method has its pairs from: the data of the recipe, or the policy, whose responses a reward model
    ranks. "policy" also reads the settings of sampling."""
    policy_pairs: PolicyPairsConfig = PolicyPairsConfig()
    max_tokens_per_micro_batch: Count = 8192
    """Tokens of one forward and backward pass of a rank; bounds its memory and changes no result."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory for a third more time."""
    checkpoint_every: Count = 10
    """Steps between two commits, from which a killed run resumes."""
    keep_checkpoints: Count = 2
    """How many commits stay on disk; the KL stop needs at least 2."""
    prefetch: Literal["continue", "discard"] | None = None
    """Sample the next step while the learner works on this one: responses come from the policy before its last update.
    When an update ends, requests that still wait are sampled from the new policy. For begun responses, "continue" lets
    the new policy finish them, and "discard" samples them again. None samples each step after its policy is published.
    """
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps from one validation to the next: held-out prompts, which are never trained on, are answered and measured
    (`eval/*`). The first is before step 1, the last after the last step. 0 is never, the default: what a validation
    costs depends on the recipe. It changes nothing in the training."""
    eval_prompts: Count = 64
    """Held-out prompts of a validation, one response each. They are drawn by seed, and the same at every validation."""
    eval_greedy: bool = False
    """Answer them with the most likely tokens; false samples at `temperature`, as training does."""
    keep_best: Literal["reward/mean", "reward/shaped", "eval/reward"] | None = None
    """End with the policy that is best by this metric; None ends with the last. "eval/reward" compares all policies
    that were validated after an update. The other two are of a step, and compare its commits. Rollouts of a step are
    drawn before its update, so they judge the policy that the update began with."""
    keep_rollouts: Annotated[Literal["all", "none"] | float, BeforeValidator(_share_of_prompts)] = "all"
    """Which rollouts are written to Parquet files, one a step, for `vrm rollouts`: "all", "none", or the share of the
    prompts, above 0 and below 1, that is kept with all its responses. The seed chooses, so a kept prompt is kept
    whenever it is sampled. No part of what a run is: it changes no result."""
    keep_token_ids: bool = False
    """Write the token ids of prompts and responses to these files too."""
    keep_rollouts_mib: Positive = 256
    """MiB that these files may take in a stage. What comes after is left out, and counted."""
    gate_tolerance: Positive | None = None
    """Largest mean absolute logprob difference between engine and learner after a weight update;
    None chooses 1e-4 for float32 and 0.2 for bfloat16."""

    @property
    def is_direct(self) -> bool:
        """Whether the policy learns from pairs, without reward model and rollouts."""
        return self.algorithm in DIRECT

    @model_validator(mode="before")
    @classmethod
    def _start_from_the_algorithm(cls, written: Any) -> Any:
        return with_standard_values(written)

    @property
    def samples_prompts(self) -> bool:
        """Whether the policy answers training prompts: all but direct methods on given pairs."""
        return not self.is_direct or self.pairs == "policy"

    @property
    def needs_reward_model(self) -> bool:
        """Whether this run trains a reward model: its scores are asked for."""
        if self.is_direct:
            return self.samples_prompts
        return any(source.is_this_runs_model for source in self.rewards)

    @model_validator(mode="after")
    def _rewards_fit_the_algorithm(self) -> AlignmentConfig:
        require_usable_rewards(self.rewards)
        if self.is_direct and self.rewards != (THIS_RUNS_MODEL,):
            raise ValueError(
                f"rewards are for algorithms that sample by themselves, and algorithm = {self.algorithm} learns from "
                "pairs; leave rewards out, or set algorithm=grpo"
            )
        if self.combine_rewards == "gdpo" and self.ppo.advantages != "group_centred":
            raise ValueError(
                "combine_rewards = gdpo normalises each reward over the responses to its prompt, and ppo.advantages = "
                f"{self.ppo.advantages} would not leave it so; set ppo.advantages=group_centred and "
                "ppo.whiten_advantages=true, the normalisation over the batch that GDPO ends with"
            )
        if self.combine_rewards == "gdpo" and self.keep_best is not None:
            raise ValueError(
                f"combine_rewards = gdpo gives every group a mean of 0, so keep_best = {self.keep_best} has nothing to "
                "compare; set keep_best=null"
            )
        if self.samples_per_prompt < 2 and (pairwise := [s.name for s in self.rewards if s.compares_a_group]):
            raise ValueError(
                f"rewards: {pairwise[0]!r} compares the responses to one prompt, so samples_per_prompt = "
                f"{self.samples_per_prompt} must be at least 2"
            )
        return self

    @model_validator(mode="after")
    def _pairs_of_the_policy_have_a_use(self) -> AlignmentConfig:
        direct, from_policy = self.direct, self.pairs == "policy"
        imitates = not (direct.losses.of_pairs or direct.losses.kto)
        if imitates and self.is_direct and not from_policy:
            raise ValueError(
                "direct.losses: no term with a weight above 0 compares responses, and pairs = data; set one of "
                "sigmoid, robust, squared, odds_ratio and kto, or pairs=policy to imitate the best own responses"
            )
        if not from_policy:
            return self
        if not self.is_direct:
            raise ValueError(
                f"pairs = policy belongs to direct methods, and algorithm = {self.algorithm} samples by itself; "
                "leave pairs out, or set algorithm=dpo"
            )
        if self.samples_per_prompt < 2:
            raise ValueError(
                f"pairs = policy ranks the responses to one prompt, so samples_per_prompt = {self.samples_per_prompt} "
                "must be at least 2; 8 is usual"
            )
        if direct.labelled_responses or direct.needs_difficulty:
            raise ValueError(
                "pairs = policy makes its pairs itself, so direct.labelled_responses, direct.order = easy_first and "
                "direct.keep_easiest mean nothing; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _the_best_policy_is_validated(self) -> AlignmentConfig:
        if self.keep_best == "eval/reward" and not self.eval_every:
            raise ValueError(
                "keep_best = eval/reward compares validated policies, but eval_every = 0 validates none; set "
                "eval_every, 10 for example, or keep_best=reward/mean"
            )
        return self

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
        if self.prefetch is not None and self.ppo.tis_cap is None:
            raise ValueError(
                f"prefetch = {self.prefetch} trains on samples of the policy before, so ppo.tis_cap must weigh "
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
