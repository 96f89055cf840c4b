"""DeepSpeed behind the TrainEngine protocol. The only file that imports deepspeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.schema import RanksConfig
from pipeline.errors import CheckpointError
from pipeline.learning.engine import ParameterGroup, require_finite_norm, set_learning_rates

TAG = "state"

COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Longer than any deadline of the driver, which sees all ranks and says what hangs; a rank only knows that it waits."""


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
    # Serves tensor-parallel inference alone, yet would be compiled here at first use: a minute, a compiler, and a lock
    # file on which every later run waits for ever if this one is killed meanwhile.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    return torch.device("cuda:0" if on_gpu else "cpu")


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
        self.module = module
        self.groups = tuple(groups)
        self._zero_stage = ranks.zero_stage
        optimiser = torch.optim.AdamW(
            [
                {"params": list(group.parameters), "lr": group.learning_rate, "weight_decay": group.weight_decay}
                for group in groups
            ],
            betas=betas,
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
        # DeepSpeed averages gradients over ranks; our losses are sums over the global batch. Undone here, once.
        self._engine.backward(loss * self.world_size)

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

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        if self._zero_stage < 3:
            return (
                {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
                if self.rank == 0
                else {}
            )
        state: dict[str, torch.Tensor] = {}
        # One parameter at a time: the whole model never stands on one device.
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.rank == 0:
                    state[name] = parameter.detach().cpu().clone()
        return state

    def save(self, directory: str) -> None:
        self._engine.save_checkpoint(directory, tag=TAG)

    def load(self, directory: str) -> None:
        try:
            path, _ = self._engine.load_checkpoint(directory, tag=TAG)
        except (RuntimeError, KeyError, AssertionError, ValueError) as error:
            raise CheckpointError(
                f"{directory} does not restore this model on {self.world_size} ranks: {error}. "
                "A ZeRO checkpoint needs the number of ranks and the stage it was saved with."
            ) from error
        if path is None:
            raise CheckpointError(f"{directory} holds no DeepSpeed checkpoint for {self.world_size} ranks")


def sharded_reference(module: nn.Module, ranks: RanksConfig, *, dtype: str, device: torch.device) -> Callable[..., Any]:
    """The frozen reference as a function: replicated under ZeRO-1 and 2, sharded like the policy under ZeRO-3."""
    module = module.eval().requires_grad_(False)
    if ranks.zero_stage == 3:
        config = zero_config(ranks, dtype=dtype, max_grad_norm=0.0)
        config["managed_gradient_accumulation"] = True
        forward, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    else:
        forward = module.to(device)

    def reference(*arguments: Any) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return forward(*arguments)

    return reference


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
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config
