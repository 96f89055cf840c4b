"""How a job of the pipeline opens: workspace, cluster, and what its stages are given from there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from typing import NoReturn

from cluster.engine_build import require_engine_for
from cluster.planning.plan_text import check_memory
from cluster.resources import check_plan
from cluster.rollout_plan import plan_of_stages, plan_rollouts
from cluster.rollout_room import RolloutRoom
from cluster.session import node_resources, open_cluster, process_logs
from cluster.submission import job_id
from jobs.command_line import JobOptions
from jobs.exit_codes import PREEMPTED
from jobs.shared_actors import SharedActors
from pipeline.config.recipe import Recipe
from pipeline.data.run_data import RunData, load_data
from pipeline.models.native_dtype import with_native_dtype
from pipeline.stages.preemption import PreemptionNotice
from pipeline.stages.runner import StageRunner, installed_versions
from pipeline.stages.scaling_requests import forget_requests, publish_room
from pipeline.stages.workspace import Workspace, local_directory
from pipeline.tracking.library_output import library_output_to
from pipeline.tracking.stage_loggers import StageLogging, group_name

LIBRARY_OUTPUT_FILE = "libraries.log"

ReadData = Callable[[], RunData]
"""Reads the data of the recipe: once, and only for a stage that is not finished."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """An open job. A stage is given the parts that it uses."""

    recipe: Recipe
    stages: StageRunner
    read_data: ReadData
    actors: SharedActors


@contextmanager
def open_job(options: JobOptions) -> Iterator[Job]:
    """Workspace first, then the cluster: a locked workspace costs nothing."""
    recipe = with_native_dtype(options.recipe)
    # The progress lines are the stages' own. Read as transformers is imported, which only some stages do.
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with ExitStack() as exits:
        notice = PreemptionNotice(recipe.cluster.deadlines.grace_s, lambda: leave_at_once(workspace, recipe))
        workspace = exits.enter_context(
            Workspace.open(
                options.workspace,
                job=job_id(),
                take_over=options.take_over,
                notice=notice,
                logging=StageLogging(
                    names=recipe.logging,
                    project=recipe.name,
                    group=group_name(options.workspace),
                    versions=installed_versions(),
                ),
            )
        )
        require_engine_for(recipe.cluster.rollout.gpus_per_worker)
        forget_requests(workspace.uri)  # of the job before; this one hears them from now on
        if recipe.profile.steps:
            os.environ["RAY_PROFILING"] = "1"  # read as Ray starts; without it Ray's timeline is empty
        printed = exits.enter_context(library_output_to(library_output_file(workspace.uri)))
        exits.enter_context(open_cluster(recipe.cluster, ()))
        printed.write(f"The processes of this job print to files in {process_logs()}, on their own nodes.\n")
        nodes = node_resources()
        rollout_plan = plan_rollouts(recipe, nodes)
        check_plan(plan_of_stages(recipe, rollout_plan), nodes)
        check_memory(recipe, rollout_plan, nodes)

        def room() -> RolloutRoom:
            return RolloutRoom.of(recipe, rollout_plan, node_resources())

        publish_room(workspace.uri, asdict(room()))
        say_what_autoscaling_cannot_reach(recipe, room())
        actors = SharedActors(recipe, rollout_plan, workspace.uri, exits, room=room)
        exits.enter_context(notice.watching())  # behind ray.init, which handles SIGTERM by leaving at once
        exits.callback(actors.leave_service)
        yield Job(
            recipe=recipe, stages=StageRunner(workspace), read_data=cache(lambda: load_data(recipe)), actors=actors
        )


def library_output_file(workspace_uri: str) -> str:
    """Where the lines go that libraries print in the driver: on this machine, also for a workspace that is not."""
    return os.path.join(local_directory(workspace_uri), LIBRARY_OUTPUT_FILE)


def say_what_autoscaling_cannot_reach(recipe: Recipe, room: RolloutRoom) -> None:
    autoscale = recipe.cluster.rollout.autoscale
    remark = "" if autoscale is None else room.remark(autoscale.max_workers)
    if remark:
        print(f"cluster.rollout.autoscale.max_workers: {remark}", flush=True)


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
