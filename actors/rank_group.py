"""n ranks, one Ray actor each, called together and watched together."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from actors.ray_errors import ACTOR_DIED
from cluster.placement import Placement, pack_bundles
from cluster.rollout_plan import WeightReceivers
from pipeline.config.cluster import RanksConfig
from pipeline.errors import DeadlineExceeded, PipelineError, WorkerDied
from pipeline.records import (
    Experience,
    ExperienceSummary,
    Metrics,
    PolicyWeights,
    ResponseEvaluations,
    RewardedRows,
)
from pipeline.stages import storage
from pipeline.tracking.trace_recorder import TraceRecorder

if TYPE_CHECKING:
    from actors.weight_sender import WeightSender
    from pipeline.columns import Rollouts, TokenEvaluations

DISK = "disk"
WATCH = "watch"
CONCURRENCY_GROUPS = {DISK: 1, WATCH: 1}
"""Two calls run in threads of their own; a rank's other calls run one after the other. So a rank can write a snapshot
while it updates, and report its position while another call hangs."""

DEATH_NOTICE_S = 5.0
"""How long a failed call waits for news that a peer's death caused it; measured, the news was 0.1 s late at most."""

POSITION_TIMEOUT_S = 5.0
"""How long ranks may take to report their positions. A rank that is stopped, or never frees the interpreter, cannot."""


