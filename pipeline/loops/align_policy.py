"""Stage 3: the policy, aligned against its rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.alignment import WHAT_IS_KEPT_OF_ROLLOUTS
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.prompts import PromptStream, tokenise_prompts
from pipeline.data.recipe_files import require_columns, reward_columns
from pipeline.data.run_data import RunData, data_fingerprints
from pipeline.errors import DataError
from pipeline.evaluation.overoptimization import GoldReward
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.builders import PPOLearnerSpec
from pipeline.loops.alignment import align
from pipeline.loops.alignment_observer import AlignmentObserver, KeptRollouts
from pipeline.loops.reward_scales import heldout_rollouts, scale_metrics, scales_of_run
from pipeline.loops.validation import Validation, ValidationPlan
from pipeline.models.backbone import load_tokenizer, require_context, require_lora_targets, require_same_tokens
from pipeline.models.reward_model import load_reward_tokenizer, read_backbone_config
from pipeline.models.reward_model_card import read_card
from pipeline.ports import BackgroundRolloutSource, PolicyLearner, RewardSources
from pipeline.records import Metrics
from pipeline.rewards.opened import (
    OpenedSource,
    combined_rewards,
    needs_measured_scales,
    rewards_of_single_responses,
)
from pipeline.rewards.source_files import reward_fingerprints
from pipeline.rollouts.kept_rollouts import RolloutFiles, what_was_kept
from pipeline.rollouts.kept_samples import SamplesOverTime
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.prefetch import StepPlan
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 3


@dataclass(frozen=True, kw_only=True)
class AlignmentPorts:
    """What an alignment needs from the outside world."""

    rollouts: BackgroundRolloutSource
    sources: Sequence[OpenedSource]
    """The entries of `alignment.rewards`, in order."""
    learner: PolicyLearner[Any, Any]


OpenAlignment = Callable[[PPOLearnerSpec], AbstractContextManager[AlignmentPorts]]


def alignment_stage(experiment: ExperimentConfig, policy: str, reward_model: str | None) -> StageSpec:
    """The identity of the alignment stage.

    Args:
        policy, reward_model: fingerprints of the stages whose results it reads; None without a reward model.
    """
    return StageSpec(
        name="align_policy",
        version=VERSION,
        config=experiment.model_dump(
            mode="json",
            include={"seed", "data", "alignment", "policy"},
            exclude={"alignment": set(WHAT_IS_KEPT_OF_ROLLOUTS)},
        ),
        inputs=(policy, *([] if reward_model is None else [reward_model])),
        data=(*data_fingerprints(experiment), *reward_fingerprints(experiment.alignment.rewards)),
        keep_checkpoints=experiment.alignment.keep_checkpoints,
        keep_best=experiment.alignment.keep_best,
    )


def run_alignment(
    stage: StageDirectory,
    experiment: ExperimentConfig,
    data: RunData,
    *,
    policy_uri: str,
    reward_model_uri: str | None,
    publish_directory: str,
    open_ports: OpenAlignment,
) -> Metrics:
    """Aligns the policy to its rewards and writes it to the stage's result. Returns the metrics of `align`.

    Args:
        policy_uri, reward_model_uri: what the policy starts from, and the reward model of this run; None without one.
        publish_directory: where the learner leaves its weights for the rollout engines.
        open_ports: opens the learner of a specification, with the engines and the rewards it works with.

    Raises:
        ConfigError: adapters on layers that the policy does not have, prompts and responses that exceed its context, or
            a separate critic with other tokens.
        DataError: a prompt lacks a column that a reward reads.
        NumericsError, Preempted: as `align`.
    """
    config, seed = experiment.alignment, experiment.seed
    tokenizer = checked_tokenizer(experiment, policy_uri, reward_model_uri)
    for identity, _ in data.train_prompts:
        require_columns(
            reward_columns(experiment), data.prompt_columns.get(identity, {}), place=f"data.prompts, prompt {identity}"
        )
    plan = validation_plan(experiment, data, tokenizer)
    prompts = tokenise_prompts(
        data.train_prompts,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_too_long=experiment.data.max_too_long,
        section="alignment",
    )
    print(
        f"{stage.name}  {len(prompts)} of {len(data.train_prompts)} prompts fit in {config.max_prompt_tokens} tokens",
        flush=True,
    )
    spec = PPOLearnerSpec(
        config=config,
        policy_uri=policy_uri,
        reward_model_uri=reward_model_uri,
        dtype=experiment.policy.dtype,
        probes=tuple(choose_probes(prompts, vocabulary_size=len(tokenizer), seed=seed)),
        publish_directory=publish_directory,
        seed=seed,
    )
    stream = PromptStream(prompts=tuple(prompts), seed=seed)
    objectives = objectives_of(reward_model_uri)
    with open_ports(spec) as ports:
        measured = measured_scales(ports, stage, experiment, data, tokenizer)
        columns = data.prompt_columns
        rewards = combined_rewards(ports.sources, config.combine_rewards, measured=measured, columns=columns)
        of_single = rewards_of_single_responses(ports.sources, measured=measured, columns=columns)
        step_plan = StepPlan(prompts=stream, config=config)
        metrics = align(
            ports.rollouts,
            rewards,
            ports.learner,
            stream,
            stage,
            config,
            reward_scale=rewards.scale,
            observer=observer_of(ports, of_single, stage, step_plan, plan, data, objectives),
        )
        if kept := what_was_kept(stage.metrics_rows()):
            print(f"{stage.name}  rollouts kept for `vrm rollouts`: {kept}", flush=True)
        return metrics | scale_metrics(measured) | ports.learner.peak_memory()


def checked_tokenizer(
    experiment: ExperimentConfig, policy_uri: str, reward_model_uri: str | None
) -> PreTrainedTokenizerBase:
    """The policy's, where policy, recipe and critic fit together. Raises ConfigError where they do not."""
    config = experiment.alignment
    with storage.reading(policy_uri) as directory:
        require_lora_targets(directory, config.ppo.lora, "alignment.ppo")
        tokenizer = load_tokenizer(directory)
        require_context(directory, config.max_prompt_tokens + config.max_response_tokens, "alignment")
    if reward_model_uri is not None and config.ppo.critic_reads_policy_tokens:
        with storage.reading(reward_model_uri) as directory:
            num_rows = int(read_backbone_config(directory).vocab_size)
            require_same_tokens(tokenizer, load_reward_tokenizer(directory), num_rows=num_rows)
    return tokenizer


