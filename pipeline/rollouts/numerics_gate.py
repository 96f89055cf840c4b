"""The numerics gate: does the rollout engine hold the weights the learner published?

The learner publishes, with every version of the policy, its own log-probabilities of a few fixed sequences. After
loading the weights an engine recomputes them; a stale or half-loaded engine cannot reproduce them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.errors import StaleEngineError
from pipeline.records import Metrics, ProbeSequence, Prompt, PromptGroup

PROMPT_TOKENS = 64
"""Tokens of a probe's prompt: enough to tell weights apart. Probes are computed twice with every new version."""
RANDOM_TOKENS = 8

GATE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}
"""Default gate tolerance, nats. Float32 engines agree to 2e-5. A bfloat16 engine rounds the states between its layers
and a learner under autocast does not: with equal weights the two are 0.05 apart (SmolLM2-135M)."""


def choose_probes(prompts: Sequence[Prompt], *, vocabulary_size: int, seed: int, count: int = 8) -> list[PromptGroup]:
    """Sequences to compare: the first tokens of real prompts, of which the second half counts as the response.

    Random tokens follow as its end. The prompts exercise states that a policy really visits; the random tokens exercise
    rows of the output layer that it rarely visits.
    """
    rng = np.random.default_rng(seed)
    probes = []
    for prompt in prompts[:count]:
        beginning = prompt.token_ids[:PROMPT_TOKENS]
        middle = max(1, len(beginning) // 2)
        noise = tuple(int(t) for t in rng.integers(vocabulary_size, size=RANDOM_TOKENS))
        probes.append(PromptGroup(prompt_ids=beginning[:middle], response_ids=(beginning[middle:] + noise,)))
    return probes


def check_engine(
    probes: Sequence[ProbeSequence],
    engine_logprobs: Sequence[Sequence[float]],
    *,
    tolerance: float,
    engine: str,
    version: int,
    differing_groups: Callable[[], Mapping[str, float]],
) -> Metrics:
    """Compares the engine's probe log-probabilities with the learner's; a failure must stop the next rollout.

    Args:
        probes: as published with the weights.
        engine_logprobs: the engine's log-probabilities of the same response tokens, one sequence per probe.
        tolerance: largest mean absolute difference, nats.
        engine: name of the engine for the message.
        version: the policy version that should be loaded.
        differing_groups: called only on failure. Parameter group -> largest relative difference between the engine's
            and the published parameters, for the groups that differ at all.

    Returns:
        `gate/mean` and `gate/max` absolute differences.

    Raises:
        StaleEngineError: past the tolerance, or not finite; names the group most likely stale when it can.
    """
    if not any(probe.response_ids for probe in probes):
        raise StaleEngineError(
            f"policy version {version} was published without probes, so nothing shows that {engine} holds it. "
            "Publish at least one probe sequence with every version."
        )
    differences = [
        abs(learner_logprob - engine_logprob)
        for probe, engine_row in zip(probes, engine_logprobs, strict=True)
        for learner_logprob, engine_logprob in zip(probe.logprobs, engine_row, strict=True)
    ]
    mean, largest = sum(differences) / len(differences), max(differences)
    if mean <= tolerance and math.isfinite(largest):
        return {"gate/mean": mean, "gate/max": largest}
    groups = differing_groups()
    if groups:
        worst = max(groups, key=lambda name: groups[name])
        suspect = (
            f"Parameter group {worst!r} differs most from the published weights (by {groups[worst]:.2%} of its largest "
            f"value; {len(groups)} group(s) differ): it was not updated. Restart the job."
        )
    else:
        suspect = (
            "The engine's parameters equal the published ones, so either a copy derived from them is stale, or engine "
            "and learner compute differently. Check that both run in the same dtype on the same architecture, and that "
            "the probes were evaluated with the published version."
        )
    raise StaleEngineError(
        f"{engine} does not reproduce the learner's log-probabilities after loading policy version {version}: "
        f"mean difference {mean:.3g}, largest {largest:.3g}, tolerance {tolerance:.3g}. {suspect} "
        "Nothing was sampled from it. Raise alignment.gate_tolerance only for a lower precision."
    )
