"""The engine's end of a transfer over gloo or shared memory, which imports vllm; `gloo.py` must not."""

from __future__ import annotations

import os
from unittest import mock

from actors import weight_transfer
from actors.weight_transfer import IpcWeightTransferEngine, NcclWeightTransferEngine
from tests.support.gloo import GlooCommunicator, rebuild_from_memory, the_only_gpu, without_streams


class GlooEngine(NcclWeightTransferEngine):
    """vLLM's, with another communicator."""

    def init_transfer_engine(self, init_info):
        def join(init_info, parallel_config):
            return GlooCommunicator(
                init_info.master_address,
                init_info.master_port,
                init_info.rank_offset + parallel_config.rank,
                init_info.world_size,
            )

        with mock.patch("vllm.distributed.weight_transfer.nccl_engine.worker_init_process_group", join):
            super().init_transfer_engine(init_info)

    def receive_weights(self, update_info):
        with without_streams():
            super().receive_weights(update_info)


class SharedMemoryEngine(IpcWeightTransferEngine):
    """vLLM's, where the learner's memory is a file."""

    def receive_weights(self, update_info):
        with the_only_gpu(), mock.patch("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild_from_memory):
            super().receive_weights(update_info)


weight_transfer.ENGINES |= {"nccl": GlooEngine, "ipc": SharedMemoryEngine}

from actors.engine_weights import EngineShard  # noqa: E402  registers the engines above, in every process of an engine


class GlooShard(EngineShard):
    """What a process of an engine has beside vLLM's worker, with these engines."""

    def pid(self):
        return os.getpid()
