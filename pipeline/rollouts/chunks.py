"""The work of one rollout batch in small pieces: what waits, what is out, and what is answered, each exactly once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.records import Rollout
from pipeline.rollouts.requests import RolloutRequest

STRAGGLER = 2.0
"""A chunk is late when its worker was asked for it so many times as long ago as the median chunk took."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Consecutive requests of a batch, sampled by one worker at a time."""

    number: int
    requests: Sequence[RolloutRequest]


class ChunkLedger:
    """Hands out chunks and accepts one answer for each; whose answer it was changes nothing, for seeds are requests'.

    That ends where new weights interrupt a worker: its responses go on from where they are, and a second worker's would
    be others. The first of two such answers would be that with the shorter responses, so no chunk has two from then on.

    Longest first: with the long chunks begun early, the workers end together (Graham 1969, LPT scheduling).
    """

    def __init__(
        self,
        requests: Sequence[RolloutRequest],
        chunk_size: int,
        expected_tokens: Callable[[RolloutRequest], float] = lambda request: 0.0,
    ) -> None:
        """`expected_tokens` of a response; a chunk takes as long as its longest one."""
        chunks = [
            Chunk(number=number, requests=requests[first : first + chunk_size])
            for number, first in enumerate(range(0, len(requests), chunk_size))
        ]
        longest = {chunk: max(map(expected_tokens, chunk.requests)) for chunk in chunks}
        self._num_chunks = len(chunks)
        self._waiting = deque(sorted(chunks, key=lambda chunk: -longest[chunk]))
        self._begun: dict[Chunk, float] = {}
        """When a chunk was given to a worker."""
        self._out: dict[Chunk, float] = {}
        """When a worker was asked for it."""
        self._reserved: dict[Chunk, Chunk] = {}
        """Behind which other its worker has it."""
        self._issued_again: set[Chunk] = set()
        self._interrupted: set[Chunk] = set()
        self._answers: dict[int, list[Rollout]] = {}
        self._seconds: list[float] = []

    @property
    def is_complete(self) -> bool:
        return len(self._answers) == self._num_chunks

    @property
    def is_out(self) -> bool:
        """Some chunk is with a worker and has no answer yet."""
        return bool(self._out)

    def issue(self, now: float, reserved: Chunk | None = None) -> Chunk | None:
        """The next chunk to sample, from here on out: the one that the worker had reserved, else one that waits."""
        if reserved is not None and self._reserved.pop(reserved, None) is not None:
            self._out[reserved] = now
            return reserved
        if reserved in self._out and reserved not in self._interrupted:
            return reserved  # another was asked as well, and the first one answers
        if not self._waiting:
            return None
        chunk = self._waiting.popleft()
        self._begun[chunk] = self._out[chunk] = now
        return chunk

    def reserve(self, now: float, behind: Sequence[Chunk], num_workers: int) -> dict[Chunk, Chunk]:
        """What the worker of each of these shall have next, and may begin with as soon as it has room.

        The shortest goes behind the longest. Nothing where fewer wait than there are workers: the last ones are for
        those who are done first.
        """
        if len(self._waiting) < num_workers:
            return {}
        reserved = [self._waiting.popleft() for _ in behind][::-1]
        self._begun |= dict.fromkeys(reserved, now)
        self._reserved |= zip(reserved, behind, strict=True)
        return dict(zip(behind, reserved, strict=True))

    def release(self, reserved: Chunk) -> None:
        """Its worker does not have the chunk any more; if nobody else was asked for it, it is the next to be issued."""
        if self._reserved.pop(reserved, None) is not None:
            self._wait_again(reserved)

    def issue_again(self, now: float) -> Chunk | None:
        """A late chunk, or one behind a late one, for a worker that has nothing else to do; each of them once."""
        late = [chunk for chunk in self._out if now >= self._late_at(chunk)]
        behind = [c for c, other in self._reserved.items() if other in self._issued_again and self._may_be_copied(c)]
        if not late and not behind:
            return None
        chunk = min(late or behind, key=self._begun.__getitem__)
        if self._reserved.pop(chunk, None) is not None:
            self._out[chunk] = now
        self._issued_again.add(chunk)
        return chunk

    def next_late_at(self) -> float:
        """When the next chunk will be late; infinite if none can be."""
        return min(map(self._late_at, self._out), default=math.inf)

    def interrupt(self) -> None:
        """New weights come between the tokens of all that workers have."""
        self._interrupted |= self._out.keys() | self._reserved.keys()

    def accept(self, chunk: Chunk, rollouts: list[Rollout], now: float) -> None:
        """The answer to a chunk that is out."""
        del self._out[chunk]
        self._seconds.append(now - self._begun.pop(chunk))
        self._answers[chunk.number] = rollouts

    def wants(self, chunk: Chunk) -> bool:
        """The chunk is out, and has no answer yet."""
        return chunk in self._out

    def put_back(self, chunk: Chunk) -> None:
        """The chunk is no longer with any worker; if it has no answer, it is the next to be issued."""
        if self._out.pop(chunk, None) is not None:
            self._wait_again(chunk)

    def rollouts(self) -> list[Rollout]:
        """All of them, in the order of the requests."""
        return [rollout for number in range(self._num_chunks) for rollout in self._answers[number]]

    def _wait_again(self, chunk: Chunk) -> None:
        del self._begun[chunk]
        self._interrupted.discard(chunk)
        self._waiting.appendleft(chunk)

    def _late_at(self, chunk: Chunk) -> float:
        """Infinite where nothing is known yet, or the chunk may not be issued again."""
        if not self._seconds or not self._may_be_copied(chunk):
            return math.inf
        return self._out[chunk] + STRAGGLER * median(self._seconds)

    def _may_be_copied(self, chunk: Chunk) -> bool:
        return chunk not in self._issued_again and chunk not in self._interrupted
