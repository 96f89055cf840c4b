"""Weights into a running vLLM engine, through vLLM's own weight-transfer API.

vLLM ships transports between GPUs. `shm` is ours, registered beside them: the learner writes one safetensors file on the
node, every engine of the node reads it. It works for engines on CPU and on GPU.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "shm"


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the file says what it holds."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Where the published weights lie."""

    path: str = ""


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Loads a published safetensors file into the model of this worker."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """The file system is the transport; there is no rendezvous."""

    def start_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # The base class synchronises an accelerator, which a CPU engine does not have.
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        dtype = self.model_config.dtype
        weights = load_file(update_info.path, device=str(self.device))
        with set_current_vllm_config(self.vllm_config):
            self.model.load_weights((name, tensor.to(dtype)) for name, tensor in weights.items())

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held open between updates."""


def register() -> None:
    """Makes `shm` known to vLLM in this process; safe to repeat."""
    with contextlib.suppress(ValueError):  # already registered
        WeightTransferEngineFactory.register_engine(BACKEND, ShmWeightTransferEngine)
