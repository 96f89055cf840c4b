"""A batch script for Slurm: Ray on all nodes of the allocation, the driver on the first."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from cluster.launch.launch_plan import LaunchPlan

PREEMPTED = 75
"""Exit code of a driver that was asked to end and has committed (`jobs/exit_codes.py`)."""


@dataclass(frozen=True, kw_only=True)
class SlurmSettings:
    """What the user says of the allocation."""

    time: str
    """Wall time, as sbatch takes it."""
    partition: str | None = None
    account: str | None = None


def sbatch_script(plan: LaunchPlan, settings: SlurmSettings) -> str:
    """The script, for `sbatch FILE` in the directory of the project."""
    machine = plan.machine
    options = {
        "job-name": plan.name,
        "partition": settings.partition,
        "account": settings.account,
        "nodes": plan.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": machine.cpus,
        "gpus-per-node": f"{machine.slurm_type}:{machine.gpus}" if machine.gpus else None,
        "mem": f"{machine.memory_gib}G",
        "time": settings.time,
        # To the batch shell alone, which passes it on to the driver.
        "signal": f"B:TERM@{math.ceil(plan.grace_s)}",
        "requeue": "",
    }
    directives = [
        f"#SBATCH --{name}" + (f"={value}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    ]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    head, _, body = SCRIPT.partition("@EXPORTS@\n")
    text = head + "".join(f"{line}\n" for line in exports) + body
    for mark, value in {
        "@DIRECTIVES@": "\n".join(directives),
        "@HEADER@": plan.header.rstrip(),
        "@NODES@": str(plan.nodes),
        "@RESOURCES@": f"--num-cpus={machine.cpus} --num-gpus={machine.gpus}",
        "@COMMAND@": plan.shell_command,
        "@PREEMPTED@": str(PREEMPTED),
    }.items():
        text = text.replace(mark, value)
    return text


SCRIPT = """\
#!/usr/bin/env bash
@DIRECTIVES@
@HEADER@
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$SLURM_SUBMIT_DIR/.venv/bin:$PATH"
@EXPORTS@

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
# Jobs that share a node have ports of their own, and answer nobody without the token.
port=$((20000 + SLURM_JOB_ID % 20000))
own_address='import socket; print(socket.gethostbyname(socket.gethostname()))'
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" python -c "$own_address"):$port
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

trap 'jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true' EXIT
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\
  ray start --head --node-ip-address="${address%:*}" --port="$port" @RESOURCES@ \\
  --disable-usage-stats --block &
if [ "${#nodes[@]}" -gt 1 ]; then
  srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" \\
    ray start --address="$address" @RESOURCES@ --disable-usage-stats --block &
fi

export RAY_ADDRESS=$address
count='import ray; ray.init(logging_level="ERROR"); print(sum(node["Alive"] for node in ray.nodes()))'
for attempt in $(seq 60); do
  [ "$(python -c "$count" 2>/dev/null)" = @NODES@ ] && break
  [ "$attempt" -lt 60 ] || { echo "the Ray nodes did not come up; see above" >&2; exit 1; }
  sleep 5
done

# The trap stands before the driver, and the flag says what came before the driver had a number: no signal is lost.
driver="" stopped=""
trap 'stopped=1; [ -z "$driver" ] || kill -TERM "$driver" 2>/dev/null || true' TERM
@COMMAND@ &
driver=$!
[ -z "$stopped" ] || kill -TERM "$driver" 2>/dev/null || true
# The signal ends the first wait early; the driver then commits, and the next wait has its own code.
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do
  code=0
  wait "$driver" || code=$?
done
# A driver that the signal ended before it could listen has no code of its own.
if [ -n "$stopped" ] && [ "$code" -eq 143 ]; then code=@PREEMPTED@; fi
# Preempted behind a commit: the same command resumes.
if [ "$code" -eq @PREEMPTED@ ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""
