"""DeepSpeed behind the TrainEngine protocol. The only file that imports deepspeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from actors.sequence_group import join_sequence_group
from pipeline.config.cluster import RanksConfig
from pipeline.learning.engine import ParameterGroup, require_finite_norm, set_learning_rates
from pipeline.learning.ppo_learner import frozen_reference
from pipeline.learning.training_state import Fragment, SavedState, TrainingStatePart, adam_state, trained_parameters
from pipeline.models.sequence_parallel_check import check_sequence_parallel
from pipeline.models.sharded_loading import PIECE_NUMBERS, move_buffers
from pipeline.models.tensor_stream import TensorStream

COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Longer than any deadline of the driver: the driver sees all ranks and can say which one hangs, a rank cannot."""


def join_process_group(rank: int, world_size: int, address: str) -> torch.device:
    """Joins the ranks' process group: NCCL where this rank sees a GPU, gloo otherwise. Returns the rank's device."""
    host, port = address.rsplit(":", 1)
    # Ray shows each actor its own GPU alone, so the local rank is always 0.
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=host, MASTER_PORT=port)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    # Only tensor-parallel inference needs this extension, but DeepSpeed would compile it here at first use. That takes
    # a compiler and a minute. If this run is killed meanwhile, its lock file makes every later run wait for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return torch.device("cuda:0" if on_gpu else "cpu")


class ZeroShards:
    """The ranks of the process group, between which ZeRO-3 splits parameters. Implements `Shards`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reads = dist.get_rank() == 0

    def split(self, parameter: nn.Parameter) -> None:
        deepspeed.zero.Init(module=nn.ParameterList([parameter]), dtype=parameter.dtype)

    @contextmanager
    def gathering(self, model: nn.Module) -> Iterator[None]:
        """As DeepSpeed's engine will do it, for a model that does not have one yet. All modules use the same memory."""
        owned = {module: split_parameters(module) for module in model.modules()}
        owned = {module: parameters for module, parameters in owned.items() if parameters}
        most = max((sum(map(padded_bytes, parameters)) for parameters in owned.values()), default=0)
        room = torch.empty(most, dtype=torch.uint8, device=self.device)
        computing: list[nn.Module] = []

        def gather(module: nn.Module, _: Any) -> None:
            free = torch.empty_like(room) if computing else room  # the second module lies within the first
            computing.append(module)
            for parameter in owned[module]:
                parameter.data = gathered(parameter, free)
                free = free[padded_bytes(parameter) :]

        def forget(module: nn.Module, _: Any, __: Any) -> None:
            computing.remove(module)
            for parameter in owned[module]:
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

        hooks = [module.register_forward_pre_hook(gather) for module in owned]
        hooks += [module.register_forward_hook(forget) for module in owned]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def split_parameters(module: nn.Module) -> list[Any]:
    """Of a module's own parameters those that are split; DeepSpeed has tied its fields to them."""
    return [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]


def padded_bytes(parameter: Any) -> int:
    """Of a split parameter: all ranks have parts of the same size."""
    return parameter.ds_tensor.nbytes * dist.get_world_size()


def gathered(parameter: Any, room: torch.Tensor) -> torch.Tensor:
    """A split parameter, whole. Collective.

    One broadcast a rank, for gloo makes copies of what it gathers, and none of what it broadcasts.

    Args:
        room: [n] bytes, `padded_bytes` at least.
    """
    part = parameter.ds_tensor.view(torch.uint8)
    whole = room[: padded_bytes(parameter)]
    for rank, place in enumerate(whole.split(part.numel())):
        if rank == dist.get_rank():
            place.copy_(part)
        dist.broadcast(place, rank)
    return whole.view(parameter.dtype)[: parameter.ds_numel].view(parameter.ds_shape)


def shards_of(ranks: RanksConfig, device: torch.device) -> ZeroShards | None:
    """What splits a model while it is loaded: under ZeRO-3 the ranks. Below, every rank holds all weights."""
    return ZeroShards(device) if ranks.zero_stage == 3 else None


def split_the_rest(module: nn.Module, device: torch.device) -> None:
    """Splits what was made whole, such as heads and adapters, and moves buffers: DeepSpeed's engine would first move
    whole parameters to the device together, and would leave buffers beside split parameters where they are."""
    shards = ZeroShards(device)
    for parameter in module.parameters():
        if not hasattr(parameter, "ds_id"):
            shards.split(parameter)
    move_buffers(module, device)


