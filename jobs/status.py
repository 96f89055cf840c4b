"""What a workspace holds: stages, state, steps, times of all attempts, sizes.

    python jobs/status.py runs/tiny

Reads only: it may look at a workspace while a job runs in it.
"""

from __future__ import annotations

import argparse

from cluster.resources import plan_resources
from jobs.command_line import Command
from pipeline.config.cluster import ClusterConfig
from pipeline.errors import WorkspaceError
from pipeline.stages import storage
from pipeline.stages.ownership import read_owner
from pipeline.stages.workspace import StageDirectory
from pipeline.tracking.progress import as_clock

HEADER = ("stage", "fingerprint", "state", "steps", "time", "size MiB", "")
WIDTHS = (20, 14, 13, 10, 9, 10, 0)


def describe_workspace(uri: str) -> str:
    """The table, one line per stage result, in the order of the pipeline.

    Raises:
        WorkspaceError: there is no workspace.
    """
    owner = read_owner(uri)
    directories = storage.list_directories(storage.join(uri, "stages"))
    if owner is None and not directories:
        raise WorkspaceError(f"{uri} holds no workspace. Give the --workspace of a job.")
    order = [stage.stage for stage in plan_resources(ClusterConfig())]
    rows = []
    for name in [*order, *sorted({_stage_name(d) for d in directories} - set(order))]:
        found = [d for d in directories if _stage_name(d) == name]
        rows += [_row(storage.join(uri, "stages", d), name) for d in found] or [(name, "", "not started")]
    if owner is None:
        ownership = "No job holds it."
    elif owner.is_gone():
        ownership = f"Its last owner, {owner}, is dead; the next job takes it."
    else:
        ownership = f"Held by {owner}."
    return "\n".join([*map(_line, [HEADER, *rows]), ownership])


def _stage_name(directory: str) -> str:
    return directory.rpartition("-")[0]


def _row(uri: str, name: str) -> tuple[str, ...]:
    fingerprint = uri.rpartition("-")[2]
    stage = StageDirectory(uri, name, fingerprint)
    rows, num_steps = stage.metrics_rows(), stage.num_steps()
    size = f"{storage.size_bytes(uri) / 2**20:.1f}"
    done = rows[-1]["step"] + 1 if rows else 0
    steps = "" if num_steps is None else f"{done}/{num_steps}"
    if stage.result() is not None:
        return name, fingerprint, "finished", steps, as_clock(stage.manifest()["seconds"]), size, ""
    checkpoint = stage.checkpoints.latest()
    committed = "nothing committed" if checkpoint is None else f"committed step {checkpoint.step + 1}"
    return name, fingerprint, "unfinished", steps, as_clock(stage.seconds_spent()), size, committed


def _line(cells: tuple[str, ...]) -> str:
    """Names to the left, numbers to the right."""
    padded = [
        f"{cell:>{width}}" if heading in ("steps", "time", "size MiB") else f"{cell:<{width}}"
        for heading, cell, width in zip(HEADER, cells, WIDTHS, strict=False)
    ]
    return "  ".join(padded).rstrip()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workspace", help="directory or pyarrow.fs URI")


status_command = Command(
    documentation=__doc__,
    add_options=_add_options,
    run=lambda options: print(describe_workspace(options.workspace)),
)

if __name__ == "__main__":
    status_command()
