"""The same few held-out prompts, answered at the start, in the middle and at the end of a training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pipeline.errors import CorruptManifest
from pipeline.records import Message, RewardScore, Rollout
from pipeline.stages import storage

SAMPLES_FILE = "samples.json"
NUM_PROMPTS = 8


@dataclass(frozen=True, kw_only=True)
class KeptSample:
    """One response to a held-out prompt, with its reward."""

    prompt_id: str
    prompt: str
    response: str
    reward: float
    reward_std: float
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class SamplesOfPolicy:
    """What the policy after so many updates answered."""

    updates: int
    samples: tuple[KeptSample, ...]


class SamplesOverTime:
    """A small file of a stage: the first answers, those nearest to the middle of the training, and the last ones."""

    def __init__(self, stage_uri: str, *, num_steps: int) -> None:
        self._uri = storage.join(stage_uri, SAMPLES_FILE)
        self._middle = num_steps / 2
        self._kept = read_samples(stage_uri)

    def forget_after(self, updates: int) -> None:
        """Drops the answers of policies that a resumed run trains again."""
        self._kept = [kept for kept in self._kept if kept.updates <= updates]

    def holds(self, updates: int) -> bool:
        """Whether the policy after so many updates has answered."""
        return any(kept.updates == updates for kept in self._kept)

    def add(self, updates: int, rollouts: Sequence[Rollout], scores: Sequence[RewardScore]) -> None:
        """Keeps the answers to the first `NUM_PROMPTS` prompts, and what else is still first, middle or last."""
        samples = tuple(
            KeptSample(
                prompt_id=rollout.prompt.id,
                prompt=conversation_text(rollout.prompt.messages),
                response=rollout.response_text,
                reward=score.mean,
                reward_std=score.std,
                finish_reason=rollout.finish_reason,
            )
            for rollout, score in zip(rollouts[:NUM_PROMPTS], scores[:NUM_PROMPTS], strict=True)
        )
        others = [kept for kept in self._kept if kept.updates != updates]
        answered = sorted([*others, SamplesOfPolicy(updates=updates, samples=samples)], key=lambda kept: kept.updates)
        middle = min(answered, key=lambda kept: abs(kept.updates - self._middle))
        self._kept = [kept for kept in answered if kept in (answered[0], middle, answered[-1])]
        storage.write_text(self._uri, json.dumps([asdict(kept) for kept in self._kept]))


def read_samples(stage_uri: str) -> list[SamplesOfPolicy]:
    """The answers that a stage kept, in the order of training; empty where it kept none.

    Raises:
        CorruptManifest: the file cannot be read.
    """
    uri = storage.join(stage_uri, SAMPLES_FILE)
    text = storage.read_text(uri)
    if text is None:
        return []
    try:
        return [
            SamplesOfPolicy(updates=kept["updates"], samples=tuple(KeptSample(**sample) for sample in kept["samples"]))
            for kept in json.loads(text)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptManifest(f"{uri} cannot be read ({error}). Delete it; it only serves the report.") from error


def conversation_text(messages: Sequence[Message]) -> str:
    """A prompt in words: the user's text alone, or every turn after its role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
