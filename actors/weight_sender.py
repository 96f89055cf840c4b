"""The learner's end of a transfer between GPUs (`nccl`, `ipc`); `actors/weight_transfer.py` is the engine's.

vLLM's trainer engines move the bytes, in buckets. This file says which tensors go to which workers, and what happens
when a worker fails. The learner's ranks read their shards together, so none of them may stop before the last tensor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from actors.weight_transfer import stop_sending
from cluster.rollout_plan import WeightReceivers
from pipeline.config.cluster import WeightTransfer
from pipeline.errors import TransferFailed

SENT_BYTES = 256 * 2**20
"""The size of a bucket on its way between GPUs. Every GPU has room for two of them while weights are sent."""


class PolicySource(WeightSource):
    """The policy as the engines need it: published names, the engines' dtype."""

    def __init__(self, tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._metadata: list[ParamMeta] = []
        self._reading: Iterator[tuple[str, torch.Tensor]] = iter(())

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of every tensor. The first call reads the tensors: all ranks must make it together."""
        if not self._metadata:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._reading = self._tensors()
        for name, tensor in self._reading:
            yield name, tensor.to(self._dtype)

    def read_to_the_end(self) -> None:
        """Reads the rest of the last pass: the other ranks read it too, and cannot finish without this rank."""
        for _ in self._reading:
            pass

    def largest_bytes(self) -> int:
        """The size of the largest tensor; a bucket must hold it."""
        return max(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in self.metadata())


class RolloutWorkersClient:
    """Implements vLLM's client of the engines: passes what vLLM's trainer engine calls to every rollout worker.

    It never raises. The first worker to fail ends the transfer for all: the client calls no worker again, and `abort`
    frees a rank that waits for the failed worker. The sender still reads all weights, because the other ranks do.
    With `nccl`, vLLM calls `update_weights` in a second thread while the rank's main thread broadcasts. The threads
    share `failure`, which is set before `abort` ends the broadcast, so the main thread finds the reason there.
    """

    def __init__(self, workers: Sequence[Any], deadline_s: float, *, shards: int) -> None:
        self._workers = workers
        self._shards = shards
        self._deadline_s = deadline_s
        self._end = 0.0
        self.abort: Callable[[], None] = lambda: None
        self.failure: Exception | None = None

    def begin(self) -> None:
        """Starts the clock: all calls until the next `begin` together must end within the deadline."""
        self._end = time.monotonic() + self._deadline_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # To vLLM each worker is the only engine, and its shards count from the offset.
        offset = init_info.get("rank_offset")
        self._call_all(
            lambda n, worker: worker.meet_learner.remote(
                init_info if offset is None else init_info | {"rank_offset": offset + n * self._shards}
            )
        )

    def start_weight_update(self) -> None:
        self._call_all(lambda n, worker: worker.start_update.remote())

    def update_weights(self, update_info: Any) -> None:
        self._call_all(lambda n, worker: worker.receive.remote(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call_all(lambda n, worker: worker.finish_update.remote())

    def _call_all(self, call: Callable[[int, Any], Any]) -> None:
        if self.failure is not None:
            return
        waiting = [call(n, worker) for n, worker in enumerate(self._workers)]
        try:
            while waiting:  # one answer at a time: the first worker to fail may be the last in order
                left = max(0.0, self._end - time.monotonic())
                ready, waiting = ray.wait(waiting, num_returns=1, timeout=left)
                if not ready:
                    raise TimeoutError(
                        f"{len(waiting)} of {len(self._workers)} did not answer in {self._deadline_s:g} s"
                    )
                ray.get(ready, timeout=left)
        except Exception as error:
            self.failure = error
            self.abort()


class WeightSender:
    """One rank's part of the transfer. All ranks of the learner make one and call it together; the first rank sends."""

    def __init__(
        self,
        receivers: WeightReceivers,
        tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
        workers: Sequence[Any],
        *,
        rank: int,
        address: str,
        deadline_s: float,
    ) -> None:
        """Meets the workers.

        Args:
            tensors: the policy, tensor by tensor (`PPOLearner.policy_tensors`).
            workers: Ray handles of rollout workers, idle.
            address: where the first rank waits for the workers, "host:port".
            deadline_s: how long the meeting may take, and each sending.

        Raises:
            TransferFailed: a worker did not come; only the first rank raises it.
        """
        self._client = RolloutWorkersClient(workers, deadline_s, shards=receivers.shards)
        self._source = source = PolicySource(tensors, getattr(torch, receivers.dtype))
        self._client.begin()
        if torch.cuda.is_available():
            # Otherwise vLLM would move this rank alone to a new CUDA stream, of which DeepSpeed knows nothing.
            torch.cuda.set_stream(torch.cuda.current_stream())
        try:
            self._trainer = WeightTransferTrainerFactory.trainer_init(
                trainer_init_info(
                    receivers.weight_transfer,
                    rank=rank,
                    address=address,
                    num_shards=len(workers) * receivers.shards,
                    bucket_bytes=max(SENT_BYTES, source.largest_bytes()),
                ),
                client=self._client,
                source=source,
            )
        except RuntimeError as error:
            raise TransferFailed(_error_message(self._client.failure or error)) from error
        self._require_no_failure()
        if isinstance(self._trainer, NCCLTrainerWeightTransferEngine) and self._trainer.model_update_group is not None:
            self._client.abort = partial(stop_sending, self._trainer.model_update_group)

    def send(self) -> None:
        """Sends the policy as it is now into every engine; the engines still have to pass the gate.

        Raises:
            TransferFailed: a worker is gone, hangs or refused; only the first rank raises it, after the last tensor.
                Assume that no worker has the policy, and do not use this sender again.
        """
        self._client.begin()
        try:
            self._trainer.send_weights()
        except RuntimeError as error:  # the connection broke, perhaps because a worker died
            self._source.read_to_the_end()
            raise TransferFailed(_error_message(self._client.failure or error)) from error
        self._require_no_failure()

    def close(self) -> None:
        self._trainer.shutdown()

    def _require_no_failure(self) -> None:
        if self._client.failure is not None:
            raise TransferFailed(_error_message(self._client.failure)) from self._client.failure


def trainer_init_info(
    backend: WeightTransfer, *, rank: int, address: str, num_shards: int, bucket_bytes: int
) -> TrainerInitInfo:
    """What vLLM's trainer engine of this backend must know.

    Args:
        num_shards: of all engines together.
    """
    if backend == "ipc":
        return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=bucket_bytes)
    host, port = address.rsplit(":", 1)
    return NCCLTrainerInitInfo(
        rank=rank,
        master_address=host,
        master_port=int(port),
        world_size=1 + num_shards,
        packed_buffer_size_bytes=bucket_bytes,
    )


def _error_message(error: BaseException) -> str:
    return (
        f"weights did not go from the learner's GPUs to the engines': {type(error).__name__}: {error}. The engines "
        "read the published file instead. If it stays so, set cluster.rollout.weight_transfer=shm."
    )
