"""Shows the rollouts that an alignment kept: filter, sort, search, outliers, and the same prompt over time.

    python jobs/show_rollouts.py runs/tiny
    python jobs/show_rollouts.py runs/tiny --service http://127.0.0.1:8000
    python jobs/show_rollouts.py runs/tiny --jsonl rollouts.jsonl

Opens a page on 127.0.0.1 and prints its address, which holds the token that the page asks with. The page loads nothing
from other hosts. It may look at a workspace while a job runs in it. With --service a rollout can be scored again by a
running reward service, with the token in VRM_SERVICE_TOKEN. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.command_line import Command
from pipeline.errors import ConfigError, WorkspaceError
from pipeline.serving.free_port import require_free_port
from pipeline.stages import storage

if TYPE_CHECKING:
    from pipeline.rollouts.rollout_queries import RolloutQueries
    from pipeline.serving.http.rollouts_app import Rescore

HOST = "127.0.0.1"


def show_rollouts(options: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM, which is no failure."""
    uri = kept_rollouts_of(options.workspace, options.stage)
    # pyarrow's data sets and FastAPI are imported behind --help, and behind what is wrong with the input.
    from pipeline.rollouts.rollout_queries import RolloutQueries

    with storage.reading(uri) as directory:
        queries = RolloutQueries(directory)
        if options.jsonl is not None:
            with open(options.jsonl, "w", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row) + "\n" for row in queries.all_rows())
            print(f"{queries.summary()['rollouts']:,} rollouts: {options.jsonl}", flush=True)
            return
        serve(queries, options, title=uri.rsplit("/", 2)[-2])


def serve(queries: RolloutQueries, options: argparse.Namespace, *, title: str) -> None:
    """Serves the page of these rollouts until it is told to stop."""
    import uvicorn

    from pipeline.serving.http.rollouts_app import build_rollouts_api

    require_free_port(HOST, options.port, remedy="another --port")
    token = secrets.token_urlsafe(16)
    api = build_rollouts_api(queries, title=title, token=token, rescore=rescoring_by(options.service))
    # Behind the "#" the token stays in the browser: it is in no request line and in no log.
    print(f"rollouts of {title}: http://{HOST}:{options.port}/#{token}", flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.run(api, host=HOST, port=options.port, log_level="warning", ws="none")


def rescoring_by(service: str | None) -> Rescore | None:
    """Asks a running reward service; None without its URL.

    Raises:
        ConfigError: no request can be made with this URL.
    """
    if service is None:
        return None
    from pipeline.serving.client import Client

    scorer = Client(service, deadline_s=20.0)
    return lambda messages, response: scorer.score(messages, [response]).scores[0]


def kept_rollouts_of(workspace: str, fingerprint: str | None) -> str:
    """The directory of the rollouts of the workspace's alignment.

    Args:
        fingerprint: the beginning of the fingerprint of the stage; None where there is only one with rollouts.

    Raises:
        WorkspaceError: the workspace has none.
        ConfigError: several stages have some, or none of that fingerprint has.
    """
    from pipeline.rollouts.kept_rollouts import ROLLOUTS

    stages = storage.join(workspace, "stages")
    kept = {
        name.rpartition("-")[2]: storage.join(stages, name, ROLLOUTS)
        for name in storage.list_directories(stages)
        if name.startswith("align_policy-") and storage.file_sizes(storage.join(stages, name, ROLLOUTS))
    }
    if not kept:
        raise WorkspaceError(
            f"{workspace} holds no kept rollouts. They are written by the alignments of the PPO family while "
            "alignment.keep_rollouts is all or a share; give the --workspace of such a job."
        )
    found = [name for name in kept if name.startswith(fingerprint or "")]
    if len(found) != 1:
        asked = "several alignments" if fingerprint is None else f"no single alignment with --stage {fingerprint}"
        raise ConfigError(
            f"{workspace} holds the rollouts of {asked}; choose one by --stage: {', '.join(sorted(kept))}"
        )
    return kept[found[0]]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workspace", help="directory or pyarrow.fs URI")
    parser.add_argument("--stage", metavar="FINGERPRINT", help="of the alignment, where the workspace holds several")
    parser.add_argument("--port", type=int, default=8010, help="of the page (%(default)s)")
    parser.add_argument("--service", metavar="URL", help="of a running reward service, to score a rollout again")
    parser.add_argument("--jsonl", metavar="FILE", help="write all rollouts to this file instead, one a line")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.jsonl is not None and not Path(os.path.abspath(options.jsonl)).parent.is_dir():
        raise ConfigError(f"--jsonl {options.jsonl}: its directory does not exist. Create it, or give another file.")


show_rollouts_command = Command(
    documentation=__doc__, add_options=_add_options, run=show_rollouts, check_options=_check_options
)

if __name__ == "__main__":
    show_rollouts_command()
