"""Serves a trained reward model, on 127.0.0.1 unless told otherwise.

    python jobs/serve_reward_model.py --model runs/tiny/stages/train_reward_model-.../result --port 8000
    curl -H "Authorization: Bearer $TOKEN" -H "content-type: application/json" \
         -d '{"prompt": "...", "responses": ["...", "..."]}' http://127.0.0.1:8000/v1/score

http://127.0.0.1:8000/ compares two responses in a browser. OpenRLHF takes http://vrm:$TOKEN@127.0.0.1:8000/get_reward,
TRL takes pipeline.serving.trl_reward.VRMReward, Python takes vrm.Client.

Prints the bearer token it asks for: VRM_SERVICE_TOKEN, or a fresh one. Ctrl-C stops it.

Another checkpoint rolls in without a failed request when --model is a symbolic link:

    ln -sfn runs/better/stages/train_reward_model-.../result current && kill -USR1 $PID

A checkpoint that does not load is reported and never answers. A replica or an HTTP proxy that dies is replaced within a
minute, and our clients ask again for that long. On a cluster of many: jobs/scoring_application.py.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from jobs.command_line import Command
from pipeline.config.cluster import ClusterConfig, DeadlinesConfig, ScoringConfig
from pipeline.errors import ConfigError, PipelineError
from pipeline.models.checkpoint_files import check_reward_model
from pipeline.models.reward_model_card import read_card
from pipeline.serving.free_port import require_free_port
from pipeline.stages.fingerprint import directory_fingerprint


def serve_reward_model(options: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM, which is no failure."""
    with suppress(KeyboardInterrupt):
        serve_until_interrupted(options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="result directory of train_reward_model, or a link to it")
    parser.add_argument("--port", type=int, default=8000, help="of HTTP (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="%(default)s; another one exposes it: put TLS in front")
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="with --max-replicas the fewest; 0: it may sleep"
    )
    parser.add_argument("--max-replicas", type=int, metavar="N", help="replicas follow the queue up to this many")
    parser.add_argument("--gpus-per-replica", type=float, default=0.0, metavar="N", help="0 scores on the CPU")
    parser.add_argument("--no-token", action="store_true", help="answer anybody on this machine")


def serve_until_interrupted(options: argparse.Namespace) -> None:
    # A replica that is replaced later must load the same checkpoint, wherever the link points by then.
    model = os.path.realpath(options.model)
    check_reward_model(model)
    config = scoring_config(options)
    require_free_port(options.host, options.port, remedy="another --port")
    # torch and ray are imported behind --help, and behind what is wrong with the input.
    from actors.reward_service import (
        leave_service,
        require_token_if_exposed,
        service_token,
        start_service,
        swap_model,
    )
    from cluster.session import open_cluster

    token = None if options.no_token else service_token()
    require_token_if_exposed(options.host, token)
    deadlines = DeadlinesConfig()
    settings: dict[str, Any] = {
        "start_s": deadlines.start_s,
        "deadline_s": deadlines.score_s,
        "token": token,
    }
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    swap_requested = threading.Event()
    # Serve replaces an HTTP proxy that missed three checks; by default it checks every 10 s.
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
    # One that is not up after 5 s it ends, and tries again: on a busy machine never with success.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # The cluster of RAY_ADDRESS, or one of its own: Serve itself would look for whatever ran here last.
    with open_cluster(ClusterConfig(object_store_gib=0.5), ()):
        # After ray.init, whose own SIGTERM handler aborts the process. A shell that starts the job in the background
        # leaves SIGINT ignored, so both are set.
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, signal.default_int_handler)
        try:
            start_service(model, config, **settings)
            signal.signal(signal.SIGUSR1, lambda *_: swap_requested.set())
            print(
                f"serving {in_words(model)} at http://{options.host}:{options.port}, process {os.getpid()}", flush=True
            )
            if token is not None:
                print(f"token: {token}", flush=True)
            while swap_requested.wait():
                swap_requested.clear()
                successor = os.path.realpath(options.model)
                try:
                    description = in_words(successor)
                    swap_model(successor, model, config, **settings)
                except PipelineError as error:
                    print(f"still serving {model}. {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                else:
                    model = successor
                    print(f"serving {description}", flush=True)
        finally:
            leave_service()


def scoring_config(options: argparse.Namespace) -> ScoringConfig:
    try:
        return ScoringConfig(
            replicas=options.replicas,
            max_replicas=options.max_replicas,
            gpus_per_replica=options.gpus_per_replica,
            port=options.port,
            host=options.host,
        )
    except ValidationError as error:
        raise ConfigError(str(error)) from error


def in_words(model: str) -> str:
    card = read_card(model)
    return (
        f"a {card.head} reward model over {', '.join(card.objectives)} ({directory_fingerprint(model)[:12]}, {model})"
    )


serve_reward_model_command = Command(documentation=__doc__, add_options=_add_options, run=serve_reward_model)

if __name__ == "__main__":
    serve_reward_model_command()
