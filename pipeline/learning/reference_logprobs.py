"""What the reference policy says of responses: computed once, and kept by content for other runs and methods."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import CorruptManifest
from pipeline.records import PromptGroup
from pipeline.stages import storage

DIRECTORY = "reference_logprobs"
LOGPROBS_FILE = "logprobs.safetensors"
COMMIT_FILE = "commit.json"
GROUPS_PER_FILE = 512
"""One call of the ranks: minutes on a CPU, within any deadline."""

MeasureLogprobs = Callable[[Sequence[PromptGroup]], torch.Tensor]
"""`DirectLearner.logprobs` of a learner that holds the reference policy."""


def _ignore(num_behind: int, num_groups: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, kw_only=True)
class ReferenceLogprobs:
    """The log-probabilities of one reference policy, in files of some hundred prompts, each with its commit.

    A file's name is a hash of the policy and of all token ids, so it also depends on the tokenizer and on the longest
    length. An interrupted run keeps the files that it has written.
    """

    uri: str
    """The directory of all references of a workspace."""
    policy: str
    """Fingerprint of the reference policy."""
    dtype: str
    """Of its forward pass."""
    measure: MeasureLogprobs

    @classmethod
    def in_workspace(cls, workspace: str, *, policy: str, dtype: str, measure: MeasureLogprobs) -> ReferenceLogprobs:
        return cls(uri=storage.join(workspace, DIRECTORY), policy=policy, dtype=dtype, measure=measure)

    def of(self, groups: Sequence[PromptGroup], *, before: Callable[[int, int], None] = _ignore) -> torch.Tensor:
        """[N, k] float32: log pi_ref(y|x) of every response, nats; from the workspace where they lie there.

        Args:
            groups: N prompts with k responses each.
            before: called before prompts are computed, with the number of those behind and of all; may raise to leave.
        """
        parts = []
        for first in range(0, len(groups), GROUPS_PER_FILE):
            part = groups[first : first + GROUPS_PER_FILE]
            place = storage.join(self.uri, self._key(part))
            if storage.read_text(storage.join(place, COMMIT_FILE)) is None:
                before(first, len(groups))
                parts.append(self._compute(part, place))
            else:
                parts.append(_load(place))
        return torch.cat(parts)

    def _compute(self, groups: Sequence[PromptGroup], place: str) -> torch.Tensor:
        logprobs = self.measure(groups).contiguous()
        with storage.writing(place) as directory:
            # Two runs may compute the same file at a time: a reader of either sees a whole one.
            unfinished = os.path.join(directory, f"{LOGPROBS_FILE}.{os.getpid()}")
            save_file({"logprobs": logprobs}, unfinished)
            os.replace(unfinished, os.path.join(directory, LOGPROBS_FILE))
        storage.make_durable(place)
        commit = {"policy": self.policy, "dtype": self.dtype, "responses": logprobs.numel()}
        storage.write_text(storage.join(place, COMMIT_FILE), json.dumps(commit))
        return logprobs

    def _key(self, groups: Sequence[PromptGroup]) -> str:
        digest = hashlib.sha256(json.dumps([self.policy, self.dtype]).encode())
        for group in groups:
            digest.update(json.dumps([group.prompt_ids, *group.response_ids]).encode())
        return digest.hexdigest()[:32]


def _load(place: str) -> torch.Tensor:
    try:
        with storage.reading(place) as directory:
            return load_file(os.path.join(directory, LOGPROBS_FILE))["logprobs"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CorruptManifest(
            f"{place} is committed but cannot be read: {error}. Delete it; the same command computes it again."
        ) from error
