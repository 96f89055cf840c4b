"""Asks a running job for more or fewer rollout workers.

    python jobs/scale_rollouts.py runs/tiny --workers 3
    python jobs/scale_rollouts.py --job raysubmit_abc --workers 3      # on the cluster at RAY_ADDRESS

The job follows when it loads the next policy: workers leave with the chunk they are at, and join when their engine is
up, holds the current policy and has passed the numerics gate. Nothing that was sampled is lost or sampled again, and
the samples stay the same. From then on the request holds, also against `cluster.rollout.autoscale`.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import PipelineError
from pipeline.stages.scaling_requests import request_rollout_workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("workspace", nargs="?", help="the running job's --workspace")
    which.add_argument("--job", metavar="ID", help="its submission id, as `ray job submit` printed it")
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    try:
        request_rollout_workers(options.workspace or _workspace_of(options.job), options.workers)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"asked for {options.workers} rollout workers; metrics.jsonl shows them as rollout/workers")


def _workspace_of(job: str) -> str:
    from cluster.running_jobs import running_cluster, workspace_of  # ray is slow to import, and a path needs none

    with running_cluster():
        return workspace_of(job)


if __name__ == "__main__":
    main()
