"""What the stages of one job share: the workspace, the cluster, the data, the engines and the scoring service.

Actors are imported where a stage starts them: the first stage need not wait for what the third one brings.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, NoReturn

from cluster.autoscaler import Autoscaler
from cluster.placement import Placement, pack_bundles
from cluster.resources import check_plan, plan_resources
from cluster.rollout_plan import RolloutPlan, plan_rollouts
from cluster.session import node_resources, open_cluster, remove_from_nodes
from cluster.submission import job_id
from jobs.command_line import PREEMPTED, Options
from pipeline.config.engine_build import require_engine_for
from pipeline.config.recipe import Recipe
from pipeline.data.run_data import RunData, load_data
from pipeline.records import StageResult
from pipeline.stages.preemption import PreemptionNotice
from pipeline.stages.runner import StageRunner
from pipeline.stages.scaling_requests import forget_requests, requested_rollout_workers
from pipeline.stages.workspace import Workspace

if TYPE_CHECKING:
    from actors.rollout_pool import RolloutPool
    from actors.served_scorer import ServedScorer


class JobContext:
    """Starts engines and service when a stage first asks, and keeps them for the stages after it."""

    def __init__(self, recipe: Recipe, stages: StageRunner, rollout_plan: RolloutPlan, exits: ExitStack) -> None:
        self.recipe = recipe
        self.stages = stages
        self.rollout_plan = rollout_plan
        self._shared_gpus: Placement | None = None
        self._exits = exits
        self._pool: RolloutPool | None = None
        self._scorer: ServedScorer | None = None
        self._service: str | None = None

    @cached_property
    def data(self) -> RunData:
        """Read once for all stages."""
        return load_data(self.recipe)

    def rollouts(self, policy: StageResult) -> RolloutPool:
        """The pool, with engines of the policy's architecture; it holds whatever weights it was last given."""
        if self._pool is None:
            from actors.rollout_pool import RolloutPool
            from actors.worker_handle import EngineSettings, WorkerActors
            from pipeline.rollouts.numerics_gate import TOLERANCE

            recipe = self.recipe
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
                        gate_tolerance=alignment.gate_tolerance or TOLERANCE[recipe.policy.dtype],
                        seed=recipe.seed,
                        plan=self.rollout_plan,
                    ),
                    recipe.cluster.rollout,
                    recipe.cluster.deadlines,
                    actors=WorkerActors(placement=self.shared_gpus(), workspace=self.stages.workspace.uri),
                    requested_workers=lambda: requested_rollout_workers(self.stages.workspace.uri),
                    autoscaler=None if autoscale is None else Autoscaler(autoscale),
                )
            )
        return self._pool

    def shared_gpus(self) -> Placement | None:
        """The learner's GPUs with room for an engine on each, where the plan says so; kept as long as the engines."""
        if self._shared_gpus is None and self.rollout_plan.placement == "colocated":
            cluster = self.recipe.cluster
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
        if self._scorer is None:
            from actors.reward_service import start_service

            cluster, name = self.recipe.cluster, f"vrm-{self._identity()}"
            self._service = name
            self._scorer = start_service(
                reward_model.location,
                # Whether a row had been asked for before would decide with which others it shares a batch, and so its
                # last digits: a resumed run would not repeat an uninterrupted one.
                cluster.scoring.model_copy(update={"cache_entries": 0}),
                start_s=cluster.deadlines.start_s,
                deadline_s=cluster.deadlines.score_s,
                name=name,
            )
        return self._scorer

    def leave_service(self) -> None:
        """The last thing before the cluster is left."""
        if self._service is not None:
            from actors.reward_service import leave_service

            leave_service(self._service)

    @cached_property
    def publish_directory(self) -> str:
        """Shared memory for published weights, removed with the job."""
        return self._exits.enter_context(shared_memory(self.stages.workspace.uri))

    def _identity(self) -> str:
        """Of the workspace: what a killed job left on the cluster, its successor finds under the same name."""
        return identity(self.stages.workspace.uri)


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


@contextmanager
def open_job(options: Options) -> Iterator[JobContext]:
    """Workspace first, then the cluster: a locked workspace costs nothing."""
    recipe = options.recipe
    # The progress lines are the stages' own. Read as transformers is imported, which only some stages do.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ExitStack() as exits:
        notice = PreemptionNotice(recipe.cluster.deadlines.grace_s, lambda: leave_at_once(workspace, recipe))
        workspace = exits.enter_context(
            Workspace.open(options.workspace, job=job_id(), take_over=options.take_over, notice=notice)
        )
        require_engine_for(recipe.cluster.rollout.gpus_per_worker)
        forget_requests(workspace.uri)  # of the job before; this one hears them from now on
        exits.enter_context(open_cluster(recipe.cluster, ()))
        nodes = node_resources()
        rollout_plan = plan_rollouts(recipe, nodes)
        check_plan(plan_resources(recipe.cluster, rollout_plan.placement), nodes)
        job = JobContext(recipe, StageRunner(workspace), rollout_plan, exits)
        exits.enter_context(notice.watching())  # behind ray.init, which handles SIGTERM by leaving at once
        exits.callback(job.leave_service)
        yield job


def leave_at_once(workspace: Workspace, recipe: Recipe) -> NoReturn:
    """The end of a grace time that was too short, whatever the main thread is in.

    A Ray of our own ends with its driver. On a cluster that others run the scoring service may stay until the job that
    resumes takes its place.
    """
    try:
        print(
            "asked to end, and not ready to within cluster.deadlines.grace_s = "
            f"{recipe.cluster.deadlines.grace_s:g} s: what came after the last commit, if anything, is lost. The same "
            "command resumes.",
            file=sys.stderr,
            flush=True,
        )
        workspace.close()
    finally:
        os._exit(PREEMPTED)
