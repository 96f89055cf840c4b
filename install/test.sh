#!/usr/bin/env bash
# Every test that is not marked long, in two lanes: clusters, engines and services mostly wait for one another, and the
# jobs and the quick tests use that time. They are nice: components are tested on what they promise within a time.
set -uo pipefail
cd "$(dirname "$0")/.."
run() { .venv/bin/python -m pytest -p no:cacheprovider -m "$1 and not long"; }
worse() { echo $(($1 > $2 ? $1 : $2)); }

if [ "${1:-}" = beside ]; then
  run "e2e"
  jobs=$?
  run "not components and not e2e"
  exit "$(worse $jobs $?)"
fi

log=$(mktemp)
# A session of its own, so that it ends with all it started.
nice setsid bash install/test.sh beside >"$log" 2>&1 &
beside=$!
trap 'kill -- "-$beside" 2>/dev/null; rm -f "$log"' EXIT
run "components"
components=$?
wait "$beside"
code=$(worse $components $?)
cat "$log"
exit "$code"
