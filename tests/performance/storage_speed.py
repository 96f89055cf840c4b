"""How fast a checkpoint reaches storage and returns, beside a plain copy of the same bytes.

    python -m tests.performance.storage_speed                                   # the S3 server of the tests, 256 MiB
    AWS_ACCESS_KEY_ID=... python -m tests.performance.storage_speed --workspace s3://bucket/speed --mib 8192

Rows: a plain copy of the file with `shutil.copyfile`, flushed to the disk; a training state written from memory piece
by piece to a local directory and to the workspace; the file of a directory uploaded part by part, and downloaded the
same way. The last column is the host memory that a row added: the parts that travel, never a second copy.

The server of the tests is moto's: Python, one request at a time. So its rows say what the client can do against that
server, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch

from pipeline.learning.training_state import TrainingStatePart
from pipeline.stages import storage
from tests.performance.processor import processor
from tests.support.s3_server import KEYS


class Peak:
    """The most resident memory of this process while the block runs, over what it had before, MiB."""

    def __enter__(self):
        self._process, self._over = psutil.Process(), threading.Event()
        self._before = self._most = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._over.wait(0.01):
            self._most = max(self._most, self._process.memory_info().rss)

    def __exit__(self, *error):
        self._over.set()
        self._thread.join()
        self.added_mib = (self._most - self._before) / 2**20


def timed(what, num_bytes, work):
    with Peak() as peak:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    return {"what": what, "seconds": seconds, "mb_per_s": num_bytes / 1e6 / seconds, "added_mib": peak.added_mib}


def plain_copy(source, destination):
    shutil.copyfile(source, destination)
    storage.make_durable(str(Path(destination).parent))


def measure(workspace, mib):
    """Rows of the table."""
    state = {f"weight/{n}/linear": torch.rand(2**18) for n in range(mib)}  # a MiB each
    part = TrainingStatePart(part=0, num_parts=1, shapes={}, tensors=state)
    num_bytes = mib * 2**20
    with tempfile.TemporaryDirectory() as scratch:
        local, copy, back = (str(Path(scratch, name)) for name in ("local", "copy", "back"))
        os.mkdir(copy)

        def write_locally():
            part.write(local)
            storage.make_durable(local)

        [*rows] = [timed("state from memory, local", num_bytes, write_locally)]
        [file] = Path(local).iterdir()
        rows.insert(0, timed("plain copy, local", num_bytes, lambda: plain_copy(file, f"{copy}/file")))
        there = storage.join(workspace, f"storage-speed-{os.getpid()}")
        rows.append(timed("state from memory, workspace", num_bytes, lambda: part.write(storage.join(there, "state"))))
        rows.append(timed("file, workspace", num_bytes, lambda: storage.copy(copy, storage.join(there, "file"))))
        rows.append(timed("file, back", num_bytes, lambda: storage.copy(storage.join(there, "file"), back)))
        assert Path(back, "file").read_bytes() == file.read_bytes()
        storage.delete_directory(there)
    return rows


@contextmanager
def server_of_its_own():
    """The URI of a place on a server in another process, whose memory is not ours."""
    command = [sys.executable, "-m", "tests.support.s3_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.stdin.close()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workspace", help="a URI; the S3 server of the tests without it")
    parser.add_argument("--mib", type=int, default=256, help="size of the checkpoint, MiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    with ExitStack() as exits:
        workspace = options.workspace
        if workspace is None:
            os.environ.update(KEYS)
            workspace = exits.enter_context(server_of_its_own())
        rows = measure(workspace, options.mib)
    print(f"{processor()}; {options.mib} MiB, {workspace}")
    for row in rows:
        print(f"{row['what']:<30}{row['seconds']:>8.2f} s{row['mb_per_s']:>9.0f} MB/s{row['added_mib']:>8.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
