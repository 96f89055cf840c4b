"""A process that ends with the one that started it. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when the thread that started it ends."""


def end_with_the_parent() -> None:
    """Makes the kernel kill this process, whatever it does then, when the process ends that started it.

    Does nothing in a process that `multiprocessing` has not started. The parent must start it from a thread that lives
    as long as the parent does.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if not parent.is_alive():
        os._exit(1)
