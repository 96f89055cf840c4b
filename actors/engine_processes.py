"""The processes of an engine of several shards: none of them outlives another."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import wait
from threading import Thread

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when the thread that started it ends."""


class ShardProcesses(MultiprocExecutor):
    """vLLM's processes of one node, whose engine ends at once when a shard dies.

    vLLM's own monitor first waits for the other shards, which wait for the dead one, for up to nine seconds. Meanwhile
    it fails calls with an error that looks like a fault of the code, after which the pool replaces no worker.
    """

    def start_worker_monitor(self, inline: bool = False) -> None:
        sentinels = [worker.proc.sentinel for worker in self.workers]

        def end_with_a_shard() -> None:
            wait(sentinels)
            if not getattr(self, "shutting_down", False):
                print("a shard of this engine has died; the engine ends with it", file=sys.stderr, flush=True)
                os._exit(1)

        Thread(target=end_with_a_shard, daemon=True, name="shards").start()


def end_with_the_engine() -> None:
    """Makes this shard end with the process that started it, whatever the shard does then; does nothing elsewhere.

    vLLM's shards read from a pipe that their engine has ended, but not while they wait for each other in a collective
    operation, or start: they then keep a processor busy, or a GPU.
    """
    engine = multiprocessing.parent_process()
    if engine is None:  # the engine has one shard, in its own process
        return
    # An engine is started by its actor's main thread, which lives as long as the process.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not engine.is_alive():
        os._exit(1)
