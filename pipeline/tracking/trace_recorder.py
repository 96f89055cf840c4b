"""What torch does in this process, recorded on request, with named phases."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import profile


class TraceRecorder:
    """All calls belong to one thread: torch records the thread that started."""

    def __init__(self) -> None:
        self._profile: profile | None = None

    def start(self) -> None:
        """Records from now on; what an earlier `start` recorded is dropped."""
        from torch.profiler import profile

        if self._profile is not None:
            self._profile.stop()
        # Without `activities`: the processor, and the accelerator where there is one.
        self._profile = profile()
        self._profile.start()

    def stop(self, path: str) -> None:
        """Ends the record and writes it; does nothing without a `start`.

        Args:
            path: a local file, compressed if it ends in ".gz".
        """
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(path)
            self._profile = None

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Names what happens in the block. Free of cost while nothing is recorded."""
        if self._profile is None:
            return nullcontext()
        from torch.profiler import record_function

        return record_function(name)
