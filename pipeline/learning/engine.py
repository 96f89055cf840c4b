"""The optimiser step, as the learners see it: in one process here, with DeepSpeed in `actors/deepspeed_engine.py`.

Losses are sums over a rank's own rows, divided by counts of the whole batch. Gradients therefore add up over
micro-batches and over ranks; an engine never averages them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.errors import NumericsError
from pipeline.learning.training_state import Fragment, SavedState, TrainingStatePart, adam_state, trained_parameters
from pipeline.models.sequence_parallel import SequenceGroup
from pipeline.models.tensor_stream import TensorStream


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that share a peak learning rate and a weight decay."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    weight_decay: float


class TrainEngine(Protocol):
    """One rank's handle on the sharded model and its optimiser."""

    rank: int
    world_size: int
    sequence_group: SequenceGroup | None
    """The n consecutive ranks that compute rows together with this one; None: every rank has rows of its own."""
    device: torch.device
    dtype: str
    """Name of the dtype of the forward pass; parameters are float32."""
    module: nn.Module
    """The unwrapped model. Under ZeRO-3 its parameters are partitioned: call `forward`, not this."""
    max_grad_norm: float
    loss_factor: float
    """`backward` multiplies a loss by it and `step` divides again: gradients of activations are larger by it."""

    def forward(self, *args: Any) -> Any:
        """The model on one micro-batch; every rank must make the same number of calls."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradient of a scalar loss; `last` marks the final micro-batch of the step."""

    def step(self, learning_rate_factor: float, *, resting: str | None = None) -> float:
        """Clips, steps, zeroes gradients. Each group's peak learning rate is scaled by the factor.

        The groups named `resting` do not change; no gradient may have reached them.

        Returns the global gradient norm before clipping; raises NumericsError when it is not finite.
        """

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over ranks, equal on every rank."""

    def stream(self) -> TensorStream:
        """The whole model with its names, tensor by tensor, on the device of every rank. No tensor outlives a step.

        Collective: all ranks read to the end, before any of them steps.
        """

    def snapshot(self) -> TrainingStatePart:
        """Copies this rank's part of what a resumed run needs to host memory. Between steps only; not collective."""

    def load(self, directory: str) -> None:
        """Restores what the snapshots of all ranks wrote, for any number of ranks then and now. Collective.

        Raises:
            CheckpointError: the directory holds no whole state of this model.
        """


class TorchEngine:
    """A TrainEngine in one process: plain AdamW, bit-deterministic on CPU.

    Parameters are float32; `bfloat16` computes under autocast, and heads stay float32.
    """

    rank = 0
    world_size = 1
    sequence_group: SequenceGroup | None = None
    loss_factor = 1.0

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        betas: tuple[float, float],
        max_grad_norm: float,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.module = module.to(self.device)
        self.groups = tuple(groups)
        self.max_grad_norm = max_grad_norm
        self.optimiser = torch.optim.AdamW(
            [
                {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
                for group in groups
            ],
            betas=betas,
            fused=True,
        )

    def forward(self, *args: Any) -> Any:
        enabled = self.dtype == "bfloat16"
        # A cache would keep the cast of every weight, also of layers that are computed again in the backward pass.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False):
            return self.module(*args)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, learning_rate_factor: float, *, resting: str | None = None) -> float:
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        require_finite_norm(norm)
        set_learning_rates(self.optimiser, self.groups, learning_rate_factor, resting=resting)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def stream(self) -> TensorStream:
        return TensorStream.of(self.module.state_dict())

    def snapshot(self) -> TrainingStatePart:
        return TrainingStatePart.take(self._fragments(), self._shapes(), part=self.rank, num_parts=self.world_size)

    def load(self, directory: str) -> None:
        with SavedState(directory, self._shapes()) as saved:
            saved.restore(self._fragments())

    def _fragments(self) -> Iterator[Fragment]:
        for name, parameter in trained_parameters(self.module).items():
            yield Fragment.of(name, 0, parameter.data.view(-1), adam_state(self.optimiser, parameter))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in trained_parameters(self.module).items()}


def set_learning_rates(optimiser: Any, groups: Sequence[ParameterGroup], factor: float, *, resting: str | None) -> None:
    """Sets the learning rates of the next step. At a rate of 0 weight decay changes nothing either."""
    for torch_group, group in zip(optimiser.param_groups, groups, strict=True):
        torch_group["lr"] = 0.0 if group.name == resting else group.learning_rate * factor


def require_finite_norm(norm: float) -> None:
    """Raises NumericsError when a gradient norm is not finite: the step must not be taken."""
    if not torch.isfinite(torch.tensor(norm)):
        raise NumericsError(
            f"gradient norm is {norm}: the loss has diverged. Lower the learning rate, or resume from an earlier step."
        )
