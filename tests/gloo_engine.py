"""The engine's end of a transfer over gloo; apart from `tests/gloo.py` because it imports vllm."""

from __future__ import annotations

from unittest import mock

from actors.weight_transfer import NcclWeightTransferEngine
from tests.gloo import GlooCommunicator, without_streams


class GlooEngine(NcclWeightTransferEngine):
    """vLLM's, with another communicator."""

    def init_transfer_engine(self, init_info):
        def join(init_info, parallel_config):
            return GlooCommunicator(
                init_info.master_address, init_info.master_port, init_info.rank_offset, init_info.world_size
            )

        with mock.patch("vllm.distributed.weight_transfer.nccl_engine.worker_init_process_group", join):
            super().init_transfer_engine(init_info)

    def receive_weights(self, update_info):
        with without_streams():
            super().receive_weights(update_info)