class Rank:
    """One rank: builds a learner and passes calls to it. A method is collective over the group, unless it says more."""

    def __init__(self, rank: int, world_size: int) -> None:
        # This import takes most of a start. It runs while the driver prepares the data.
        import actors.deepspeed_engine  # noqa: F401

        self._rank = rank
        self._world_size = world_size
        self._sender: WeightSender | None = None
        self._trace = TraceRecorder()

    def start_profile(self) -> None:
        self._trace.start()

    def stop_profile(self, uri: str, file: str) -> None:
        with storage.writing(uri) as directory:
            self._trace.stop(os.path.join(directory, file))

    def free_address(self) -> str:
        """An address of this rank's machine at which others can meet it, "host:port"."""
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
        with self._trace.phase("update"):
            return self._learner.update(batch, step)

    def evaluate(self, batch: Any) -> Any:
        with self._trace.phase("evaluate"):
            result = self._learner.evaluate(batch)
        return result if self._rank == 0 else None

    @ray.method(num_returns=2)
    def evaluate_rollouts(self, rollouts: Rollouts) -> tuple[TokenEvaluations | None, ResponseEvaluations | None]:
        """What a policy's learner says of the tokens, and of the responses; of every rank the same, so once."""
        with self._trace.phase("evaluate"):
            evaluated, responses = self._learner.evaluate(rollouts)
        return (evaluated.tokens, responses) if self._rank == 0 else (None, None)

    @ray.method(num_returns=2)
    def build_experience(
        self, rollouts: Rollouts, tokens: TokenEvaluations, rewarded: RewardedRows, kl_coefficient: float
    ) -> tuple[Experience, ExperienceSummary]:
        """Not collective: one rank builds the experience of all."""
        from pipeline.columns import EvaluatedRollouts

        evaluated = EvaluatedRollouts(rollouts=rollouts, tokens=tokens)
        return self._learner.build_experience(evaluated, rewarded, kl_coefficient=kl_coefficient)

    def calibrate(self, batches: Any, heldout: Any, mismatched: Any) -> Any:
        result = self._learner.calibrate(batches, heldout, mismatched)
        return result if self._rank == 0 else None

    def logprobs(self, groups: Any) -> Any:
        result = self._learner.logprobs(groups)
        return result if self._rank == 0 else None

    def publish_weights(self, version: int, *, file_follows: bool) -> PolicyWeights:
        from pipeline.learning.memory import free_cached_memory

        node = ray.get_runtime_context().get_node_id()
        with self._trace.phase("weights"):
            weights = replace(self._learner.publish_weights(version, file_follows=file_follows), node=node)
        free_cached_memory(self._device)  # engines that share this GPU need the memory next
        return weights

    def meet_engines(self, receivers: WeightReceivers, workers: Sequence[Any], address: str, deadline_s: float) -> None:
        """Connects the learner with rollout workers that will take its weights from this rank's GPU."""
        from actors.weight_sender import WeightSender

        if self._sender is not None:
            self._sender.close()
        self._sender = WeightSender(
            receivers,
            self._learner.policy_tensors,
            workers,
            rank=self._rank,
            address=address,
            deadline_s=deadline_s,
        )

    def send_weights(self) -> None:
        assert self._sender is not None, "meet_engines comes first"
        self._sender.send()

    def write_due_file(self) -> None:
        self._learner.write_due_file()

    def snapshot(self) -> None:
        self._snapshot = self._learner.snapshot()

    @ray.method(concurrency_group=DISK)
    def write_snapshot(self, uri: str) -> None:
        """Runs in a thread of its own, while updates continue: the snapshot is a copy, and this call alone has it."""
        snapshot, self._snapshot = self._snapshot, None
        snapshot.write(uri)

    def export(self, uri: str) -> None:
        with storage.writing(uri) as directory:
            self._learner.export(directory)

    @ray.method(concurrency_group=WATCH)
    def report_position(self) -> str:
        """The innermost function of every call that is in progress, and the project's line that led there.

        Runs in a thread of its own and looks at the stacks of the others, which it does not stop.
        """
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
            start_s: how long the reservation of bundles may take, and then the build.
            placement: bundles that the ranks share with other actors and do not remove; None reserves bundles.
        """
        self.name = name
        self._start_s = start_s
        threads = config.threads_per_rank or max(1, int(config.cpus_per_rank))
        on_gpu = config.gpus_per_rank > 0
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if not on_gpu:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._own_placement: Placement | None = None
        if placement is None:
            placement = self._own_placement = pack_bundles(
                config.ranks, cpus=config.cpus_per_rank, gpus=config.gpus_per_rank, timeout_s=start_s, name=name
            )
        # Ray's stub of `remote` leaves `concurrency_groups` out.
        remote: Any = ray.remote
        actor = remote(concurrency_groups=CONCURRENCY_GROUPS)(Rank)
        self._ranks = [
            actor.options(
                num_cpus=config.cpus_per_rank,
                num_gpus=config.gpus_per_rank / placement.tenants,
                runtime_env={"env_vars": environment},
                scheduling_strategy=placement.strategy(rank),
            ).remote(rank, config.ranks)
            for rank in range(config.ranks)
        ]

    def build(self, factory: Callable[..., Any], *arguments: Any) -> None:
        """Waits until every rank has built `factory(*arguments, device)`.

        Raises:
            WorkerDied, DeadlineExceeded, PipelineError: as `all`.
        """
        address = self.free_address("starting", deadline_s=self._start_s)
        factory_ref, arguments_ref = ray.put(factory), ray.put(arguments)
        self.all(
            lambda rank: rank.build.remote(factory_ref, arguments_ref, address),
            doing="building its model",
            deadline_s=self._start_s,
        )

    @property
    def first(self) -> Any:
        """The Ray handle of rank 0, for calls that concern no other rank."""
        return self._ranks[0]

    def free_address(self, doing: str, *, deadline_s: float) -> str:
        """An address at which others can meet the first rank, "host:port"."""
        [address] = gather([self._ranks[0].free_address.remote()], who=self.name, doing=doing, deadline_s=deadline_s)
        return address

    def all(self, call: Callable[[Any], Any], *, doing: str, deadline_s: float) -> list[Any]:
        """Makes one call on every rank and waits for all answers, in rank order.

        Raises:
            WorkerDied: a rank is gone.
            DeadlineExceeded: no answer in time.
            PipelineError: a rank itself raised it.

        After an error the group can only be closed: the other ranks may wait on a collective that cannot complete.
        """
        try:
            return gather([call(rank) for rank in self._ranks], who=self.name, doing=doing, deadline_s=deadline_s)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{error}\n{self._positions()}") from error

    def _positions(self) -> str:
        """One line per rank. Ranks that wait for a hanging rank are late, too: suspect one with another position."""
        reports = [rank.report_position.remote() for rank in self._ranks]
        ready, _ = ray.wait(reports, num_returns=len(reports), timeout=POSITION_TIMEOUT_S)
        lines = []
        for rank, report in enumerate(reports):
            try:
                line = ray.get(report, timeout=0) if report in ready else "does not answer"
            except ACTOR_DIED:
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
    """The results of remote calls, in order. Raises the first failure at once, not after the slowest call."""
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
        except (*ACTOR_DIED, RayTaskError) as error:
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
    """The call whose actor is gone, if news of a death arrives in `DEATH_NOTICE_S`.

    A dying rank breaks the collectives of its peers. Their errors can arrive before the news of its death.
    """
    waiting, give_up = list(references), time.monotonic() + DEATH_NOTICE_S
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, give_up - time.monotonic()))
        if not ready:
            return None
        try:
            ray.get(ready[0], timeout=DEATH_NOTICE_S)
        except ACTOR_DIED:
            return ready[0]
        except RayTaskError:
            continue
    return None
