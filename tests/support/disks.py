"""A small disk of one's own, for the tests that fill one."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 0x40000


def on_a_small_disk(directory, num_bytes, work):
    """`work()` in a thread that alone sees a disk of this size at `directory`; it is gone afterwards.

    Raises:
        PermissionError: this process may not mount one.
    """

    def run():
        libc = ctypes.CDLL(None, use_errno=True)
        _require(libc.unshare(CLONE_NEWNS))
        _require(libc.mount(b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None))
        size = f"size={num_bytes}".encode()
        _require(libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", ctypes.c_ulong(0), size))
        return work()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _require(status):
    if status != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
