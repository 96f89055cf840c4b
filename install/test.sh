#!/usr/bin/env bash
# Every test that is not marked long, in two processes: the quick ones use the time in which the others wait for clusters and engines to start.
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'kill "$quick" 2>/dev/null; rm -f "$log"' EXIT
nice .venv/bin/python -m pytest -p no:cacheprovider -m "not components and not e2e and not long" >"$log" 2>&1 &
quick=$!
.venv/bin/python -m pytest -m "(components or e2e) and not long"
slow_code=$?
wait "$quick"
quick_code=$?
cat "$log"
exit $((slow_code > quick_code ? slow_code : quick_code))
