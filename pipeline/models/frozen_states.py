"""The states of a backbone that does not train: computed once, kept in files, looked up by every run.

The states that a head sees are a function of prompt and response alone. So a map from tokens to states serves any
number of epochs and runs, however the pairs are shuffled, split or relabelled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError
from pipeline.models.packing import PackedTokens, in_packed_order


class FrozenStates:
    """(prompt, response) in tokens -> [2, H] float32, the states at the last token of each."""

    def __init__(self, states: Mapping[str, torch.Tensor]) -> None:
        self._states = states

    @classmethod
    def read(cls, directory: str) -> FrozenStates:
        """All that `write_states` left in a directory; nothing where there is none.

        Raises:
            CheckpointError: a file is damaged.
        """
        states: dict[str, torch.Tensor] = {}
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

    def holds(self, keys: Iterable[str]) -> bool:
        """Whether all of these responses are known."""
        return all(key in self._states for key in keys)


def response_keys(packed: PackedTokens) -> list[str]:
    """[R] hashes of prompt and response, in packed order."""
    tokens = iter(packed.token_ids.tolist())
    groups = []
    for prompt_length, *lengths in packed.lengths:
        prompt = [next(tokens) for _ in range(prompt_length)]
        groups.append([_key(prompt, [next(tokens) for _ in range(length)]) for length in lengths])
    return in_packed_order(groups)


def write_states(states: Mapping[str, torch.Tensor], directory: str) -> None:
    """Writes one file, named by a hash of its keys."""
    name = hashlib.sha256("".join(sorted(states)).encode()).hexdigest()[:32]
    save_file({key: state.contiguous() for key, state in states.items()}, Path(directory, f"{name}.part"))
    Path(directory, f"{name}.part").replace(Path(directory, f"{name}.safetensors"))


def _key(prompt: list[int], response: list[int]) -> str:
    return hashlib.sha256(json.dumps([prompt, response]).encode()).hexdigest()[:32]
