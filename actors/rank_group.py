"""n ranks, one Ray actor each, called together and watched together."""

from __future__ import annotations

import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayTaskError

from actors.ray_errors import DIED
from cluster.placement import Placement, pack_bundles
from pipeline.config.cluster import RanksConfig, WeightTransfer
from pipeline.errors import DeadlineExceeded, PipelineError, WorkerDied
from pipeline.records import Metrics, PolicyWeights
from pipeline.stages import storage

DISK = "disk"
WATCH = "watch"
CONCURRENCY_GROUPS = {DISK: 1, WATCH: 1}
"""A rank writes, and says where it is, beside its other calls, which come one after the other."""

DEATH_NOTICE_S = 5.0
"""How long a failed call waits for news that a peer's death caused it; measured, it came 0.1 s late at most."""

WHEREABOUTS_S = 5.0
"""How long ranks may take to say where they are; one that is stopped or never lets go of the interpreter is silent."""


class Rank:
    """One rank: builds a learner and passes calls on to it. All methods are collective over the group."""

    def __init__(self, rank: int, world_size: int) -> None:
        import actors.deepspeed_engine  # noqa: F401  # takes most of a start, while the driver makes the data ready

        self._rank = rank
        self._world_size = world_size
        self._sender: Any = None

    def free_address(self) -> str:
        """Where the process group can meet, asked of rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def build(self, factory: Callable[..., Any], arguments: tuple, address: str) -> None:
        from actors.deepspeed_engine import join_process_group
        from pipeline.learning.memory import keep_freed_memory

        self._device = join_process_group(self._rank, self._world_size, address)
        keep_freed_memory(self._device)
        self._learner = factory(*arguments, self._device)

    def peak_memory(self) -> Metrics:
        from pipeline.learning.memory import peak_memory

        return peak_memory(self._device)

    def restore(self, uri: str) -> None:
        with storage.reading(uri) as directory:
            self._learner.restore(directory)

    def update(self, batch: Any, step: int) -> Metrics:
        return self._learner.update(batch, step)

    def evaluate(self, batch: Any) -> Any:
        result = self._learner.evaluate(batch)
        return result if self._rank == 0 else None

    def publish_weights(self, version: int) -> PolicyWeights:
        from pipeline.learning.memory import free_cached_memory

        node = ray.get_runtime_context().get_node_id()
        weights = replace(self._learner.publish_weights(version), node=node)
        free_cached_memory(self._device)  # engines that share this GPU wake next
        return weights

    def meet_engines(
        self, backend: WeightTransfer, workers: Sequence[Any], address: str, dtype: str, deadline_s: float
    ) -> None:
        """Introduces the learner to rollout workers that shall take its weights from this rank's GPU."""
        from actors.weight_sender import WeightSender

        if self._sender is not None:
            self._sender.close()
        self._sender = WeightSender(
            backend,
            self._learner.policy_tensors,
            workers,
            rank=self._rank,
            address=address,
            dtype=dtype,
            deadline_s=deadline_s,
        )

    def send_weights(self) -> None:
        self._sender.send()

    def snapshot(self) -> None:
        self._snapshot = self._learner.snapshot()

    @ray.method(concurrency_group=DISK)
    def write_snapshot(self, uri: str) -> None:
        """In a thread of its own: updates go on meanwhile."""
        snapshot, self._snapshot = self._snapshot, None
        snapshot.write(uri)

    def export(self, uri: str) -> None:
        with storage.writing(uri) as directory:
            self._learner.export(directory)

    @ray.method(concurrency_group=WATCH)
    def whereabouts(self) -> str:
        """The innermost function of every call that is in progress, and the project's line that led there."""
        project = Path(__file__).parents[1]
        rooms = (f"{project}/actors/", f"{project}/pipeline/")
        found = []
        for thread, innermost in sys._current_frames().items():
            frames = [(frame.f_code, line) for frame, line in traceback.walk_stack(innermost)]
            if thread != threading.get_ident() and any(code.co_filename == __file__ for code, _ in frames):
                code, line = next((c, n) for c, n in frames if c.co_filename.startswith(rooms))
                place = Path(code.co_filename).relative_to(project)
                found.append(f"is in {frames[0][0].co_name}(), from {code.co_name}() at {place}:{line}")
        return " and ".join(found) or "waits for a call"


