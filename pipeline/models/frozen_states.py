"""The states of a backbone that does not train: computed once, kept in files, looked up by every run.

The states that a head sees are a function of prompt and response alone. So a map from tokens to states serves any
number of epochs and runs, however the pairs are shuffled, split or relabelled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import CheckpointError
from pipeline.models.backbone import load_backbone, load_config
from pipeline.models.packing import (
    PackedTokens,
    in_packed_order,
    pack,
    packed_states,
    prompt_and_response_states,
    use_packed_attention,
)
from pipeline.models.wheel_checkpoints import unpacked
from pipeline.records import PromptGroup
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint, fingerprint

VERSION = 2
"""Raised when states are computed otherwise."""


class FrozenStates:
    """(prompt, response) in tokens -> [2, H] float32, the states of each that the head reads."""

    def __init__(self, states: Mapping[str, torch.Tensor]) -> None:
        self._states = states

    def __len__(self) -> int:
        return len(self._states)

    @classmethod
    def read(cls, uri: str) -> FrozenStates:
        """All that `write_states` left there; nothing where there is none.

        Raises:
            CheckpointError: a file is damaged.
        """
        states: dict[str, torch.Tensor] = {}
        with storage.reading(uri) as directory:
            for path in sorted(Path(directory).glob("*.safetensors")):
                try:
                    states |= load_file(path)
                except SafetensorError as error:
                    raise CheckpointError(f"{path} cannot be read: {error}. Delete it to compute it again.") from error
        return cls(states)

    def look_up(self, packed: PackedTokens) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What `RewardModel.encode` returns for R responses, [R, H] twice; None when one of them is not known."""
        found = [self._states.get(key) for key in response_keys(packed)]
        known = [state for state in found if state is not None]
        if len(known) < len(found):
            return None
        prompts, responses = torch.stack(known, dim=1).to(packed.token_ids.device)
        return prompts, responses

    def missing(self, groups: Iterable[PromptGroup]) -> list[PromptGroup]:
        """What is not known of these groups: every prompt once, with each of its responses once."""
        responses: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for group in groups:
            for response in group.response_ids:
                if _key(group.prompt_ids, response) not in self._states:
                    responses.setdefault(group.prompt_ids, {})[response] = None
        return [PromptGroup(prompt_ids=prompt, response_ids=tuple(found)) for prompt, found in responses.items()]


@dataclass(frozen=True, kw_only=True)
class StatesSpec:
    """Which states a head reads."""

    backbone: str
    """A directory, the wheel of a model, or a hub name."""
    dtype: str
    """"bfloat16" computes under autocast, as training does."""
    layers: int | None
    """How many of the first layers are used; None uses all."""
    pooling: Literal["last", "mean"]

    @property
    def key(self) -> str:
        """Identity of the states. A directory and a wheel count by their contents, a hub name by itself."""
        how = {"dtype": self.dtype, "layers": self.layers, "pooling": self.pooling}
        return fingerprint("frozen_states", VERSION, how, [_weights(self.backbone)])[:16]

    @property
    def bytes_per_response(self) -> int:
        return 2 * int(load_config(self.backbone).hidden_size) * torch.float32.itemsize


@cache
def _weights(backbone: str) -> str:
    place = unpacked(backbone)
    return directory_fingerprint(place) if os.path.isdir(place) else place


def response_keys(packed: PackedTokens) -> list[str]:
    """[R] hashes of prompt and response, in packed order."""
    tokens = iter(packed.token_ids.tolist())
    groups = []
    for prompt_length, *lengths in packed.lengths:
        prompt = [next(tokens) for _ in range(prompt_length)]
        groups.append([_key(prompt, [next(tokens) for _ in range(length)]) for length in lengths])
    return in_packed_order(groups)


def load_frozen_backbone(spec: StatesSpec, *, device: str) -> PreTrainedModel:
    """A backbone that computes states and does not train.

    With "bfloat16" its matrices are rounded once: autocast would round them in every forward pass, to the same values.
    """
    with storage.reading(spec.backbone) as directory:
        model = load_backbone(directory, dtype="float32", num_layers=spec.layers)
    use_packed_attention(model.eval().requires_grad_(False).to(torch.device(device)))
    for module in model.modules() if spec.dtype == "bfloat16" else ():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()
    return model


def compute_states(
    backbone: PreTrainedModel, groups: Iterable[PromptGroup], spec: StatesSpec, *, most_responses: int = 8
) -> dict[str, torch.Tensor]:
    """The states of every response, by key; each prompt alone, so that they do not depend on one another.

    Args:
        backbone: that of `spec`, as `load_frozen_backbone` returns it.
        most_responses: how many responses of a prompt share a forward pass.
    """
    device = next(backbone.parameters()).device
    states: dict[str, torch.Tensor] = {}
    for group in groups:
        for responses in _chunks(group.response_ids, most_responses):
            packed = pack([PromptGroup(prompt_ids=group.prompt_ids, response_ids=responses)]).to(device)
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=spec.dtype == "bfloat16"):
                seen = prompt_and_response_states(packed_states(backbone, packed), packed, spec.pooling)
            both = torch.stack([state.float() for state in seen], dim=1).cpu()
            states |= zip(response_keys(packed), both, strict=True)
    return states


def write_states(states: Mapping[str, torch.Tensor], directory: str) -> None:
    """Writes one file, named by a hash of its keys."""
    name = hashlib.sha256("".join(sorted(states)).encode()).hexdigest()[:32]
    save_file({key: state.contiguous() for key, state in states.items()}, Path(directory, f"{name}.part"))
    Path(directory, f"{name}.part").replace(Path(directory, f"{name}.safetensors"))


def _chunks(responses: Sequence[tuple[int, ...]], size: int) -> list[tuple[tuple[int, ...], ...]]:
    return [tuple(responses[first : first + size]) for first in range(0, len(responses), size)]


def _key(prompt: Sequence[int], response: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([list(prompt), list(response)]).encode()).hexdigest()[:32]
