"""Weights into a running vLLM engine, through vLLM's own weight-transfer API.

`shm` is ours: the learner writes one safetensors file on the node, and every engine of the node reads it in its turn.
It needs no GPU, and also works for engines on one. `nccl` and `ipc` are vLLM's, between GPUs: learner and engines take
part at the same time (`actors/weight_sender.py` is the learner's end). An engine of any of the three can also read the
file. So a worker that joins late gets the weights that the others have already.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from vllm.config import WeightTransferConfig, set_current_vllm_config
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from pipeline.config.cluster import WeightTransfer
from pipeline.errors import CheckpointError, TransferFailed
from pipeline.rollouts.policy_files import PolicyFiles

STOPPED = "weight transfer stopped"
"""Key that the sender sets in the store through which learner and engines met."""
WATCH_S = 0.5
"""How often a receiving engine looks for that key."""

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)
UpdateInfo = TypeVar("UpdateInfo", bound=WeightTransferUpdateInfo)


class LoadsWeights(Protocol):
    """A vLLM model: torch's type of a module does not know this method."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Returns the names of the parameters that were set."""


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Empty: the file says what it holds."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """The directory of the published weights."""

    location: str = ""


class ReadsPublishedFile(WeightTransferEngine[InitInfo, UpdateInfo]):
    """What the engines of all three backends add to vLLM's: an update can come from the published file."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._files = PolicyFiles()

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
            # Without this the next update would begin with the parts that this one has not finished.
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
            dtype = cast(torch.dtype, self.model_config.dtype)  # a name only until vLLM has read the model's config
            loaded = cast(LoadsWeights, self.model).load_weights(
                (name, tensor.to(self.device, dtype)) for name, tensor in published.items()
            )
        missing = sorted(parameters - set(loaded))
        if missing:
            raise CheckpointError(
                f"the policy at {location!r} has {len(published)} tensors, but none for {len(missing)} of the engine's "
                f"{len(parameters)} parameters ({', '.join(missing[:3])}, ...), which would stay as they were. Publish "
                "every parameter, lm_head.weight included, from a policy of the engine's architecture."
            )


class ShmWeightTransferEngine(ReadsPublishedFile[ShmInitInfo, ShmUpdateInfo]):
    """Takes weights from the published file only."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Nothing to do: the file system is the transport, so nobody has to meet."""

    def start_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        self._read(update_info.location)

    def finish_weight_update(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to do: no connection stays open between updates."""


class NcclWeightTransferEngine(
    ReadsPublishedFile[NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo], NCCLWeightTransferEngine
):
    """Receives what the learner's first rank broadcasts, until that rank is gone or says that it stops."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Meets a learner, after leaving the previous one: a stage that starts again has new ranks."""
        self.shutdown()
        super().init_transfer_engine(init_info)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        assert self.model_update_group is not None, "no learner was met"
        with _giving_up_with_the_sender(self.model_update_group):
            super().receive_weights(update_info)
        if self.model_update_group.disabled:
            raise TransferFailed("the learner stopped sending: another engine failed, or the learner did")


@contextmanager
def _giving_up_with_the_sender(communicator: PyNcclCommunicator) -> Iterator[None]:
    """Within it, a broadcast ends when the sender has stopped or is gone; NCCL itself waits for ever.

    The calling thread is blocked inside NCCL meanwhile. So a second thread watches the sender, and destroys the
    communicator under the first one, which ends the blocked call.
    """
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
    """Ends a transfer for learner and engines alike. The sender calls it, from any thread."""
    # First: an engine must read why its broadcast ends.
    _store(communicator).set(STOPPED, "1")
    communicator.destroy()


def sender_stopped(communicator: PyNcclCommunicator) -> bool:
    """Whether the sender has called `stop_sending`, or is gone."""
    try:
        return _store(communicator).check([STOPPED])
    except RuntimeError:  # the store lives in the sender's process, which is gone
        return True


def _store(communicator: PyNcclCommunicator) -> torch.distributed.Store:
    # vLLM joins learner and engines without a process group of torch.
    return cast(StatelessProcessGroup, communicator.group).store


class IpcWeightTransferEngine(
    ReadsPublishedFile[IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo], IPCWeightTransferEngine
):
    """Copies from the memory of the learner's rank on the same GPU."""

    def init_transfer_engine(self, init_info: IPCWeightTransferInitInfo) -> None:
        """Joins the sender anew, as `NcclWeightTransferEngine.init_transfer_engine` does."""
        self.shutdown()
        super().init_transfer_engine(init_info)


ENGINES: dict[WeightTransfer, type[WeightTransferEngine]] = {
    "shm": ShmWeightTransferEngine,
    "nccl": NcclWeightTransferEngine,
    "ipc": IpcWeightTransferEngine,
}


def register_all() -> None:
    """Makes the backends known to vLLM in this process; safe to repeat."""
    # At every update vLLM warns of layers without parameters (rotary embeddings). A missing parameter is an error here.
    logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
    for backend, engine in ENGINES.items():
        with contextlib.suppress(ValueError):  # already registered
            WeightTransferEngineFactory.register_engine(_name(backend), engine)


def transfer_config(backend: WeightTransfer) -> WeightTransferConfig:
    """The engine option that chooses the backend."""
    return WeightTransferConfig(backend=_name(backend))


def _name(backend: WeightTransfer) -> str:
    return f"published_or_{backend}"
