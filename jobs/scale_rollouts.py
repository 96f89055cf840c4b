"""Asks a running job for more or fewer rollout workers.

    python jobs/scale_rollouts.py runs/tiny --workers 3
    python jobs/scale_rollouts.py --job raysubmit_abc --workers 3      # on the cluster at RAY_ADDRESS

The job follows when it loads the next policy. A worker that leaves finishes its chunk. A worker joins when its engine
is up, holds the current policy and has passed the numerics gate. No sample is lost or drawn again, and the samples stay
the same. The request then stays in force, also against `cluster.rollout.autoscale`.
"""

from __future__ import annotations

import argparse

from cluster.rollout_room import room_of_running_job
from jobs.command_line import Command
from pipeline.stages.scaling_requests import request_rollout_workers


def scale_rollouts(options: argparse.Namespace) -> None:
    workspace = options.workspace or _workspace_of(options.job)
    request_rollout_workers(workspace, options.workers)
    print(f"requested {options.workers} rollout workers; metrics.jsonl shows them as rollout/workers")
    room = room_of_running_job(workspace)
    remark = "" if room is None else room.remark(options.workers)
    if remark:
        print(remark)


def _workspace_of(job: str) -> str:
    from cluster.running_jobs import running_cluster, workspace_of  # ray is slow to import, and a path needs none

    with running_cluster():
        return workspace_of(job)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workspace", nargs="?", help="the running job's --workspace; or give --job")
    parser.add_argument("--job", metavar="ID", help="its submission id, as `ray job submit` printed it")
    parser.add_argument("--workers", type=int, required=True, metavar="N", help="how many there should be")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if (options.workspace is None) == (options.job is None):
        parser.error("name the running job once: its workspace, or --job with its submission id")


scale_rollouts_command = Command(
    documentation=__doc__, add_options=_add_options, check_options=_check_options, run=scale_rollouts
)

if __name__ == "__main__":
    scale_rollouts_command()
