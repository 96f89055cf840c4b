"""Manifests for KubeRay's operator: a RayJob that runs a recipe, a RayService that serves its reward model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from cluster.launch.launch_plan import LaunchPlan
from pipeline.config.cluster import ScoringConfig
from pipeline.errors import ConfigError

Manifest = dict[str, Any]

HEAD_CPUS = 4
HEAD_GIB = 16
"""For Ray's own processes, the driver and Serve's proxy; actors run on the other nodes."""
VOLUME_PATH = "/shared"
"""Where the claimed volume is mounted, on every node."""
SERVE_PORT = 8000
OBJECT_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
NO_OBJECT = "no name of Kubernetes, which has lower-case letters, digits, dashes and dots alone"
MOST_LETTERS = 253
IMAGE = re.compile(r"[\w.-]+(:\d+)?(/[\w.-]+)*(:[\w.-]+)?(@sha256:[0-9a-f]{64})?")
KEEP_S = 3600
"""How long a finished RayJob and its logs stay."""


@dataclass(frozen=True, kw_only=True)
class PodSettings:
    """What the user says of the pods."""

    image: str
    secret: str | None = None
    """Name of a Secret whose keys become environment variables: credentials of the storage, tokens."""
    volume_claim: str | None = None
    """Name of a PersistentVolumeClaim that all nodes may mount, for workspaces and data."""

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: Kubernetes would refuse a name.
        """
        for option, name, form, words in (
            ("--image", self.image, IMAGE, "no image. Write [REGISTRY/]NAME[:TAG]"),
            ("--secret", self.secret, OBJECT_NAME, NO_OBJECT),
            ("--volume-claim", self.volume_claim, OBJECT_NAME, NO_OBJECT),
        ):
            if name is not None and not (form.fullmatch(name) and len(name) <= MOST_LETTERS):
                raise ConfigError(f"{option} {name} is {words}.")


def ray_job(plan: LaunchPlan, pods: PodSettings, *, ray_version: str) -> Manifest:
    """Runs the plan's command, and removes the cluster when it ends."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": plan.name},
        "spec": {
            "entrypoint": plan.shell_command,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_S,
            "rayClusterSpec": _cluster(plan, pods, ray_version),
        },
    }


def ray_service(
    plan: LaunchPlan, pods: PodSettings, *, ray_version: str, model: str, scoring: ScoringConfig
) -> Manifest:
    """Serves a reward model on port 8000 of the service that the operator makes."""
    serve = {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "applications": [
            {
                "name": "vrm",
                "route_prefix": "/",
                "import_path": "jobs.scoring_application:build",
                "args": {"model": model, "scoring": scoring.model_dump(mode="json")},
            }
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": plan.name},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
            "rayClusterConfig": _cluster(plan, pods, ray_version),
        },
    }


def as_yaml(manifest: Manifest, plan: LaunchPlan) -> str:
    return plan.header + yaml.safe_dump(manifest, sort_keys=False, width=1000)


def _cluster(plan: LaunchPlan, pods: PodSettings, ray_version: str) -> Manifest:
    machine = plan.machine
    grows = plan.most_nodes > plan.nodes
    return {
        "rayVersion": ray_version,
        **({"enableInTreeAutoscaling": True} if grows else {}),
        "headGroupSpec": {
            # No actor is placed on the head: it has no GPU, and its memory is the driver's.
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(plan, pods, cpus=HEAD_CPUS, gpus=0, memory_gib=HEAD_GIB, is_head=True),
        },
        "workerGroupSpecs": [
            {
                "groupName": machine.accelerator,
                "replicas": plan.nodes,
                "minReplicas": plan.nodes,
                "maxReplicas": plan.most_nodes,
                "rayStartParams": {"num-cpus": str(machine.cpus), "num-gpus": str(machine.gpus)},
                "template": _pod(
                    plan, pods, cpus=machine.cpus, gpus=machine.gpus, memory_gib=machine.memory_gib, is_head=False
                ),
            }
        ],
    }


def _pod(plan: LaunchPlan, pods: PodSettings, *, cpus: int, gpus: int, memory_gib: int, is_head: bool) -> Manifest:
    resources: Mapping[str, str] = {
        "cpu": str(cpus),
        "memory": f"{memory_gib}Gi",
        **({"nvidia.com/gpu": str(gpus)} if gpus else {}),
    }
    # Ray's objects and two versions of the policy lie there; a container's own /dev/shm has 64 MiB.
    volumes: list[Manifest] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{math.ceil(memory_gib / 2)}Gi"}}
    ]
    mounts: list[Manifest] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if pods.volume_claim is not None:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": pods.volume_claim}})
        mounts.append({"name": "shared", "mountPath": VOLUME_PATH})
    container: Manifest = {
        "name": "ray-head" if is_head else "ray-worker",
        "image": pods.image,
        "resources": {"requests": {**resources}, "limits": {**resources}},
        "env": [{"name": name, "value": value} for name, value in plan.environment.items()],
        "volumeMounts": mounts,
        # KubeRay writes the command that starts Ray; the image's own is a dry run.
        "securityContext": {"allowPrivilegeEscalation": False, "runAsNonRoot": True},
    }
    if pods.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": pods.secret}}]
    spec: Manifest = {
        "terminationGracePeriodSeconds": math.ceil(plan.grace_s),
        "containers": [container],
        "volumes": volumes,
    }
    if gpus:
        spec["nodeSelector"] = {"nvidia.com/gpu.product": plan.machine.kubernetes_product}
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}
