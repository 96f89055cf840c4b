"""vLLM's transfers of weights between GPUs where there is none: its own code on both ends.

Gloo is where NCCL would be, and shared memory where CUDA IPC would be; there are no streams. Names, dtypes, shapes,
order and buckets are what they are on GPUs. Imports no vllm: the processes of the actors do.
"""

from __future__ import annotations

import os
import tempfile
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
ABANDONED = []
"""Broadcasts that nobody completes: to forget one is to wait for its timeout."""


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
        if self.disabled:
            ABANDONED.append((self._gloo, work))
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


@contextmanager
def the_only_gpu():
    """Which is a CPU."""
    with (
        mock.patch.object(torch.accelerator, "current_device_index", return_value=0),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(uuid="the only one")),
    ):
        yield


def mapped(path, size):
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def rebuild_from_memory(path, size, *_):
    """Stands in for `rebuild_cuda_tensor`."""
    return mapped(path, size)


@contextmanager
def exporting_memory():
    """Within it, what is made on the GPU is made in shared memory, and can be exported."""
    from vllm.distributed.weight_transfer import packed_tensor

    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:

        def make(size, *, dtype, device):
            assert (dtype, device) == (torch.uint8, "cuda")
            file.truncate(size)
            return mapped(file.name, size)

        def export(buffer):
            return None, (file.name, buffer.numel(), *[None] * 5)

        with (
            the_only_gpu(),
            mock.patch.object(packed_tensor, "torch", SimpleNamespace(**vars(torch) | {"empty": make})),
            mock.patch.object(packed_tensor, "reduce_tensor", export),
            mock.patch.object(torch.cuda, "current_stream", return_value=NoStream()),
            mock.patch.object(torch.cuda, "ipc_collect"),
        ):
            yield


class Recorder:
    """Passes calls on to an LLM, and keeps those that put it to sleep, wake it, or give it weights."""

    def __init__(self, llm):
        self._llm = llm
        self.calls = []

    def __getattr__(self, name):
        return getattr(self._llm, name)

    def sleep(self, level):
        self.calls.append(f"sleep({level})")
        self._llm.sleep(level=level)

    def wake_up(self, tags):
        self.calls.append(f"wake_up({', '.join(tags)})")
        self._llm.wake_up(tags=tags)

    def collective_rpc(self, method, args=()):
        if "weight" in method:
            self.calls.append(method)
        return self._llm.collective_rpc(method, args=args)

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return self._llm.reset_prefix_cache()


class CpuWorker(RolloutWorker):
    """A rollout worker whose engine is on a CPU."""

    def start(self, *arguments):
        import tests.support.gloo_engine  # noqa: F401  before what registers the engines
        from actors import vllm_engine

        vllm_engine.SHARD = "tests.support.gloo_engine.GlooShard"
        super().start(*arguments)
        self._engine._llm = Recorder(self._engine._llm)

    def calls(self):
        """Since the last time."""
        recorder = self._engine._llm
        calls, recorder.calls = recorder.calls, []
        return calls

    def pid(self):
        return os.getpid()

    def shard_pids(self):
        return self._engine._llm.collective_rpc("pid")

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

    def hold(self, state, directory=None, version=0):
        """With a directory the version's file is written there, behind the transfer."""
        from actors import weight_sender
        from pipeline.rollouts.published_versions import PublishedVersions

        self._published = None if directory is None else PublishedVersions(directory)
        if directory is not None:
            self._published.announce(version)
        weight_sender.SENT_BYTES = 1  # so that one holds no more than the largest tensor
        self._learner = self
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._state = {name: tensor.to(device) for name, tensor in state.items()}

    def policy_tensors(self):
        tensors = iter(self._state.items())
        return tensors if self._published is None else self._published.write_behind(tensors, torch.float32)

    def write_due_file(self):
        if self._published is not None and self._published.is_due:
            for _ in self.policy_tensors():
                pass


class CpuRank(PolicyRank):
    """One on a CPU."""

    def meet_engines(self, receivers, *arguments):
        def listen(init_info):
            return GlooCommunicator(init_info.master_address, init_info.master_port, 0, init_info.world_size)

        self._backend, self._sizes = receivers.weight_transfer, []
        with the_only_gpu(), mock.patch("vllm.distributed.weight_transfer.nccl_engine.open_trainer_endpoint", listen):
            super().meet_engines(receivers, *arguments)
        if self._backend == "nccl":
            self._sizes = self._sender._trainer.model_update_group.sizes

    def send_weights(self):
        client = self._sender._client
        update = client.update_weights

        def counted(update_info):
            self._sizes.append(sum(update_info["tensor_sizes"]))
            update(update_info)

        if self._backend == "nccl":
            with without_streams():
                super().send_weights()
        else:
            with exporting_memory(), mock.patch.object(client, "update_weights", counted):
                super().send_weights()

    def sizes(self):
        """Of the buckets sent since the last time, bytes."""
        sizes = list(self._sizes)
        self._sizes.clear()
        return sizes


class GroupOfOne:
    """A RankGroup of one such rank."""

    def __init__(self, rank=CpuRank, **options):
        environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        if rank is CpuRank:
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        actor = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(rank)
        self.rank = actor.options(num_cpus=0, runtime_env={"env_vars": environment}, **options).remote(0, 1)

    def hold(self, state, *published):
        ray.get(self.rank.hold.remote(state, *published), timeout=300)

    def free_address(self, doing, *, deadline_s):
        return self.all(lambda rank: rank.free_address.remote(), doing=doing, deadline_s=deadline_s)[0]

    def all(self, call, *, doing, deadline_s):
        return gather([call(self.rank)], who="learner", doing=doing, deadline_s=deadline_s)
