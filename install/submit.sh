#!/usr/bin/env bash
# Submits jobs/full_pipeline.py to the Ray head at RAY_API_SERVER_ADDRESS, or to one it starts and stops itself.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin
address=${RAY_API_SERVER_ADDRESS:-}

if [ -z "$address" ]; then
  # Bad input is answered before a head is started. On another machine's cluster the job itself looks: data may lie there.
  "$bin/python" jobs/full_pipeline.py --dry-run "$@" >/dev/null
  # Free ports for all that has a fixed one by default: another Ray may run on this machine.
  read -r port gcs agent <<<"$("$bin/python" -c '
import socket
holders = [socket.socket() for _ in range(3)]
for holder in holders:
    holder.bind(("127.0.0.1", 0))
print(*(holder.getsockname()[1] for holder in holders))')"
  address=http://127.0.0.1:$port
  # The head answers nobody without this token, not even on this machine.
  RAY_AUTH_TOKEN=$("$bin/python" -c 'import secrets; print(secrets.token_hex(32))')
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
  # Ray keeps a timeline only if it was told to as it started.
  [[ "$*" != *profile.steps=* ]] || export RAY_PROFILING=1
  log=$(mktemp -t ray-head.XXXXXX.log)
  echo "submit: starting a Ray head on this machine, dashboard $address"
  "$bin/ray" start --head --block --port "$gcs" --dashboard-host 127.0.0.1 --dashboard-port "$port" \
    --dashboard-agent-listen-port "$agent" \
    --object-store-memory $((512 * 1024 * 1024)) --disable-usage-stats >"$log" 2>&1 &
  head=$!
  trap 'kill -TERM $head 2>/dev/null; wait $head 2>/dev/null || true' EXIT
  for _ in $(seq 120); do
    curl --silent --fail --max-time 2 -H "Authorization: Bearer $RAY_AUTH_TOKEN" "$address/api/version" >/dev/null && break
    kill -0 $head 2>/dev/null || { echo "submit: the Ray head did not start; its log is $log" >&2; exit 1; }
    sleep 0.5
  done
fi

# VRM_* settings and those of loggers travel to the job; nothing else of this shell does.
environment=$("$bin/python" -c '
import json, os
print(json.dumps({"env_vars": {k: v for k, v in os.environ.items() if k.startswith(("VRM_", "WANDB_", "MLFLOW_", "TRACKIO_"))}}))')
submission=vrm-$(date +%s)-$$
notes=$(mktemp -t ray-submit.XXXXXX.log)
# A head that has just started has no job agent for a few seconds.
for attempt in $(seq 20); do
  "$bin/ray" job submit --address "$address" --working-dir . --runtime-env-json "$environment" --no-wait \
    --submission-id "$submission" -- "$bin/python" jobs/full_pipeline.py "$@" >"$notes" 2>&1 && break
  grep -q "No available agent" "$notes" && [ "$attempt" -lt 20 ] || { cat "$notes" >&2; exit 1; }
  sleep 2
done
echo "submit: job $submission"
# Without Ray's own lines about the submission.
"$bin/ray" job logs --address "$address" --follow "$submission" 2>/dev/null |
  { grep --line-buffered -vE '[[:space:]](INFO (cli|job_manager)|SUCC cli)\.py:|^Running entrypoint for job ' || true; }
# Asked without the command line, which takes seconds to start.
authorization=(${RAY_AUTH_TOKEN:+-H "Authorization: Bearer $RAY_AUTH_TOKEN"})
answer=$(curl --silent --show-error --fail --max-time 60 "${authorization[@]}" "$address/api/jobs/$submission")
[[ $answer == *'"status": "SUCCEEDED"'* ]]
