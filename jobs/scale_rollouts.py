"""Asks a running job for more or fewer rollout workers.

    python jobs/scale_rollouts.py runs/tiny --workers 3

The job follows between two batches: workers leave at once, and join when their engine is up, holds the current policy
and has passed the numerics gate. Nothing that was sampled is lost or sampled again, and the samples stay the same.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.errors import PipelineError
from pipeline.stages.requests import request_rollout_workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", help="the running job's --workspace")
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    try:
        request_rollout_workers(options.workspace, options.workers)
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"asked for {options.workers} rollout workers; metrics.jsonl shows them as rollout/workers")


if __name__ == "__main__":
    main()
