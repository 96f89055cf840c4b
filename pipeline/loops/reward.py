"""Stage 2: the reward model, trained on preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from pipeline.config.recipe import ExperimentConfig
from pipeline.data.preferences import LeftOut, left_out_metrics
from pipeline.data.run_data import RunData, data_fingerprints
from pipeline.data.score_statistics import constant_scores
from pipeline.errors import ConfigError
from pipeline.evaluation.alarms import alarm_messages
from pipeline.learning.builders import RewardTrainerSpec
from pipeline.learning.reward_data import RewardData
from pipeline.loops.training import train
from pipeline.models.backbone import load_tokenizer, require_lora_targets
from pipeline.ports import CalibratedLearner
from pipeline.records import Metrics, PreferenceBatch
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

VERSION = 3

OpenRewardTrainer = Callable[[RewardTrainerSpec], AbstractContextManager[CalibratedLearner[PreferenceBatch]]]


def reward_stage(experiment: ExperimentConfig, policy: str) -> StageSpec:
    """The identity of the reward-training stage.

    Args:
        policy: fingerprint of the policy before alignment.
    """
    return StageSpec(
        name="train_reward_model",
        version=VERSION,
        config=experiment.model_dump(
            mode="json", include={"seed", "objectives", "own_objectives", "data", "reward", "judge"}
        ),
        inputs=(policy,),
        data=tuple(data_fingerprints(experiment)),
        keep_best=experiment.reward.keep_best,
    )


def judge_stage(experiment: ExperimentConfig, policy: str) -> StageSpec:
    """The identity of the stage that trains the judge; `experiment` has one.

    Args:
        policy: fingerprint of the policy before alignment.
    """
    return replace(reward_stage(experiment, policy), name="train_judge")


def as_judge(experiment: ExperimentConfig) -> ExperimentConfig:
    """The experiment whose reward model is the judge. Its data is `pairs_of_the_judge`.

    Raises:
        ConfigError: the recipe has no judge.
    """
    judge = experiment.judge
    if judge is None:
        raise ConfigError("judge = null: the recipe has no judge to train. Set judge.head, for example.")
    reward = experiment.reward.model_copy(update={"head": judge.head})
    return experiment.model_copy(update={"seed": judge.seed, "reward": reward})


def run_reward_training(
    stage: StageDirectory,
    experiment: ExperimentConfig,
    data: RunData,
    policy_uri: str,
    open_trainer: OpenRewardTrainer,
    *,
    states_uri: str | None = None,
) -> Metrics:
    """Trains the reward model and writes it to the stage's result. Returns the metrics of `RewardTraining.run`.

    Args:
        data: the pairs of this model, where the recipe has a judge.
        policy_uri: the policy whose decoder is the backbone, where the recipe names no other.
        open_trainer: opens the trainer of a specification, in this process or on Ray actors.
        states_uri: where the states of a frozen backbone are kept; None computes them as they are needed.

    Raises:
        ConfigError: adapters on layers that the model does not have.
        DataError: no pair fits, or pairs lack annotations that the head or the loss needs.
    """
    training = RewardTraining.prepare(experiment, data, experiment.reward.backbone or policy_uri)
    with open_trainer(replace(training.spec, states_uri=states_uri)) as trainer:
        return training.run(trainer, stage)


@dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """A reward training that is checked and has its data, but no trainer yet."""

    spec: RewardTrainerSpec
    data: RewardData
    num_pairs_read: int
    """Training pairs before those that are too long were left out."""
    left_out: Mapping[str, Mapping[LeftOut, int]]
    """Comparisons that gave no pair, by source and reason."""
    source_notes: Sequence[str]
    contamination: Metrics

    @classmethod
    def prepare(cls, experiment: ExperimentConfig, data: RunData, backbone_uri: str) -> RewardTraining:
        """Raises what `run_reward_training` raises."""
        with storage.reading(backbone_uri) as directory:
            require_lora_targets(directory, experiment.reward.lora, "reward")
            tokenizer = load_tokenizer(directory)
        training = RewardData.of(experiment, data, tokenizer)
        spec = RewardTrainerSpec(
            config=experiment.reward,
            backbone_uri=backbone_uri,
            statistics=training.statistics,
            num_steps=training.num_steps,
            seed=experiment.seed,
        )
        return cls(
            spec=spec,
            data=training,
            num_pairs_read=len(data.train_pairs),
            left_out=data.left_out,
            source_notes=data.source_notes,
            contamination=data.contamination.metrics() if data.contamination else {},
        )

    def about_the_data(self) -> Metrics:
        """Sizes of the splits, and what was left out by source and reason."""
        return self.data.metrics() | self.contamination | left_out_metrics(self.left_out)

    def notes(self, about_the_data: Metrics) -> list[str]:
        """What a run says of its data before it trains."""
        scales = dict(zip(self.data.statistics.objectives, self.data.statistics.scale_sources, strict=True))
        notes = [
            *self.source_notes,
            f"{len(self.data.compared_pairs)} of {self.num_pairs_read} training pairs fit in "
            f"{self.spec.config.max_length} tokens, {len(self.data.heldout_pairs)} pairs held out, "
            f"{about_the_data['data/shared_prompts']:.0f} prompts on both sides",
        ]
        if self.data.num_mismatched:
            notes.append(f"{self.data.num_mismatched} pairs more against responses to other prompts")
        if not self.data.statistics.has_scores:
            names = ", ".join(self.data.statistics.objectives)
            notes.append(f"no training pair has objective scores: no reason can be verified. Objectives: {names}")
        elif len(self.data.statistics.sources) > 1:
            listed = ", ".join(f"{objective} of {source}" for objective, source in scales.items())
            notes.append(f"scores are shown on the scale of the source with most annotations: {listed}")
        notes += [
            f"every score of {objective} in source {source} is {score:g}: it tells no response from another"
            for (source, objective), score in constant_scores(p.pair for p in self.data.compared_pairs).items()
        ]
        return notes + [f"{name} {count:.0f}" for name, count in self.contamination.items()]

    def run(self, trainer: CalibratedLearner[PreferenceBatch], stage: StageDirectory) -> Metrics:
        """Trains from the last commit; returns the held-out metrics of the finished model, memory, and the data's."""
        about_the_data = self.about_the_data()
        for note in self.notes(about_the_data):
            print(f"{stage.name}  {note}", flush=True)
        metrics = train(
            trainer,
            stage,
            batch_of=self.data.batch,
            heldout=self.data.heldout,
            num_steps=self.data.num_steps,
            eval_every=self.spec.config.eval_every,
            checkpoint_every=self.spec.config.checkpoint_every,
            evaluate_finished=lambda: trainer.calibrate(
                self.data.last_batches(self.spec.config.error_bar_pairs),
                self.data.heldout,
                self.data.mismatched_heldout,
            ),
        )
        for message in alarm_messages(metrics, are_pairs_scored=self.data.statistics.has_scores):
            print(f"{stage.name}  {message}", flush=True)
        return metrics | trainer.peak_memory() | about_the_data
