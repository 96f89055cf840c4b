"""The stages of an experiment in this process: those of the pipeline, with an engine and a sampler of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from pipeline.config.recipe import ExperimentConfig
from pipeline.data.run_data import RunData
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.experiments.shared_stages import from_root_or_computed
from pipeline.learning.builders import PPOLearnerSpec, build_ppo_learner, engine_in_process, reference_in_process
from pipeline.loops.align_policy import AlignmentPorts, alignment_stage, run_alignment
from pipeline.loops.benchmark import BenchmarkPorts, benchmark_prompts, benchmark_stage, run_benchmark
from pipeline.records import StageResult
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
        """The stage that aligns the policy against a reward model, finished in `directory`."""
        spec = alignment_stage(self.experiment, self.policy.fingerprint, reward_model.fingerprint)
        dtype, device = self.experiment.policy.dtype, self.device

        def open_ports(spec: PPOLearnerSpec) -> AbstractContextManager[AlignmentPorts]:
            learner = build_ppo_learner(spec, engine_in_process(device), reference_in_process(dtype, device))
            return nullcontext(AlignmentPorts(rollouts=self.rollouts, scorer=scorer, learner=learner))

        result = from_root_or_computed(
            spec,
            self.directory,
            lambda stage: run_alignment(
                stage,
                self.experiment,
                self.data,
                policy_uri=self.policy.location,
                reward_model_uri=reward_model.location,
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
                open_ports=lambda: BenchmarkPorts(rollouts=self.rollouts, scorer=scorer),
            ),
        )

    def load(self, policy: StageResult) -> None:
        """Gives the sampler a finished policy, which passes the numerics gate."""
        probes = benchmark_prompts(self.experiment, self.data, self.policy.location)[1]
        location, dtype = storage.join(self.publish_directory, "measured"), self.experiment.policy.dtype
        with storage.reading(policy.location) as checkpoint:
            self.rollouts.load_weights(publish_checkpoint(checkpoint, location, probes, dtype=dtype, version=0))


def scorer_in_process(experiment: ExperimentConfig, reward_model: StageResult, device: str) -> RewardModelScorer:
    """The reward model as a function."""
    budget = experiment.alignment.max_tokens_per_micro_batch
    with storage.reading(reward_model.location) as directory:
        return RewardModelScorer.load(directory, max_tokens_per_batch=budget, device=device)
