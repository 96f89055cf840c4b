"""A policy on its way to the rollout engines: its weights, and the probes that prove they arrived."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.errors import ResourceError
from pipeline.models.backbone import load_causal_lm
from pipeline.models.critic import Policy
from pipeline.models.packing import PackedTokens, pack
from pipeline.records import PolicyWeights, ProbeSequence, PromptGroup

WEIGHTS_FILE = "model.safetensors"


def publish_checkpoint(
    checkpoint: str,
    location: str,
    probes: Sequence[PromptGroup],
    *,
    dtype: str,
    version: int,
) -> PolicyWeights:
    """Publishes a finished checkpoint as the learner publishes a policy under training, in one process."""
    model, _ = load_causal_lm(checkpoint, dtype=dtype)
    evaluated = evaluate_probes(Policy(model.eval()), probes, torch.device("cpu"))
    write_policy_weights(model.state_dict(), Path(location))
    return PolicyWeights(version=version, location=location, probes=evaluated)


def evaluate_probes(
    policy_logprobs: Callable[[PackedTokens, int, float], torch.Tensor],
    probes: Sequence[PromptGroup],
    device: torch.device,
) -> tuple[ProbeSequence, ...]:
    """What the learner says of the probes, at temperature 1; `policy_logprobs` is called as `Policy.forward` is."""
    packed = pack(probes).to(device)
    with torch.no_grad():
        rows = policy_logprobs(packed, int(packed.response_lengths.max()), 1.0).tolist()
    return tuple(
        ProbeSequence(prompt_ids=probe.prompt_ids, response_ids=response_ids, logprobs=tuple(row[: len(response_ids)]))
        for probe, row in zip(probes, rows, strict=True)
        for response_ids in probe.response_ids
    )


def write_policy_weights(state: dict[str, torch.Tensor], location: Path) -> None:
    """One safetensors file with Hugging Face names, appearing whole or not at all.

    Raises:
        ResourceError: the file system has too little room left, as /dev/shm in a container often has.
    """
    location.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    free = shutil.disk_usage(location).free
    if needed > free:
        raise ResourceError(
            f"publishing the policy's weights needs {needed / 2**20:,.0f} MiB, {location.parent} has "
            f"{free / 2**20:,.0f} MiB free. Enlarge it to hold two versions of the policy (docker run --shm-size, "
            "or mount -o remount,size=... /dev/shm), or delete what else lies there."
        )
    partial = location / f"{WEIGHTS_FILE}.partial"
    # Tied tensors share memory, which safetensors refuses; the engine needs lm_head.weight spelled out anyway.
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, partial)
    os.replace(partial, location / WEIGHTS_FILE)
