"""What a workspace holds: stages, state, steps, times, sizes.

    python jobs/status.py runs/tiny
"""

from __future__ import annotations

import argparse
import json
import sys

from pipeline.errors import PipelineError
from pipeline.stages import storage
from pipeline.stages.metrics_log import as_clock
from pipeline.stages.workspace import OWNER_FILE, StageDirectory


def describe(uri: str) -> str:
    """The table, one line per stage directory."""
    lines = [f"{'stage':<21}{'fingerprint':<14}{'state':<26}{'time':>9}{'size MiB':>10}"]
    for directory in storage.list_directories(storage.join(uri, "stages")):
        name, _, identity = directory.rpartition("-")
        stage = StageDirectory(storage.join(uri, "stages", directory), name, identity)
        if stage.result() is not None:
            state, seconds = "finished", as_clock(stage.manifest()["seconds"])
        else:
            checkpoint = stage.checkpoints.latest()
            state = "no commit yet" if checkpoint is None else f"committed step {checkpoint.step + 1}"
            seconds = ""
        size = storage.size_bytes(stage.uri) / 2**20
        lines.append(f"{name:<21}{identity:<14}{state:<26}{seconds:>9}{size:>10.1f}")
    owner = storage.read_text(storage.join(uri, OWNER_FILE))
    if owner is not None:
        holder = json.loads(owner)
        lines.append(f"held by job {holder['job']} (process {holder['pid']} on {holder['host']})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", help="directory or pyarrow.fs URI")
    try:
        print(describe(parser.parse_args().workspace))
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
