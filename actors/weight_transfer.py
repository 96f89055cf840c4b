"""Weights into a running vLLM engine, through vLLM's own weight-transfer API.

vLLM ships transports between GPUs (`nccl`, `ipc`, ...), in which learner and engine meet in one collective. `shm` is
ours, registered beside them: the learner writes one safetensors file on the node, and every engine of the node reads it
when its turn comes. It needs no GPU, and works for engines on one as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from pipeline.errors import CheckpointError

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
        """Streams the file into the model, one tensor at a time: a full GPU has no room for a second copy.

        Raises:
            CheckpointError: the file is not on this node, or leaves parameters of the model as they were.
        """
        if not os.path.isfile(update_info.path):
            raise CheckpointError(
                f"no published weights at {update_info.path!r} on node {os.uname().nodename}. Rollout workers read "
                "what the learner's first rank writes: put both on one node, or publish where both can read."
            )
        dtype = self.model_config.dtype
        parameters = {name for name, _ in self.model.named_parameters()}
        with (
            set_current_vllm_config(self.vllm_config),
            safe_open(update_info.path, framework="pt", device=str(self.device)) as published,
        ):
            names = list(published.keys())
            loaded = self.model.load_weights((name, published.get_tensor(name).to(dtype)) for name in names)
        missing = sorted(parameters - set(loaded))
        if missing:
            raise CheckpointError(
                f"{update_info.path!r} holds {len(names)} tensors, but none for {len(missing)} of the engine's "
                f"{len(parameters)} parameters ({', '.join(missing[:3])}, ...), which would stay as they were. Publish "
                "every parameter, lm_head.weight included, from a policy of the engine's architecture."
            )

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held open between updates."""


def register() -> None:
    """Makes `shm` known to vLLM in this process; safe to repeat."""
    # It warns of layers without parameters (rotary embeddings) at every update; a parameter left out is an error above.
    logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
    with contextlib.suppress(ValueError):  # already registered
        WeightTransferEngineFactory.register_engine(BACKEND, ShmWeightTransferEngine)
