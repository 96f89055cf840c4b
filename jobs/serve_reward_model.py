"""Serves a trained reward model on 127.0.0.1.

    python jobs/serve_reward_model.py --model runs/tiny/stages/train_reward_model-.../result --port 8000
    curl -H "Authorization: Bearer $TOKEN" -H "content-type: application/json" \
         -d '{"prompt": "...", "responses": ["...", "..."]}' http://127.0.0.1:8000/v1/score

http://127.0.0.1:8000/ compares two responses in a browser. OpenRLHF takes http://vrm:$TOKEN@127.0.0.1:8000/get_reward,
TRL takes pipeline.serving.trl_reward.VRMReward, Python takes pipeline.serving.client.VRMScorer.

Prints the bearer token it asks for: VRM_SERVICE_TOKEN, or a fresh one. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from pipeline.config.schema import ClusterConfig, DeadlinesConfig, ScoringConfig
from pipeline.errors import PipelineError
from pipeline.models.reward_model import read_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="result directory of train_reward_model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus-per-replica", type=float, default=0.0)
    parser.add_argument("--no-token", action="store_true", help="answer anybody on this machine")
    options = parser.parse_args()
    try:
        serve_until_interrupted(options)
    except KeyboardInterrupt:
        return
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def serve_until_interrupted(options: argparse.Namespace) -> None:
    card = read_card(options.model)
    from actors.vrm_service import require_free_port, service_token, start_service, stop_service
    from cluster.session import open_cluster

    require_free_port(options.port)
    token = None if options.no_token else service_token()
    config = ScoringConfig(replicas=options.replicas, gpus_per_replica=options.gpus_per_replica, port=options.port)
    deadlines = DeadlinesConfig()
    # The cluster of RAY_ADDRESS, or one of its own: Serve itself would look for whatever ran here last.
    with open_cluster(ClusterConfig(object_store_gib=0.5), ()):
        try:
            start_service(
                os.path.abspath(options.model),
                config,
                start_s=deadlines.start_s,
                deadline_s=deadlines.score_s,
                token=token,
            )
            where = f"http://127.0.0.1:{options.port}"
            print(f"serving a {card.head} reward model over {', '.join(card.objectives)} at {where}")
            if token is not None:
                print(f"token: {token}", flush=True)
            signal.pause()
        finally:
            stop_service()


if __name__ == "__main__":
    main()
