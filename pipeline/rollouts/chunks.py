"""The work of one rollout batch in chunks: which wait, which are with a worker, which have their one answer."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.records import Rollout
from pipeline.rollouts.requests import RolloutRequest

STRAGGLER = 2.0
"""A chunk is late when its worker has had it for so many times the duration of the median chunk."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Consecutive requests of a batch, sampled by one worker at a time."""

    number: int
    requests: Sequence[RolloutRequest]


class ChunkLedger:
    """Hands out chunks and accepts one answer for each. Seeds belong to requests, so any worker gives the same answer.

    New weights end that for the chunks they interrupt: the new policy continues their responses, and a second worker
    would sample others. The first of two such answers would favour shorter responses. So an interrupted chunk gets no
    backup task.

    Longest first: when the long chunks start early, the workers end together (Graham 1969, LPT scheduling).
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
        self._first_given_at: dict[Chunk, float] = {}
        """When a chunk was first given to a worker, be it as a reservation."""
        self._issued_at: dict[Chunk, float] = {}
        """When a worker was asked to sample it; the chunks without an answer."""
        self._reserved_after: dict[Chunk, Chunk] = {}
        """A reserved chunk -> the chunk that its worker samples just before it."""
        self._issued_again: set[Chunk] = set()
        self._interrupted: set[Chunk] = set()
        self._answers: dict[int, list[Rollout]] = {}
        self._durations_s: list[float] = []

    @property
    def is_complete(self) -> bool:
        return len(self._answers) == self._num_chunks

    @property
    def is_out(self) -> bool:
        """Some chunk is with a worker and has no answer yet."""
        return bool(self._issued_at)

    def issue_reserved(self, now: float, reserved: Chunk) -> Chunk | None:
        """The chunk that a worker had reserved; None where another worker has answered it, or must."""
        if self._reserved_after.pop(reserved, None) is not None:
            self._issued_at[reserved] = now
            return reserved
        if reserved in self._issued_at and reserved not in self._interrupted:
            return reserved  # a backup task of it runs elsewhere; the first answer counts
        return None

    def issue(self, now: float) -> Chunk | None:
        """The next chunk that waits, for a worker to sample."""
        if not self._waiting:
            return None
        chunk = self._waiting.popleft()
        self._first_given_at[chunk] = self._issued_at[chunk] = now
        return chunk

    def reserve(self, now: float, last: Sequence[Chunk], num_workers: int) -> dict[Chunk, Chunk]:
        """Last chunk of a worker -> the chunk that it shall sample next, and may begin once its engine has room.

        The last chunk is running, or itself reserved. The shortest chunk follows the longest. Nothing is reserved where
        fewer chunks wait than there are workers: the last chunks are for the workers that end first.
        """
        if len(self._waiting) < num_workers:
            return {}
        reserved = [self._waiting.popleft() for _ in last][::-1]
        self._first_given_at |= dict.fromkeys(reserved, now)
        self._reserved_after |= zip(reserved, last, strict=True)
        return dict(zip(last, reserved, strict=True))

    def release(self, reserved: Chunk) -> None:
        """Frees a chunk whose worker is gone. It is issued next, unless it was issued to another worker already."""
        if self._reserved_after.pop(reserved, None) is not None:
            self._wait_again(reserved)

    def issue_again(self, now: float) -> Chunk | None:
        """A backup task for an idle worker: a late chunk, or one reserved after a late one; each chunk once."""
        late = [chunk for chunk in self._issued_at if now >= self._late_at(chunk)]
        after_late = [
            chunk
            for chunk, other in self._reserved_after.items()
            if other in self._issued_again and self._may_be_copied(chunk)
        ]
        if not late and not after_late:
            return None
        chunk = min(late or after_late, key=self._first_given_at.__getitem__)
        if self._reserved_after.pop(chunk, None) is not None:
            self._issued_at[chunk] = now
        self._issued_again.add(chunk)
        return chunk

    def next_late_at(self) -> float:
        """The time at which the next chunk will be late; infinite if none can be."""
        return min(map(self._late_at, self._issued_at), default=math.inf)

    def interrupt(self) -> None:
        """New weights come between the tokens of every chunk that a worker has."""
        self._interrupted |= self._issued_at.keys() | self._reserved_after.keys()

    def accept(self, chunk: Chunk, rollouts: list[Rollout], now: float) -> None:
        """Takes the answer to a chunk that has none yet."""
        del self._issued_at[chunk]
        self._durations_s.append(now - self._first_given_at.pop(chunk))
        self._answers[chunk.number] = rollouts

    def wants(self, chunk: Chunk) -> bool:
        """The chunk is with a worker, and has no answer yet."""
        return chunk in self._issued_at

    def put_back(self, chunk: Chunk) -> None:
        """No worker has the chunk any more. If it has no answer, it is the next to be issued."""
        if self._issued_at.pop(chunk, None) is not None:
            self._wait_again(chunk)

    def rollouts(self) -> list[Rollout]:
        """The rollouts of all chunks, in the order of the requests."""
        return [rollout for number in range(self._num_chunks) for rollout in self._answers[number]]

    def _wait_again(self, chunk: Chunk) -> None:
        del self._first_given_at[chunk]
        self._interrupted.discard(chunk)
        self._waiting.appendleft(chunk)

    def _late_at(self, chunk: Chunk) -> float:
        """Infinite where nothing is known yet, or the chunk may not be issued again."""
        if not self._durations_s or not self._may_be_copied(chunk):
            return math.inf
        return self._issued_at[chunk] + STRAGGLER * median(self._durations_s)

    def _may_be_copied(self, chunk: Chunk) -> bool:
        return chunk not in self._issued_again and chunk not in self._interrupted
