"""What a run is (`ExperimentConfig`, hashed into stage identities) and where it runs (`ClusterConfig`, never hashed).

A `Recipe` is an experiment plus the cluster it runs on. Rescaling the cluster can therefore never invalidate a
finished stage.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.alignment import AlignmentConfig
from pipeline.config.base import Frozen
from pipeline.config.benchmark import BenchmarkConfig
from pipeline.config.cluster import ClusterConfig
from pipeline.config.comparison import ComparisonConfig
from pipeline.config.data import DataConfig
from pipeline.config.models import PolicyConfig
from pipeline.config.profile import ProfileConfig
from pipeline.config.reward import JudgeConfig, RewardConfig
from pipeline.config.sft import SFTConfig

LoggerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class ExperimentConfig(Frozen):
    """What is computed. Two equal experiments have equal results, wherever they run."""

    name: str
    """Name of the recipe in logs and reports."""
    seed: int = 0
    """Seed of data order, initial weights, noise and sampling."""
    objectives: Annotated[tuple[str, ...], Field(min_length=2)]
    """The K objectives, in their fixed order."""
    own_objectives: bool = True
    """The user named the objectives. False where the names come from a recipe of the package: if no pair is scored,
    the objectives are then called factor 1 to factor K. Set by the reader of recipes."""
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    judge: JudgeConfig | None = None
    """An independent judge for the benchmark; None leaves all training pairs to the reward model."""
    alignment: AlignmentConfig = AlignmentConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Names of the K objectives that claim nothing of what they are."""
        return tuple(f"factor {k + 1}" for k in range(len(self.objectives)))

    @property
    def scores_by_reward_model(self) -> bool:
        """Whether a reward model of this run scores the benchmark. Direct methods train it for that alone."""
        return self.alignment.is_direct or self.alignment.needs_reward_model

    @model_validator(mode="after")
    def _sources_annotate_these_objectives(self) -> ExperimentConfig:
        for i, source in enumerate(self.data.sources):
            unknown = sorted({*(source.objectives or {}).values()} - {*self.objectives})
            if unknown:
                near = difflib.get_close_matches(unknown[0], self.objectives, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"data.sources[{i}].objectives: source {source.name!r} maps a column to {unknown[0]!r}, which is "
                    f"no objective of the recipe; its objectives are {', '.join(self.objectives)}.{hint}"
                )
        return self

    @model_validator(mode="after")
    def _mismatched_pairs_teach_something(self) -> ExperimentConfig:
        mismatched = next((source for source in self.data.sources if source.mismatched_pairs), None)
        head, form = self.reward.head, self.reward.pair_loss.form
        if mismatched and (head == "regression" or form != "bt"):
            raise ValueError(
                f"source {mismatched.name!r} has mismatched_pairs = {mismatched.mismatched_pairs:g}: pairs without "
                f"scores and margins, which head = {head!r} with pair_loss.form = {form!r} learns from; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _pairs_are_there_where_something_trains_on_them(self) -> ExperimentConfig:
        alignment = self.alignment
        learners = {
            "the reward model": (alignment.needs_reward_model, "alignment.rewards=[{math: answer}]"),
            "the judge": (self.judge is not None, "judge=null"),
            "supervised fine-tuning": (self.sft.num_steps > 0, "sft.num_steps=0"),
            f"algorithm = {alignment.algorithm}": (alignment.is_direct, "alignment.algorithm=grpo"),
        }
        for what, (is_there, cure) in learners.items():
            if is_there and not self.data.has_pairs:
                raise ValueError(
                    f"data.prompts without data.sources gives no pairs, and {what} learns from pairs; give "
                    f"data.sources, or set {cure}"
                )
        return self

    @model_validator(mode="after")
    def _rewards_have_columns_to_read(self) -> ExperimentConfig:
        needed = [(source.name, column) for source in self.alignment.rewards for column in source.columns]
        if needed and not self.data.prompts:
            name, column = needed[0]
            raise ValueError(
                f"alignment.rewards: {name!r} reads the column {column!r} of the prompts, and only prompt files have "
                "columns; give data.prompts"
            )
        return self

    @model_validator(mode="after")
    def _re_weighted_objectives_are_there(self) -> ExperimentConfig:
        for source in self.alignment.rewards:
            if source.model is None or not source.is_this_runs_model:
                continue
            unknown = sorted(source.model.weights.keys() - {*self.objectives})
            if unknown:
                raise ValueError(
                    f"alignment.rewards: {source.name!r} re-weighs {unknown[0]!r}, which is no objective of the "
                    f"recipe; its objectives are {', '.join(self.objectives)}"
                )
        return self

    @model_validator(mode="after")
    def _one_reward_weight_an_objective(self) -> ExperimentConfig:
        given = self.reward.reward_weights
        if given and len(given) != len(self.objectives):
            raise ValueError(
                f"reward.reward_weights has {len(given)} numbers for {len(self.objectives)} objectives; "
                f"give one for each of {', '.join(self.objectives)}"
            )
        return self

    @model_validator(mode="after")
    def _one_prior_concentration_an_objective(self) -> ExperimentConfig:
        given = self.reward.vrm.prior_concentrations(len(self.objectives))
        if len(given) != len(self.objectives):
            raise ValueError(
                f"reward.vrm.prior_alpha has {len(given)} numbers for {len(self.objectives)} objectives; "
                f"give one for each of {', '.join(self.objectives)}, or a single one for all"
            )
        return self

    @model_validator(mode="after")
    def _hadamard_pairs_weights_with_features(self) -> ExperimentConfig:
        vrm = self.reward.vrm
        if vrm.decoder == "hadamard" and vrm.semantic_dims != len(self.objectives):
            raise ValueError(
                f"reward.vrm.decoder = 'hadamard' multiplies weights and features one by one, but there are "
                f"{len(self.objectives)} objectives and semantic_dims = {vrm.semantic_dims}; "
                f"set reward.vrm.semantic_dims={len(self.objectives)}"
            )
        return self


class Recipe(ExperimentConfig):
    """An experiment and the cluster it runs on: one YAML file in `jobs/recipes/`."""

    cluster: ClusterConfig = ClusterConfig()
    comparison: ComparisonConfig = ComparisonConfig()
    logging: tuple[LoggerName, ...] = ("tensorboard",)
    """Where the numbers of metrics.jsonl go too: tensorboard, wandb, mlflow, trackio; [] is nowhere. A run for each
    stage; all runs of a workspace have one group. The libraries' own environment variables say where and how
    (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR). A logger that fails or waits does not end or delay the run."""
    profile: ProfileConfig = ProfileConfig()

    def could_share_gpus(self, gpus_per_worker: float) -> bool:
        """Whether engines and learner may take turns on the same GPUs, were there no others."""
        return gpus_per_worker == 1 and self.cluster.takes_whole_gpus(1) and not self._against_shared_gpus()

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

    @model_validator(mode="after")
    def _profiled_steps_are_steps_of_the_run(self) -> Recipe:
        beyond = [step for step in self.profile.steps if step >= self.alignment.num_steps]
        if self.profile.steps and self.alignment.is_direct:
            raise ValueError(
                f"profile.steps = {[*self.profile.steps]} records rollouts and updates of an alignment against a "
                f"reward, but alignment.algorithm = {self.alignment.algorithm} has no such steps; set profile.steps=[]"
            )
        if beyond:
            raise ValueError(
                f"profile.steps = {[*self.profile.steps]} names step {beyond[0]}, but alignment.num_steps = "
                f"{self.alignment.num_steps}: the last step is {self.alignment.num_steps - 1}, counted from 0"
            )
        return self
