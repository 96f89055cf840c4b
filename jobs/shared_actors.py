"""Engines and scoring service that the stages of one job share.

Actors are imported where a stage starts them: the first stage need not wait for what the third one brings.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING

from cluster.autoscaler import Autoscaler
from cluster.placement import Placement, pack_bundles
from cluster.rollout_plan import RolloutPlan
from cluster.rollout_room import RolloutRoom
from cluster.session import remove_from_nodes
from pipeline.config.recipe import Recipe
from pipeline.config.rewards import SERVE_PREFIX, ModelReward
from pipeline.records import StageResult
from pipeline.stages.scaling_requests import publish_room, requested_rollout_workers

if TYPE_CHECKING:
    from actors.rollout_pool import RolloutPool
    from actors.served_scorer import ServedScorer
    from pipeline.rewards.function_spec import FunctionSpec
    from pipeline.rewards.opened import RewardOpeners
    from pipeline.rewards.rows import RewardSource


class SharedActors:
    """Starts engines and service when a stage first asks, and keeps them for the stages after it."""

    def __init__(
        self,
        recipe: Recipe,
        rollout_plan: RolloutPlan,
        workspace: str,
        exits: ExitStack,
        *,
        room: Callable[[], RolloutRoom],
    ) -> None:
        """Starts nothing yet.

        Args:
            workspace: where the job's results go.
            exits: the exit stack of the job; closing it ends the actors.
            room: how many rollout workers the cluster has room for now.
        """
        self.rollout_plan = rollout_plan
        self._recipe = recipe
        self._workspace = workspace
        self._exits = exits
        self._room = room
        self._last_request: int | None = None
        self._shared_gpus: Placement | None = None
        self._pool: RolloutPool | None = None
        self._scorers: dict[str, ServedScorer] = {}
        self._functions: dict[FunctionSpec, RewardSource] = {}

    def rollouts(self, policy: StageResult) -> RolloutPool:
        """The pool, with engines of the policy's architecture; it holds whatever weights it was last given."""
        if self._pool is None:
            from actors.rollout_pool import RolloutPool
            from actors.worker_handle import EngineSettings, WorkerActors
            from pipeline.rollouts.numerics_gate import GATE_TOLERANCE

            recipe = self._recipe
            alignment, benchmark = recipe.alignment, recipe.benchmark
            autoscale = recipe.cluster.rollout.autoscale
            self._pool = self._exits.enter_context(
                RolloutPool(
                    EngineSettings(
                        model_uri=policy.location,
                        dtype=recipe.policy.dtype,
                        max_model_len=max(
                            alignment.max_prompt_tokens + alignment.max_response_tokens,
                            benchmark.max_prompt_tokens + benchmark.max_response_tokens,
                        ),
                        gate_tolerance=alignment.gate_tolerance or GATE_TOLERANCE[recipe.policy.dtype],
                        seed=recipe.seed,
                        plan=self.rollout_plan,
                    ),
                    recipe.cluster.rollout,
                    recipe.cluster.deadlines,
                    actors=WorkerActors(placement=self.shared_gpus(), workspace=self._workspace),
                    requested_workers=self.requested_workers,
                    autoscaler=None if autoscale is None else Autoscaler(autoscale),
                )
            )
        return self._pool

    def requested_workers(self) -> int | None:
        """The number of rollout workers that the user asks for; says at once which of them find no room."""
        request = requested_rollout_workers(self._workspace)
        if request is not None and request != self._last_request:
            room = self._room()
            publish_room(self._workspace, asdict(room))
            print(f"{'rollout workers':<19} {room.remark(request) or f'{request} asked'}", flush=True)
        self._last_request = request
        return request

    def shared_gpus(self) -> Placement | None:
        """The learner's GPUs with room for an engine on each, where the plan says so; kept as long as the engines."""
        if self._shared_gpus is None and self.rollout_plan.placement == "colocated":
            cluster = self._recipe.cluster
            self._shared_gpus = pack_bundles(
                cluster.alignment.ranks,
                cpus=cluster.alignment.cpus_per_rank + cluster.rollout.cpus_per_worker,
                gpus=cluster.alignment.gpus_per_rank,
                timeout_s=cluster.deadlines.start_s,
                name="PPO learner with rollout engines",
                tenants=2,
            )
            self._exits.callback(self._shared_gpus.remove)
        return self._shared_gpus

    def scorer(self, reward_model: StageResult) -> ServedScorer:
        """The scoring service of this job's reward model."""
        return self._service(reward_model.location, self._service_name)

    def judge(self, judge: StageResult) -> ServedScorer:
        """The scoring service of this job's judge."""
        return self._service(judge.location, f"{self._service_name}-judge")

    def _service(self, model_uri: str, name: str) -> ServedScorer:
        if name not in self._scorers:
            from actors.reward_service import start_service

            cluster = self._recipe.cluster
            self._scorers[name] = start_service(
                model_uri,
                # No cache: a cached row would leave its batch, and the rows of a batch decide each other's last digits.
                # A resumed run would then not repeat an uninterrupted one.
                cluster.scoring.model_copy(update={"cache_entries": 0}),
                start_s=cluster.deadlines.start_s,
                deadline_s=cluster.deadlines.score_s,
                name=name,
            )
        return self._scorers[name]

    def reward_openers(self, reward_model: StageResult | None) -> RewardOpeners:
        """How this job opens its rewards: models behind the scoring service, functions in processes of their own.

        Args:
            reward_model: of this run; None where the recipe trains none.
        """
        from pipeline.rewards.opened import RewardOpeners, ScaledScorer, scale_of_checkpoint

        def open_model(config: ModelReward) -> ScaledScorer:
            if config.is_served:
                application = self._scorer_of_application(config)
                return ScaledScorer(scorer=_steered(application, config), scale=None)
            if config.is_of_this_run:
                assert reward_model is not None, "the recipe says so: `needs_reward_model`"
                scorer, location = self.scorer(reward_model), reward_model.location
            else:
                location = config.place
                scorer = self._service(location, f"{self._service_name}-{identity(location)}")
            return ScaledScorer(scorer=_steered(scorer, config), scale=scale_of_checkpoint(location))

        return RewardOpeners(model=open_model, function=self._function)

    def _scorer_of_application(self, config: ModelReward) -> ServedScorer:
        """An application of Serve that others started on this cluster."""
        from actors.reward_service import scorer_of_application

        return scorer_of_application(
            config.place.removeprefix(SERVE_PREFIX), self._recipe.cluster.scoring, deadline_s=config.deadline_s
        )

    def _function(self, spec: FunctionSpec) -> RewardSource:
        """The processes of a function, kept for the stages after this one."""
        if spec not in self._functions:
            from actors.reward_functions import FunctionProcesses

            cluster = self._recipe.cluster
            processes = FunctionProcesses(spec, cluster.reward_functions, start_s=cluster.deadlines.start_s)
            self._exits.callback(processes.close)
            self._functions[spec] = processes
        return self._functions[spec]

    def leave_service(self) -> None:
        """The last thing before the cluster is left."""
        if self._scorers:
            from actors.reward_service import leave_service

            for name in self._scorers:
                leave_service(name)

    @cached_property
    def publish_directory(self) -> str:
        """Shared memory for published weights, removed with the job."""
        return self._exits.enter_context(shared_memory(self._workspace))

    @property
    def _service_name(self) -> str:
        """A name made from the workspace, so that a job finds the service that its killed predecessor left."""
        return f"vrm-{identity(self._workspace)}"


def _steered(scorer: ServedScorer, config: ModelReward) -> ServedScorer:
    return scorer.steered(config.weights) if config.weights else scorer


@contextmanager
def shared_memory(owner: str) -> Iterator[str]:
    """A directory for published weights, on every node removed at the end; a killed job's successor reuses its place.

    Args:
        owner: where the job's results go.
    """
    base = "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()
    directory = os.path.join(base, f"vrm-weights-{os.getuid()}-{identity(owner)}")
    try:
        yield directory
    finally:
        remove_from_nodes(directory)


def identity(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:12]