class DeepSpeedEngine:
    """One rank of a ZeRO-sharded model.

    Parameters are float32; `bfloat16` computes under autocast, and heads stay float32.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        betas: tuple[float, float],
        max_grad_norm: float,
        ranks: RanksConfig,
        dtype: str,
        device: torch.device,
    ) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device = device
        self.dtype = dtype
        self.module = module
        self.groups = tuple(groups)
        self.max_grad_norm = max_grad_norm
        for model in module.modules():
            if isinstance(model, PreTrainedModel):
                heads = model.config.get_text_config().num_attention_heads
                check_sequence_parallel(
                    ranks.sequence_parallel, heads, model=f"the {model.config.model_type} model that is trained"
                )
        self.sequence_group = join_sequence_group(ranks.sequence_parallel, timeout=COLLECTIVE_TIMEOUT)
        # DeepSpeed averages gradients over ranks; our losses are sums over the global batch. It is not told of sequence
        # groups: the gradients of their ranks add up like those of other ranks, and ZeRO shards over all ranks.
        self.loss_factor = float(self.world_size)
        self._zero_stage = ranks.zero_stage
        # As in `TorchEngine`. DeepSpeed opens autocast itself, with what this process says.
        torch.set_autocast_cache_enabled(False)
        # Ranks load at different speeds, so they wait for each other here. The process groups that DeepSpeed makes next
        # do not have our timeout: NCCL's own is ten minutes.
        self.sum_over_ranks(torch.zeros(()))
        if ranks.zero_stage == 3:
            split_the_rest(module, device)
        optimiser = torch.optim.AdamW(
            [
                {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
                for group in groups
            ],
            betas=betas,
            fused=True,
        )
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimiser,
            config=zero_config(ranks, dtype=dtype, max_grad_norm=max_grad_norm),
            dist_init_required=False,
        )

    def forward(self, *args: Any) -> Any:
        return self._engine(*args)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.backward(loss * self.loss_factor)

    def step(self, learning_rate_factor: float, *, resting: str | None = None) -> float:
        set_learning_rates(self._engine.optimizer, self.groups, learning_rate_factor, resting=resting)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        require_finite_norm(norm)
        return norm

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def stream(self) -> TensorStream:
        if self._zero_stage < 3:
            return TensorStream.of(self.module.state_dict())
        parameters: dict[str, Any] = dict(self.module.named_parameters(remove_duplicate=False))
        outline = {name: torch.empty(p.ds_shape, dtype=p.dtype, device="meta") for name, p in parameters.items()}
        return TensorStream(outline=outline, tensors=self._gathered(parameters))

    def _gathered(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """One parameter at a time: the whole model need not fit on one device."""
        for name, parameter in parameters.items():
            room = torch.empty(padded_bytes(parameter), dtype=torch.uint8, device=self.device)
            yield name, gathered(parameter, room)
            del room

    def snapshot(self) -> TrainingStatePart:
        return TrainingStatePart.take(self._fragments(), self._shapes(), part=self.rank, num_parts=self.world_size)

    def load(self, directory: str) -> None:
        with SavedState(directory, self._shapes()) as saved:
            # First the optimiser's own copy of the weights: each rank has its part.
            saved.restore(self._fragments())
            # Then the model's copy: whole on every rank, or under ZeRO-3 scattered from the first rank.
            for name, parameter in trained_parameters(self.module).items():
                if self._zero_stage < 3:
                    self._fill(parameter, saved, name)
                    continue
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    if self.rank == 0:
                        self._fill(parameter, saved, name)

    def _fill(self, parameter: nn.Parameter, saved: SavedState, name: str) -> None:
        numbers = parameter.data.view(-1)
        for start in range(0, numbers.numel(), PIECE_NUMBERS):
            piece = numbers[start : start + PIECE_NUMBERS]
            piece.copy_(saved.read("weight", name, start, piece.numel()))

    def _fragments(self) -> Iterator[Fragment]:
        """The parts of the parameters that this rank's optimiser steps.

        ZeRO-1 and 2 cut each flattened group of parameters into one equal run per rank, ZeRO-3 each parameter. The last
        run may end with padding.
        """
        zero = self._engine.optimizer
        parameters: dict[str, Any] = dict(trained_parameters(self.module))  # to which DeepSpeed ties its own fields
        if self._zero_stage == 3:
            for name, parameter in parameters.items():
                group, at, length = zero.grad_position[zero.get_param_id(parameter)]
                start = self.rank * length
                length = min(length, parameter.ds_numel - start)
                if length > 0:
                    yield self._fragment(name, start, zero.fp32_partitioned_groups_flat[group], at, length)
            return
        names = {id(parameter): name for name, parameter in parameters.items()}
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: other ranks have all of this parameter
                    own, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield self._fragment(names[id(parameter)], own.start, flat, here.start, here.numel)

    def _fragment(self, name: str, start: int, flat: torch.Tensor, at: int, length: int) -> Fragment:
        adam = adam_state(self._engine.optimizer.optimizer, flat)
        return Fragment.of(name, start, flat.data.narrow(0, at, length), adam, at=at)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        parameters: dict[str, Any] = dict(trained_parameters(self.module))
        return {name: tuple(p.ds_shape if self._zero_stage == 3 else p.shape) for name, p in parameters.items()}


def sharded_reference(module: nn.Module, ranks: RanksConfig, *, dtype: str, device: torch.device) -> Callable[..., Any]:
    """The frozen reference as a function: replicated under ZeRO-1 and 2, sharded like the policy under ZeRO-3."""
    module = module.eval().requires_grad_(False)
    if ranks.zero_stage == 3:
        config = zero_config(ranks, dtype=dtype, max_grad_norm=0.0)
        config["managed_gradient_accumulation"] = True
        split_the_rest(module, device)
        forward, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    else:
        forward = module.to(device)

    return frozen_reference(forward, dtype=dtype, device=device)


def zero_config(ranks: RanksConfig, *, dtype: str, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration. The learners own the accumulation boundary and the schedule."""
    zero: dict[str, Any] = {"stage": ranks.zero_stage, "overlap_comm": False}
    if ranks.offload_optimiser:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if dtype == "bfloat16":
        # DeepSpeed rounds weights and gradients of "safe" layers on their way between ranks, by default those of plain
        # linear layers. Here the plain linear layers are the reward heads, so none is safe.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
