"""Weights into a running vLLM engine, through vLLM's own weight-transfer API.

`shm` is ours: the learner writes one safetensors file on the node, and every engine of the node reads it when its turn
comes. It needs no GPU, and works for engines on one as well. `nccl` and `ipc` are vLLM's, between GPUs: learner and
engines take part at the same time (`actors/weight_sender.py` is the other end). An engine of any of the three also
reads the file, which is how a worker gets its weights that joins when the others have theirs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from pipeline.config.cluster import WeightTransfer
from pipeline.errors import CheckpointError, TransferFailed
from pipeline.rollouts.policy_files import PolicyFiles

STOPPED = "weight transfer stopped"
"""Key in the store through which learner and engines met."""
WATCH_S = 0.5


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the file says what it holds."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """Where the published weights lie."""

    location: str = ""


class ReadsPublishedFile(WeightTransferEngine):
    """What the engines of all three backends add to vLLM's."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._files = PolicyFiles()

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        """Meets a learner, after leaving the one before: a stage that starts again has new ranks."""
        self.shutdown()
        super().init_transfer_engine(init_info)

    def update_weights(self, update_info: dict) -> None:
        """Takes part of the weights as the backend does, or all of them from the file in `update_info["location"]`."""
        try:
            if "location" in update_info:
                self._read(update_info["location"])
            else:
                self.receive_weights(self.parse_update_info(update_info))
            # The base class synchronises an accelerator, which a CPU engine does not have.
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
        except BaseException:
            # Else the next update would begin with the parts that this one has left waiting.
            self.finish_weight_update()
            raise

    def _read(self, location: str) -> None:
        """Streams the file into the model, one tensor at a time: a full GPU has no room for a second copy.

        Raises:
            CheckpointError: the file is not on this node, or leaves parameters of the model as they were.
        """
        published = self._files.read(location)
        parameters = {name for name, _ in self.model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            loaded = self.model.load_weights(
                (name, tensor.to(self.device, self.model_config.dtype)) for name, tensor in published.items()
            )
        missing = sorted(parameters - set(loaded))
        if missing:
            raise CheckpointError(
                f"the policy at {location!r} has {len(published)} tensors, but none for {len(missing)} of the engine's "
                f"{len(parameters)} parameters ({', '.join(missing[:3])}, ...), which would stay as they were. Publish "
                "every parameter, lm_head.weight included, from a policy of the engine's architecture."
            )


class ShmWeightTransferEngine(ReadsPublishedFile, WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Knows no other way than the file."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """The file system is the transport; there is no rendezvous."""

    def start_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        self._read(update_info.location)

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing is held open between updates."""


class NcclWeightTransferEngine(ReadsPublishedFile, NCCLWeightTransferEngine):
    """Receives what the learner's first rank broadcasts, until that rank is gone or says that it stops."""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        assert self.model_update_group is not None, "no learner was met"
        with _watching(self.model_update_group):
            super().receive_weights(update_info)
        if self.model_update_group.disabled:
            raise TransferFailed("the learner stopped sending: another engine failed, or the learner did")


@contextmanager
def _watching(communicator: PyNcclCommunicator) -> Iterator[None]:
    """Within it, a broadcast that nobody completes is given up; NCCL itself waits for ever."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_S):
            if sender_stopped(communicator):
                communicator.destroy()
                return

    watcher = threading.Thread(target=watch, name="weight transfer", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def stop_sending(communicator: PyNcclCommunicator) -> None:
    """Ends a transfer for all who take part in it, from the sender's side and from any thread."""
    communicator.group.store.set(STOPPED, b"1")
    communicator.destroy()


def sender_stopped(communicator: PyNcclCommunicator) -> bool:
    try:
        return communicator.group.store.check([STOPPED])
    except RuntimeError:  # the sender keeps the store, and is gone
        return True


class IpcWeightTransferEngine(ReadsPublishedFile, IPCWeightTransferEngine):
    """Copies from the memory of the learner's rank on the same GPU."""


ENGINES = {"shm": ShmWeightTransferEngine, "nccl": NcclWeightTransferEngine, "ipc": IpcWeightTransferEngine}


def register(backend: WeightTransfer) -> WeightTransferConfig:
    """Makes the backend known to vLLM in this process; safe to repeat. Returns what an engine is told to use it."""
    # It warns of layers without parameters (rotary embeddings) at every update; a parameter left out is an error above.
    logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
    name = f"published_or_{backend}"
    with contextlib.suppress(ValueError):  # already registered
        WeightTransferEngineFactory.register_engine(name, ENGINES[backend])
    return WeightTransferConfig(backend=name)
