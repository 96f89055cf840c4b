"""A file for Ray's cluster launcher: machines that are reached by ssh."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from cluster.launch.launch_plan import LaunchPlan
from pipeline.errors import ConfigError

DIRECTORY = "~/vrm-pipeline"
"""Where the project lies on every machine."""


PATH_LINE = "export PATH=$HOME/vrm-pipeline/.venv/bin:$PATH"


def cluster_file(plan: LaunchPlan, *, hosts: Sequence[str], user: str, file: str) -> str:
    """The file, and in its first comment the commands that use it.

    Args:
        hosts: addresses; the first one becomes the head.
        file: name of the file, for the comment.

    Raises:
        ConfigError: there are fewer hosts than the plan needs, or one is named twice.
    """
    if len(set(hosts)) < len(hosts):
        twice = sorted({host for host in hosts if hosts.count(host) > 1})
        raise ConfigError(f"--hosts names {', '.join(twice)} twice. Each host is one node.")
    if len(hosts) < plan.nodes:
        raise ConfigError(
            f"--hosts names {len(hosts)} host(s), and the plan needs {plan.nodes} of {plan.machine}. Name more, or "
            "lower what the recipe asks for."
        )
    workers = len(hosts) - 1
    resources = f"--num-cpus={plan.machine.cpus} --num-gpus={plan.machine.gpus}"
    config: dict[str, Any] = {
        "cluster_name": plan.name,
        "provider": {"type": "local", "head_ip": hosts[0], "worker_ips": list(hosts[1:])},
        "auth": {"ssh_user": user},
        "min_workers": workers,
        "max_workers": workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 60,
        "file_mounts": {},
        "setup_commands": [
            # Once on every node; picks the CUDA build where nvidia-smi finds a GPU.
            f"cd {DIRECTORY} && bash install/install.sh",
            # `ray`, `vrm` and `python` of ssh sessions and of jobs are those of the environment.
            f"grep -q vrm-pipeline/.venv ~/.bashrc || echo '{PATH_LINE}' >> ~/.bashrc",
        ],
        "head_start_ray_commands": [
            "ray stop",
            f"ray start --head --port=6379 --dashboard-host=127.0.0.1 {resources} "
            "--autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"ray start --address=$RAY_HEAD_IP:6379 {resources}"],
    }
    runtime = json.dumps({"env_vars": dict(plan.environment)})
    submit = f"--runtime-env-json {shlex.quote(runtime)} -- {plan.shell_command}"
    usage = (
        f"ray up {file}",
        f"ray dashboard {file} &                      # forwards port 8265",
        f"ray job submit --address http://127.0.0.1:8265 --working-dir . {submit}",
        f"ray down {file}",
        "",
    )
    comment = "".join(f"# {line}".rstrip() + "\n" for line in usage)
    return comment + plan.header + yaml.safe_dump(config, sort_keys=False, width=1000)
