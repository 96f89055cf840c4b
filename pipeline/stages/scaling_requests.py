"""A user's requests to a running job: written into its workspace, read by the job between batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError, WorkspaceError
from pipeline.stages import storage
from pipeline.stages.ownership import read_owner

REQUEST_FILE = "rollout_workers.json"
ROOM_FILE = "rollout_room.json"


def request_rollout_workers(workspace: str, num_workers: int) -> None:
    """Asks the job that holds the workspace for another number of rollout workers.

    Raises:
        ConfigError: fewer than one worker.
        WorkspaceError: no running job holds the workspace.
    """
    if num_workers < 1:
        raise ConfigError(f"{num_workers} rollout workers cannot sample; ask for at least 1.")
    owner = read_owner(workspace)
    if owner is None or owner.is_gone():
        last = "" if owner is None else f"; its last owner, {owner}, is dead"
        raise WorkspaceError(
            f"no job runs in {workspace}{last}. Start it with cluster.rollout.workers={num_workers} instead."
        )
    storage.write_text(storage.join(workspace, REQUEST_FILE), json.dumps({"rollout_workers": num_workers}))


def requested_rollout_workers(workspace: str) -> int | None:
    """The number of rollout workers that the user requested of the running job; None without a request."""
    text = storage.read_text(storage.join(workspace, REQUEST_FILE))
    return None if text is None else int(json.loads(text)["rollout_workers"])


def forget_requests(workspace: str) -> None:
    """Deletes a request: it is for the job that runs, and the next job starts as its recipe says."""
    storage.delete_file(storage.join(workspace, REQUEST_FILE))
    storage.delete_file(storage.join(workspace, ROOM_FILE))


def publish_room(workspace: str, room: Mapping[str, Any]) -> None:
    """Writes down how many rollout workers the running job can have, for whoever asks for another number."""
    storage.write_text(storage.join(workspace, ROOM_FILE), json.dumps(room))


def published_room(workspace: str) -> dict[str, Any] | None:
    """What the running job wrote by `publish_room`; None before it did."""
    text = storage.read_text(storage.join(workspace, ROOM_FILE))
    return None if text is None else json.loads(text)
