"""The main job on three hosts, one of which is lost: `python -m tests.faults.several_hosts DIRECTORY`, in a laboratory.

The hosts share an S3 server and nothing else. Prints what happened, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.records import POLICY_FILE
from pipeline.stages import storage
from pipeline.stages.metrics_log import METRICS_FILE, parse_metrics
from pipeline.stages.ownership import read_owner
from tests.support.hosts import SWITCH_ADDRESS, Host, Switch, end_with_caller
from tests.support.s3_server import s3_server

HEAD, *WORKERS = NAMES = ["host1", "host2", "host3"]
CPUS = 2
START_RAY = 'until ray start "$@"; do ray stop --force; done'
"""Ray gives a node 30 s to come up, which a busy machine may exceed."""
SMALLEST = (
    "data.planted.num_train_pairs=256",
    "data.planted.num_sft_texts=256",
    "data.planted.num_heldout_prompts=16",
    "data.planted.num_heldout_pairs=64",
    "sft.num_steps=4",
    "sft.eval_every=4",
    "reward.num_steps=8",
    "reward.eval_every=8",
    "alignment.num_steps=6",
    "alignment.prompts_per_step=16",
    "alignment.ppo.mini_batch_size=16",
    "alignment.checkpoint_every=1",
    "alignment.eval_every=6",
    "alignment.eval_prompts=8",
    "benchmark.num_prompts=16",
    "cluster.sft={ranks: 1}",
    "cluster.reward={ranks: 1}",
    # No host holds two ranks, and any two hosts hold everything.
    "cluster.alignment={ranks: 2, cpus_per_rank: 1.1, threads_per_rank: 1}",
    "cluster.rollout={workers: 2, cpus_per_worker: 0.3}",
    "cluster.scoring={cpus_per_replica: 0.2}",
)


def main(directory: Path) -> dict[str, object]:
    switch = Switch(directory, NAMES)
    hosts = {name: Host(name, switch) for name in NAMES}
    with s3_server(SWITCH_ADDRESS) as server:  # before Ray, whose processes then have the credentials
        start_ray(hosts)
        workspace = server.new_place("runs/smallest")
        job = start_job(hosts[HEAD], workspace)
        wait_until(lambda: has_checkpoint(workspace), "a checkpoint of align_policy", timeout_s=900, needs=job)
        before = {name: whereabouts(host) for name, host in hosts.items()}
        lost = next(name for name in WORKERS if before[name]["ranks"])
        hosts.pop(lost).lose_power()
        code = job.wait(timeout=900)
        return {
            "code": code,
            "before": before,
            "lost": lost,
            "rows": parse_metrics(storage.read_text(of_alignment(workspace, "metrics", METRICS_FILE)) or ""),
            "report": storage.read_text(storage.join(workspace, "report.html")) is not None,
            "owner": read_owner(workspace),
            "shared memory": {name: host.shared_memory() for name, host in hosts.items()},
        }


def start_ray(hosts: dict[str, Host]) -> None:
    """Returns when every host has joined the first one."""
    options = (f"--num-cpus={CPUS}", f"--object-store-memory={150 * 2**20}", "--disable-usage-stats", "--block")
    for name, host in hosts.items():
        role = ("--head", "--include-dashboard=false") if name == HEAD else (f"--address={hosts[HEAD].address}:6379",)
        arguments = (*role, f"--node-ip-address={host.address}", *options)
        notes = host.files / "ray.log"
        process = host.start("bash", "-c", START_RAY, "bash", *arguments, output=notes)
        wait_until(lambda notes=notes: "Ray runtime started" in notes.read_text(), name, timeout_s=300, needs=process)


def start_job(head: Host, workspace: str) -> subprocess.Popen[bytes]:
    job = ("python", "jobs/full_pipeline.py", "--recipe", "tiny", "--workspace", workspace, *SMALLEST)
    return head.start("env", f"RAY_ADDRESS={head.address}:6379", *job, output=head.files / "job.log")


def of_alignment(workspace: str, *names: str) -> str:
    stages = storage.join(workspace, "stages")
    [alignment] = [name for name in storage.list_directories(stages) if name.startswith("align_")]
    return storage.join(stages, alignment, *names)


def has_checkpoint(workspace: str) -> bool:
    stages = storage.list_directories(storage.join(workspace, "stages"))
    if not any(name.startswith("align_") for name in stages):
        return False
    return bool(storage.list_directories(of_alignment(workspace, "checkpoints")))


def whereabouts(host: Host) -> dict[str, int]:
    """How many of the job's actors live on a host, and how many versions of the policy were published there."""
    titles = {"ranks": "Rank", "engines": "RolloutWorker"}
    files = [path for path in host.shared_memory() if path.endswith(f"/{POLICY_FILE}") and "copies@" not in path]
    return {what: len(host.processes(f"ray::{title}")) for what, title in titles.items()} | {"published": len(files)}


def wait_until(is_so: Callable[[], bool], what: str, *, timeout_s: float, needs: subprocess.Popen[bytes]) -> None:
    """
    Args:
        needs: without this process it will never be so.
    """
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert needs.poll() is None, f"{what}: its process has ended"
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.2)


if __name__ == "__main__":
    end_with_caller()
    print(json.dumps(main(Path(sys.argv[1])), default=str), flush=True)
