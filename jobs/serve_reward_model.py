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

from pipeline.config.schema import DeadlinesConfig, ScoringConfig
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
        card = read_card(options.model)
        from actors.vrm_service import require_free_port, service_token, start_service, stop_service

        require_free_port(options.port)
        token = None if options.no_token else service_token()
        config = ScoringConfig(replicas=options.replicas, gpus_per_replica=options.gpus_per_replica, port=options.port)
        deadlines = DeadlinesConfig()
        start_service(
            os.path.abspath(options.model),
            config,
            start_s=deadlines.start_s,
            deadline_s=deadlines.score_s,
            token=token,
        )
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"serving a {card.head} reward model over {', '.join(card.objectives)} at http://127.0.0.1:{options.port}")
    if token is not None:
        print(f"token: {token}", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        stop_service()


if __name__ == "__main__":
    main()
