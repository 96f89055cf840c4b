"""A finished checkpoint, published to rollout engines the way the learner publishes a policy under training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.data.collate import pad_right
from pipeline.learning.ppo_update import write_policy_weights
from pipeline.models.backbone import load_causal_lm
from pipeline.models.critic import Policy
from pipeline.records import PolicyWeights, ProbeSequence


def publish_checkpoint(
    checkpoint: str,
    location: str,
    probes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    dtype: str,
    version: int,
) -> PolicyWeights:
    """Writes the policy's weights to `location` and evaluates the gate's probes with it, in one process."""
    model, tokenizer = load_causal_lm(checkpoint, dtype=dtype)
    input_ids = pad_right([prompt + response for prompt, response in probes], tokenizer.pad_token_id)
    prompt_lengths = torch.tensor([len(prompt) for prompt, _ in probes])
    response_lengths = torch.tensor([len(response) for _, response in probes])
    with torch.inference_mode():
        rows = Policy(model.eval())(
            input_ids, prompt_lengths, response_lengths, int(response_lengths.max()), 1.0
        ).tolist()
    write_policy_weights(model.state_dict(), Path(location))
    return PolicyWeights(
        version=version,
        location=location,
        probes=tuple(
            ProbeSequence(prompt_ids=prompt, response_ids=response, logprobs=tuple(row[: len(response)]))
            for (prompt, response), row in zip(probes, rows, strict=True)
        ),
    )
