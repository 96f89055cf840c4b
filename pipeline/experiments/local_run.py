"""The stages of an experiment in this process: those of the pipeline, with an engine and a sampler of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from pipeline.config.recipe import ExperimentConfig
from pipeline.config.rewards import ModelReward
from pipeline.data.run_data import RunData
from pipeline.errors import ConfigError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.experiments.shared_stages import from_root_or_computed
from pipeline.learning.builders import PPOLearnerSpec, build_ppo_learner, engine_in_process, reference_in_process
from pipeline.loops.align_policy import AlignmentPorts, alignment_stage, run_alignment
from pipeline.loops.benchmark import BenchmarkPorts, benchmark_prompts, benchmark_stage, run_benchmark
from pipeline.records import StageResult
from pipeline.rewards.in_process import FunctionInProcess
from pipeline.rewards.opened import RewardOpeners, ScaledScorer, open_sources, rewards_of_model
from pipeline.rollouts.publishing import publish_checkpoint
from pipeline.rollouts.torch_rollouts import TorchRollouts
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory


@dataclass(frozen=True, kw_only=True)
class LocalRun:
    """One experiment in this process: what it starts from, and where its stages lie."""

    experiment: ExperimentConfig
    data: RunData
    policy: StageResult
    """The policy before alignment."""
    rollouts: TorchRollouts
    directory: str
    device: str

    @classmethod
    def open(
        cls, experiment: ExperimentConfig, data: RunData, policy: StageResult, *, directory: str, device: str
    ) -> LocalRun:
        """Loads the sampler."""
        with storage.reading(policy.location) as start:
            rollouts = TorchRollouts(
                start, dtype=experiment.policy.dtype, gate_tolerance=experiment.alignment.gate_tolerance, device=device
            )
        return cls(
            experiment=experiment, data=data, policy=policy, rollouts=rollouts, directory=directory, device=device
        )

    @property
    def publish_directory(self) -> str:
        """Where the sampler reads weights."""
        return storage.join(self.directory, "published")

    def align(self, reward_model: StageResult, scorer: RewardModelScorer) -> tuple[StageDirectory, StageResult]:
        """The stage that aligns the policy to its rewards, finished in `directory`.

        Args:
            reward_model: the reward model of this run, behind `scorer`.
        """
        dtype, device = self.experiment.policy.dtype, self.device
        needed = reward_model if self.experiment.alignment.needs_reward_model else None
        spec = alignment_stage(self.experiment, self.policy.fingerprint, None if needed is None else needed.fingerprint)

        def open_model(config: ModelReward) -> ScaledScorer:
            if config.is_served:
                raise ConfigError(
                    f"alignment.rewards: {config.place} is on a Ray cluster, and an experiment runs in one process. "
                    "Give the URL of the service."
                )
            other = None if config.is_of_this_run else scorer_in_process(self.experiment, config.place, device)
            return ScaledScorer.of(other or scorer, config.weights)

        @contextmanager
        def open_ports(spec: PPOLearnerSpec) -> Iterator[AlignmentPorts]:
            learner = build_ppo_learner(spec, engine_in_process(device), reference_in_process(dtype, device))
            openers = RewardOpeners(model=open_model, function=FunctionInProcess)
            with ExitStack() as exits:
                sources = open_sources(self.experiment.alignment.rewards, openers, exits)
                yield AlignmentPorts(rollouts=self.rollouts, sources=sources, learner=learner)

        result = from_root_or_computed(
            spec,
            self.directory,
            lambda stage: run_alignment(
                stage,
                self.experiment,
                self.data,
                policy_uri=self.policy.location,
                reward_model_uri=None if needed is None else needed.location,
                publish_directory=self.publish_directory,
                open_ports=open_ports,
            ),
        )
        return StageDirectory.shared(self.directory, spec), result

    def answer(self, aligned: StageResult, judge: StageResult, scorer: RewardModelScorer) -> StageResult:
        """The stage that answers held-out prompts before and after alignment, finished in `directory`.

        Args:
            judge: the reward model of `scorer`, which scores the answers.
        """
        return from_root_or_computed(
            benchmark_stage(self.experiment, self.policy.fingerprint, aligned.fingerprint, judge.fingerprint),
            self.directory,
            lambda stage: run_benchmark(
                stage,
                self.experiment,
                self.data,
                policy_uri=self.policy.location,
                aligned_uri=aligned.location,
                publish_directory=self.publish_directory,
                open_ports=lambda _: BenchmarkPorts(
                    rollouts=self.rollouts, rewards=rewards_of_model(ScaledScorer.of(scorer))
                ),
            ),
        )

    def load(self, policy: StageResult) -> None:
        """Gives the sampler a finished policy, which passes the numerics gate."""
        probes = benchmark_prompts(self.experiment, self.data, self.policy.location)[1]
        location, dtype = storage.join(self.publish_directory, "measured"), self.experiment.policy.dtype
        with storage.reading(policy.location) as checkpoint:
            self.rollouts.load_weights(publish_checkpoint(checkpoint, location, probes, dtype=dtype, version=0))


def scorer_in_process(experiment: ExperimentConfig, reward_model_uri: str, device: str) -> RewardModelScorer:
    """The reward model as a function."""
    budget = experiment.alignment.max_tokens_per_micro_batch
    with storage.reading(reward_model_uri) as directory:
        return RewardModelScorer.load(directory, max_tokens_per_batch=budget, device=device)
