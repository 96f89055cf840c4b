"""A policy on its way to the rollout engines: its weights, and the probes that prove they arrived."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pipeline.errors import ResourceError
from pipeline.models.backbone import load_causal_lm
from pipeline.models.critic import Policy
from pipeline.models.packing import PackedTokens, pack
from pipeline.records import PolicyWeights, ProbeSequence, PromptGroup

WEIGHTS_FILE = "model.safetensors"
SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


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


def write_policy_weights(state: dict[str, torch.Tensor], location: Path, *, over: Path | None = None) -> None:
    """One safetensors file with Hugging Face names, appearing whole or not at all.

    Every tensor is copied once, from where it is to the file. New pages of shared memory cost several times what the
    copy costs, so a version that nobody reads any more lends its own.

    Args:
        over: directory of an outdated version, which this one replaces.

    Raises:
        ResourceError: the file system has too little room left, as /dev/shm in a container often has.
    """
    if over is not None and over.exists() and over != location:
        shutil.rmtree(location, ignore_errors=True)
        over.rename(location)
    location.mkdir(parents=True, exist_ok=True)
    whole, partial = location / WEIGHTS_FILE, location / f"{WEIGHTS_FILE}.partial"
    if whole.exists():
        whole.replace(partial)
    header = _safetensors_header(state)
    needed = len(header) + sum(tensor.nbytes for tensor in state.values())
    lent = partial.stat().st_size if partial.exists() else 0
    free = shutil.disk_usage(location).free
    if needed - lent > free:
        raise ResourceError(
            f"publishing the policy's weights needs {needed / 2**20:,.0f} MiB, {location.parent} has "
            f"{free / 2**20:,.0f} MiB free. Enlarge it to hold two versions of the policy (docker run --shm-size, "
            "or mount -o remount,size=... /dev/shm), or delete what else lies there."
        )
    with open(partial, "r+b" if lent else "wb", buffering=0) as file:
        file.write(header)
        for tensor in state.values():
            _write_all(file, tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.truncate(needed)
    os.replace(partial, whole)


def _safetensors_header(state: dict[str, torch.Tensor]) -> bytes:
    """The length of a JSON text, and the text: where each tensor's bytes lie behind it.

    Source: https://github.com/huggingface/safetensors#format; the text is padded so that tensors start aligned.
    """
    entries, end = {}, 0
    for name, tensor in state.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": SAFETENSORS_DTYPE[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_all(file: io.RawIOBase, left: memoryview) -> None:
    """A single write takes at most 2 GiB."""
    while left:
        left = left[file.write(left) :]
