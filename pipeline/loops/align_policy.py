"""Stage 3: the policy, aligned against the reward model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from pipeline.config.recipe import ExperimentConfig
from pipeline.data.prompts import PromptStream, tokenise_prompts
from pipeline.data.run_data import RunData, data_fingerprints
from pipeline.evaluation.overoptimization import GoldReward
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.builders import PPOLearnerSpec
from pipeline.loops.alignment import align
from pipeline.models.backbone import load_tokenizer, require_context, require_lora_targets, require_same_tokens
from pipeline.models.reward_model import load_reward_tokenizer, read_backbone_config
from pipeline.models.reward_model_card import read_card
from pipeline.ports import BackgroundRolloutSource, PolicyLearner, RewardScorer
from pipeline.records import Metrics
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

VERSION = 3


@dataclass(frozen=True, kw_only=True)
class AlignmentPorts:
    """What an alignment needs from the outside world."""

    rollouts: BackgroundRolloutSource
    scorer: RewardScorer
    learner: PolicyLearner


OpenAlignment = Callable[[PPOLearnerSpec], AbstractContextManager[AlignmentPorts]]


def alignment_stage(experiment: ExperimentConfig, policy: str, reward_model: str) -> StageSpec:
    """The identity of the alignment stage.

    Args:
        policy, reward_model: fingerprints of the stages whose results it reads.
    """
    return StageSpec(
        name="align_policy",
        version=VERSION,
        config=experiment.model_dump(mode="json", include={"seed", "data", "alignment", "policy"}),
        inputs=(policy, reward_model),
        data=tuple(data_fingerprints(experiment)),
        keep_checkpoints=experiment.alignment.keep_checkpoints,
        keep_best=experiment.alignment.keep_best,
    )


def run_alignment(
    stage: StageDirectory,
    experiment: ExperimentConfig,
    data: RunData,
    *,
    policy_uri: str,
    reward_model_uri: str,
    publish_directory: str,
    open_ports: OpenAlignment,
) -> Metrics:
    """Aligns the policy against the reward model and writes it to the stage's result. Returns the metrics of `align`.

    Args:
        policy_uri, reward_model_uri: what the policy starts from, and what it is aligned against.
        publish_directory: where the learner leaves its weights for the rollout engines.
        open_ports: opens the learner of a specification, with the engines and the scorer it works with.

    Raises:
        ConfigError: adapters on layers that the policy does not have, prompts and responses that exceed its context, or
            a separate critic with other tokens.
        NumericsError, Preempted: as `align`.
    """
    config, seed = experiment.alignment, experiment.seed
    with storage.reading(policy_uri) as directory:
        require_lora_targets(directory, config.ppo.lora, "alignment.ppo")
        tokenizer = load_tokenizer(directory)
        require_context(directory, config.max_prompt_tokens + config.max_response_tokens, "alignment")
    with storage.reading(reward_model_uri) as directory:
        card = read_card(directory)
        if config.ppo.critic_reads_policy_tokens:
            num_rows = int(read_backbone_config(directory).vocab_size)
            require_same_tokens(tokenizer, load_reward_tokenizer(directory), num_rows=num_rows)
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
    with open_ports(spec) as ports:
        metrics = align(
            ports.rollouts,
            ports.scorer,
            ports.learner,
            PromptStream(prompts=tuple(prompts), seed=seed),
            stage,
            config,
            reward_scale=RewardScale.of(card),
            gold=None if data.gold is None else GoldReward.of(data.gold, data.heldout_pairs),
        )
        return metrics | ports.learner.peak_memory()