class RankGroup:
    """Starts ranks, builds the same learner on each, and calls them together."""

    def __init__(
        self,
        name: str,
        config: RanksConfig,
        *,
        start_s: float,
        placement: Placement | None = None,
    ) -> None:
        """Does not wait until the ranks have started; `build` does.

        Args:
            start_s: how long either may take.
            placement: bundles that the ranks share with other actors and leave as they are; None reserves their own.
        """
        self.name = name
        self._start_s = start_s
        threads = config.threads_per_rank or max(1, int(config.cpus_per_rank))
        on_gpu = config.gpus_per_rank > 0
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if not on_gpu:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._own_placement = (
            pack_bundles(
                config.ranks, cpus=config.cpus_per_rank, gpus=config.gpus_per_rank, timeout_s=start_s, name=name
            )
            if placement is None
            else None
        )
        bundles = placement or self._own_placement
        actor = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(Rank)
        self._ranks = [
            actor.options(
                num_cpus=config.cpus_per_rank,
                num_gpus=config.gpus_per_rank / bundles.tenants,
                runtime_env={"env_vars": environment},
                scheduling_strategy=bundles.strategy(rank),
            ).remote(rank, config.ranks)
            for rank in range(config.ranks)
        ]

    def build(self, factory: Callable[..., Any], *arguments: Any) -> None:
        """Waits until every rank has built `factory(*arguments, device)`. The errors of `all`."""
        address = self.free_address("starting", deadline_s=self._start_s)
        factory_ref, arguments_ref = ray.put(factory), ray.put(arguments)
        self.all(
            lambda rank: rank.build.remote(factory_ref, arguments_ref, address),
            doing="building its model",
            deadline_s=self._start_s,
        )

    def free_address(self, doing: str, *, deadline_s: float) -> str:
        """Where others can meet the first rank, "host:port"."""
        [address] = gather([self._ranks[0].free_address.remote()], who=self.name, doing=doing, deadline_s=deadline_s)
        return address

    def all(self, call: Callable[[Any], Any], *, doing: str, deadline_s: float) -> list[Any]:
        """Makes one call on every rank and waits for all answers, in rank order.

        Raises:
            WorkerDied: a rank is gone.
            DeadlineExceeded: no answer in time.
            PipelineError: whatever a rank itself raised.

        After an error the group can only be closed: the other ranks may wait on a collective that cannot complete.
        """
        try:
            return gather([call(rank) for rank in self._ranks], who=self.name, doing=doing, deadline_s=deadline_s)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{error}\n{self._whereabouts()}") from error

    def _whereabouts(self) -> str:
        """A line per rank: those that wait for one that hangs are as late as it is, and it is not where they are."""
        told = [rank.whereabouts.remote() for rank in self._ranks]
        ready, _ = ray.wait(told, num_returns=len(told), timeout=WHEREABOUTS_S)
        lines = []
        for rank, reference in enumerate(told):
            try:
                line = ray.get(reference, timeout=0) if reference in ready else "does not answer"
            except DIED:
                line = "died"
            lines.append(f"rank {rank} {line}")
        return "\n".join(lines)

    def close(self) -> None:
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        if self._own_placement is not None:
            self._own_placement.remove()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def gather(references: Sequence[Any], *, who: str, doing: str, deadline_s: float) -> list[Any]:
    """The results of remote calls, in order; the first failure is raised at once, not after the slowest call."""
    references = list(references)
    started = time.monotonic()
    pending, answers = references, {}
    while pending:
        left = deadline_s - (time.monotonic() - started)
        ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, left))
        if not ready:
            missing = ", ".join(f"rank {i}" for i, reference in enumerate(references) if reference in pending)
            raise DeadlineExceeded(
                f"{who}: {doing} did not end within {deadline_s:.0f} s on {missing} of {len(references)}. "
                "It hangs or is slow: see the worker's log, or raise cluster.deadlines."
            )
        try:
            answers[ready[0]] = ray.get(ready[0], timeout=deadline_s)
        except (*DIED, RayTaskError) as error:
            dead = _first_dead([*ready, *pending])
            if dead is not None:
                raise WorkerDied(
                    f"{who}: rank {references.index(dead)} of {len(references)} died while {doing}, after "
                    f"{time.monotonic() - started:.0f} s. Often it ran out of memory: lower "
                    "max_tokens_per_micro_batch, or give it a larger machine. The workspace is intact; the same "
                    "command resumes."
                ) from error
            if isinstance(error, RayTaskError) and isinstance(error.cause, PipelineError):
                raise error.cause from error
            raise
    return [answers[reference] for reference in references]


def _first_dead(references: Sequence[Any]) -> Any | None:
    """The call whose actor is gone, if news of one arrives in `DEATH_NOTICE_S`.

    A dying rank breaks its peers' collectives, and their errors can arrive before the news of its death.
    """
    waiting, give_up = list(references), time.monotonic() + DEATH_NOTICE_S
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, give_up - time.monotonic()))
        if not ready:
            return None
        try:
            ray.get(ready[0], timeout=DEATH_NOTICE_S)
        except DIED:
            return ready[0]
        except RayTaskError:
            continue
    return None
