"""A policy on its way to the rollout engines: its weights, and the probes that prove they arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pipeline.models.backbone import load_causal_lm
from pipeline.models.critic import Policy
from pipeline.models.packing import PackedTokens, pack
from pipeline.models.tensor_stream import TensorStream
from pipeline.records import PolicyWeights, ProbeSequence, PromptGroup
from pipeline.rollouts.policy_files import PolicyFiles


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
    written = PolicyFiles().write(TensorStream.of(model.state_dict()), location)
    return PolicyWeights(version=version, location=location, probes=evaluated, written_gb_per_s=written)


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
