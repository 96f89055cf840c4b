"""The processes of an engine of several shards: none of them outlives another."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import wait
from threading import Thread

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class ShardProcesses(MultiprocExecutor):
    """vLLM's processes of one node, whose engine ends at once when a shard dies; the other shards end with it.

    vLLM's own monitor first waits up to nine seconds for the other shards, which wait for the dead one. Meanwhile calls
    fail with an error that looks like a fault of the code, after which the pool replaces no worker.
    """

    def start_worker_monitor(self, inline: bool = False) -> None:
        sentinels = [worker.proc.sentinel for worker in self.workers]

        def end_with_a_shard() -> None:
            wait(sentinels)
            if not getattr(self, "shutting_down", False):
                print("a shard of this engine has died; the engine ends with it", file=sys.stderr, flush=True)
                os._exit(1)

        Thread(target=end_with_a_shard, daemon=True, name="shards").start()