def objectives_of(reward_model_uri: str | None) -> Sequence[str]:
    """Names of the reward model's objectives; none without one."""
    if reward_model_uri is None:
        return ()
    with storage.reading(reward_model_uri) as directory:
        return read_card(directory).objectives


def measured_scales(
    ports: AlignmentPorts,
    stage: StageDirectory,
    experiment: ExperimentConfig,
    data: RunData,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, RewardScale]:
    """Of the sources that bring no scale, on responses to held-out prompts; none where the combination needs none."""
    config = experiment.alignment
    if not needs_measured_scales(ports.sources, config.combine_rewards):
        return {}
    heldout = tokenise_prompts(data.heldout_prompts, tokenizer, max_prompt_tokens=config.max_prompt_tokens)
    return scales_of_run(
        stage,
        ports.sources,
        lambda: heldout_rollouts(ports.rollouts, ports.learner, heldout, config, seed=experiment.seed),
        data.prompt_columns,
    )


def validation_plan(
    experiment: ExperimentConfig, data: RunData, tokenizer: PreTrainedTokenizerBase
) -> ValidationPlan | None:
    """Which held-out prompts the policy answers while it is trained; None where there is none, and none is asked for.

    Raises:
        DataError: `alignment.eval_every` asks for held-out prompts, and none fits.
    """
    config = experiment.alignment
    try:
        heldout = tokenise_prompts(data.heldout_prompts, tokenizer, max_prompt_tokens=config.max_prompt_tokens)
    except DataError:
        heldout = []
    if not heldout and not config.eval_every:
        return None  # the report then shows no samples over time, which is no reason to train nothing
    return ValidationPlan.of(config, heldout, seed=experiment.seed)


def observer_of(
    ports: AlignmentPorts,
    rewards: RewardSources,
    stage: StageDirectory,
    steps: StepPlan,
    validated: ValidationPlan | None,
    data: RunData,
    objectives: Sequence[str],
) -> AlignmentObserver:
    """What looks at the alignment of a stage.

    Args:
        rewards: of responses that have no group.
    """
    config = steps.config
    gold = None if data.gold is None else GoldReward.of(data.gold, data.heldout_pairs)
    validation = None
    if validated is not None:
        validation = Validation(
            validated,
            ports.rollouts,
            rewards,
            ports.learner,
            SamplesOverTime(stage.uri, num_steps=config.num_steps),
            objectives=objectives,
            gold=gold,
        )
    kept = None
    if config.keep_rollouts != "none":
        files = RolloutFiles(
            stage.uri,
            keep=config.keep_rollouts,
            token_ids=config.keep_token_ids,
            max_mib=config.keep_rollouts_mib,
            objectives=objectives,
            seed=steps.prompts.seed,
        )
        kept = KeptRollouts(files=files, plan=steps, stage=stage.name)
    return AlignmentObserver(gold=gold, validation=validation, kept=kept)
