"""vLLM's NCCL transfer of weights where there is no GPU: its own code on both ends, gloo where NCCL would be.

Only the communicator and the CUDA streams are replaced. Names, dtypes, shapes, order and buckets are what they are on
GPUs. Imports no vllm: the processes of the actors do.
"""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import ray
import torch
import torch.distributed as dist

from actors.rank_group import CONCURRENCY_GROUPS, Rank, gather
from actors.rollout_worker import RolloutWorker

TIMEOUT = timedelta(seconds=60)


class GlooCommunicator:
    """Stands in for PyNcclCommunicator."""

    device = torch.device("cpu")

    def __init__(self, host, port, rank, world_size):
        self.group = SimpleNamespace(store=dist.TCPStore(host, port, world_size, rank == 0, TIMEOUT))
        self.disabled = False
        self.sizes = []
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", self.group.store), rank, world_size, TIMEOUT)

    def broadcast(self, tensor, src, stream=None):
        if self.disabled:
            return
        options = dist.BroadcastOptions()
        options.rootRank = src
        work = self._gloo.broadcast([tensor], options)
        while not work.is_completed() and not self.disabled:  # gloo cannot be interrupted; NCCL's kernel is aborted
            time.sleep(0.001)
        self.sizes.append(tensor.nbytes)

    def destroy(self):
        self.disabled = True


class NoStream:
    def synchronize(self):
        """Nothing is ever under way."""


@contextmanager
def without_streams():
    from vllm.distributed.weight_transfer import packed_tensor

    with (
        mock.patch.object(packed_tensor, "_get_streams", lambda device, count: [NoStream()] * count),
        mock.patch.object(torch.cuda, "stream", return_value=nullcontext()),
        mock.patch.object(torch.accelerator, "current_device_index", return_value=0),
    ):
        yield


class GlooWorker(RolloutWorker):
    """A rollout worker whose engine is on a CPU."""

    def start(self, *arguments):
        from actors import weight_transfer
        from tests.gloo_engine import GlooEngine

        weight_transfer.ENGINES["nccl"] = GlooEngine
        super().start(*arguments)

    def loader(self):
        """What the next policy of this shape will come in by."""
        return "ours" if self._engine._replaceable else "vLLM's"

    def fail_next(self):
        self._fails = True

    def receive(self, update_info):
        if getattr(self, "_fails", False):
            self._fails = False
            raise MemoryError("no room for the next bucket")
        super().receive(update_info)


class PolicyRank(Rank):
    """The learner's first rank, with a policy that it is given instead of a learner."""

    def hold(self, state):
        from actors import weight_sender

        weight_sender.BUCKET_BYTES = 1  # so that one holds no more than the largest tensor
        self._learner = self
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._state = {name: tensor.to(device) for name, tensor in state.items()}

    def policy_tensors(self):
        yield from self._state.items()


class GlooRank(PolicyRank):
    """One on a CPU."""

    def meet_engines(self, *arguments):
        def listen(init_info):
            return GlooCommunicator(init_info.master_address, init_info.master_port, 0, init_info.world_size)

        with mock.patch("vllm.distributed.weight_transfer.nccl_engine.open_trainer_endpoint", listen):
            super().meet_engines(*arguments)

    def send_weights(self):
        with without_streams():
            super().send_weights()

    def sizes(self):
        """Of the buckets sent since the last time, bytes."""
        group = self._sender._trainer.model_update_group
        sizes, group.sizes = group.sizes, []
        return sizes


class GroupOfOne:
    """A RankGroup of one such rank."""

    def __init__(self, rank=GlooRank, **options):
        environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        if rank is GlooRank:
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        actor = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(rank)
        self.rank = actor.options(num_cpus=0, runtime_env={"env_vars": environment}, **options).remote(0, 1)

    def hold(self, state):
        ray.get(self.rank.hold.remote(state), timeout=240)

    def free_address(self, doing, *, deadline_s):
        return self.all(lambda rank: rank.free_address.remote(), doing=doing, deadline_s=deadline_s)[0]

    def all(self, call, *, doing, deadline_s):
        return gather([call(self.rank)], who="learner", doing=doing, deadline_s=deadline_s)
