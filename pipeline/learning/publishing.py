"""A finished checkpoint, published to rollout engines the way the learner publishes a policy under training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.learning.ppo_update import write_policy_weights
from pipeline.learning.probes import evaluate_probes
from pipeline.models.backbone import load_causal_lm
from pipeline.models.critic import Policy
from pipeline.records import PolicyWeights, PromptGroup


def publish_checkpoint(
    checkpoint: str,
    location: str,
    probes: Sequence[PromptGroup],
    *,
    dtype: str,
    version: int,
) -> PolicyWeights:
    """Writes the policy's weights to `location` and evaluates the gate's probes with it, in one process."""
    model, _ = load_causal_lm(checkpoint, dtype=dtype)
    evaluated = evaluate_probes(Policy(model.eval()), probes, torch.device("cpu"))
    write_policy_weights(model.state_dict(), Path(location))
    return PolicyWeights(version=version, location=location, probes=evaluated)
