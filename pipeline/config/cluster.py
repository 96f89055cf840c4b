"""Where a run takes place: nodes, workers, deadlines. Never hashed into a stage's identity."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Fraction, Frozen, NonNegative, Positive

WeightTransfer = Literal["shm", "nccl", "ipc"]
RolloutPlacement = Literal["disaggregated", "colocated"]

GPU_NAMES = ("h200", "h100", "a100", "l40s")
CPU = "cpu"


class RanksConfig(Frozen):
    """A group of training ranks: one Ray actor each, DeepSpeed between them."""

    ranks: Count = 1
    """Ranks; their number changes the speed and not the result."""
    cpus_per_rank: NonNegative = 1.0
    """CPUs that one rank reserves."""
    gpus_per_rank: NonNegative = 0.0
    """GPUs that one rank reserves."""
    threads_per_rank: Count | None = None
    """Threads of one rank's matrix products; None takes its whole CPUs, at least one. Phases that take turns may each
    use cores that others have reserved."""
    zero_stage: Literal[1, 2, 3] = 2
    """What DeepSpeed shards: 1 the optimiser, 2 the gradients too, 3 the parameters too."""
    offload_optimiser: bool = False
    """Keep the optimiser in host memory, for models whose optimiser exceeds the GPU."""
    sequence_parallel: Count = 1
    """Ranks that compute each row of a batch together, every n-th token on each: for rows too long for one. It must
    divide `ranks` and the attention heads of the model. The batch is then divided among `ranks / sequence_parallel`
    groups."""
    max_restarts: Annotated[int, Field(ge=0)] = 1
    """How often the whole group is restarted from the last commit after a rank died."""

    @property
    def row_groups(self) -> int:
        """How many groups of ranks have rows of their own."""
        return self.ranks // self.sequence_parallel

    @model_validator(mode="after")
    def _sequence_groups_are_whole(self) -> RanksConfig:
        n, ranks = self.sequence_parallel, self.ranks
        if ranks % n:
            divisors = ", ".join(str(number) for number in range(1, ranks + 1) if ranks % number == 0)
            raise ValueError(
                f"sequence_parallel = {n} does not divide ranks = {ranks}; set sequence_parallel to one of {divisors}, "
                f"or ranks to a multiple of {n} such as {-(-ranks // n) * n}"
            )
        return self


class AutoscaleConfig(Frozen):
    """Bounds of a pool that follows the learner (`cluster/autoscaler.py`); an operator's request goes first."""

    min_workers: Count = 1
    """Fewest workers."""
    max_workers: Count
    """Most workers."""
    cooldown_s: NonNegative = 60.0
    """A pool that has changed stays as it is for so long: a new engine takes a while to start."""

    @model_validator(mode="after")
    def _bounds_do_not_cross(self) -> AutoscaleConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers = {self.min_workers} exceeds max_workers = {self.max_workers}")
        return self


class RolloutConfig(Frozen):
    """The pool of vLLM engines."""

    workers: Count = 1
    """Engines; their number changes the speed and not the samples."""
    cpus_per_worker: NonNegative = 1.0
    """CPUs that one worker reserves."""
    gpus_per_worker: NonNegative | None = None
    """None lets the plan decide (`cluster/rollout_plan.py`), by the vLLM that is installed where the job runs. Its CPU
    build needs no GPU. With its CUDA build, all workers together share one GPU, or each has one a shard. A whole number
    above 1 shards an engine over so many GPUs of one node."""
    tensor_parallel_size: Count | None = None
    """Shards of one engine: each is a process that computes its part of every matrix and of the attention heads. None
    takes `gpus_per_worker`, at least 1. It must divide the heads of the policy. With GPUs the two numbers are one.
    Without, the shards share the CPUs of the worker, and `kv_cache_gib`."""
    threads_per_worker: Count | None = None
    """Threads of one engine, shared among its shards; None takes the worker's whole CPUs, at least one a shard."""
    kv_cache_gib: Count = 1
    """Largest size of the KV cache of an engine without a GPU. An engine takes no more than `max_sequences` of full
    length need."""
    gpu_memory_fraction: Fraction | None = None
    """Share of each GPU for weights and KV cache. None takes 0.9 of what `gpus_per_worker` gives an engine. On a GPU
    shared with the learner it takes 0.45, for the learner's parameters and optimiser stay there."""
    max_sequences: Count = 256
    """Responses that one engine decodes at a time, at most."""
    enforce_eager: bool = True
    """Run the engine without compiled graphs: a faster start, slower sampling on a GPU."""
    chunk_size: Count | None = None
    """Responses handed to a worker at a time, at most: a batch is cut into two chunks a worker or more. A worker has
    two chunks, and gets another one when no more than a chunk's responses are left to decode. None lets the plan
    decide: 32 for a CPU engine, and `max_sequences` for an engine on a GPU."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """How many workers that died or hung are replaced, over the whole job."""
    placement: RolloutPlacement | None = None
    """"disaggregated" engines have GPUs of their own; "colocated" ones share the learner's, one each, and sleep while
    it works. None lets the plan choose: their own where there are enough."""
    weight_transfer: WeightTransfer | None = None
    """How a policy reaches the engines: "shm" by a file on each node, "nccl" from GPU to GPU, "ipc" within a shared
    GPU. None takes "shm" without whole GPUs, else what the placement asks for."""
    autoscale: AutoscaleConfig | None = None
    """Let the number of workers follow the learner between these bounds; needs `alignment.prefetch`."""

    @property
    def asks_for_shared_gpus(self) -> bool:
        return self.placement == "colocated" or self.weight_transfer == "ipc"

    @property
    def shards(self) -> int:
        """Processes of one engine."""
        return self.tensor_parallel_size or max(1, int(self.gpus_per_worker or 0))

    @field_validator("gpus_per_worker")
    @classmethod
    def _an_engine_runs_on_a_part_of_a_gpu_or_on_whole_ones(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(
                f"an engine runs on a part of one GPU or on whole ones, not on {gpus:g}; set {int(gpus)} or "
                f"{int(gpus) + 1}"
            )
        return gpus

    @model_validator(mode="after")
    def _a_shard_has_one_gpu(self) -> RolloutConfig:
        gpus, shards = self.gpus_per_worker, self.tensor_parallel_size
        if gpus and shards is not None and gpus != shards and not (shards == 1 and gpus < 1):
            raise ValueError(
                f"tensor_parallel_size = {shards} takes one GPU a shard, but gpus_per_worker = {gpus:g}; set both to "
                "one number, or leave one of them out"
            )
        if self.shards > 1 and self.asks_for_shared_gpus:
            key = "placement = colocated" if self.placement == "colocated" else "weight_transfer = ipc"
            raise ValueError(
                f"{key} puts an engine on the GPU of one rank of the learner, and this one has {self.shards} shards; "
                "set placement=disaggregated, or an engine of one shard"
            )
        return self

    @model_validator(mode="after")
    def _weights_cross_what_lies_between(self) -> RolloutConfig:
        if (self.placement, self.weight_transfer) == ("colocated", "nccl"):
            raise ValueError(
                "placement = colocated puts learner and engine on one GPU, and NCCL knows one process a GPU; "
                "set weight_transfer=ipc"
            )
        if (self.placement, self.weight_transfer) == ("disaggregated", "ipc"):
            raise ValueError(
                "weight_transfer = ipc works within one GPU, and placement = disaggregated gives the engines others; "
                "set weight_transfer=nccl"
            )
        return self


class ScoringConfig(Frozen):
    """The VRM scoring service on Ray Serve."""

    replicas: Annotated[int, Field(ge=0)] = 1
    """Number of replicas; with `max_replicas` the fewest. At 0 the service may sleep, and its next request waits."""
    max_replicas: Count | None = None
    """Replicas follow the queue up to this many; None keeps their number fixed."""
    requests_per_replica: Positive = 4.0
    """With `max_replicas`: requests waiting or in work for which another replica starts."""
    upscale_delay_s: NonNegative = 5.0
    """How long the queue must ask for more replicas before they start; the first one starts at once."""
    downscale_delay_s: NonNegative = 300.0
    """How long fewer replicas must suffice for the queue before the others end."""
    cpus_per_replica: NonNegative = 1.0
    """CPUs that one replica reserves."""
    gpus_per_replica: NonNegative = 0.0
    """GPUs that one replica reserves."""
    threads_per_replica: Count | None = None
    """Threads of one replica; None takes its whole CPUs, at least one."""
    max_tokens_per_batch: Count = 16384
    """Tokens of one forward pass of a replica."""
    batch_wait_s: NonNegative = 0.0
    """How long an idle replica waits for more requests. Requests that arrive while it scores share its next batch."""
    max_batch_size: Count = 64
    """Requests that share one batch, at most."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """HTTP port; 0 serves the Ray handle only."""
    host: str = "127.0.0.1"
    """Address HTTP listens on. Any other than this machine's own needs a token, and TLS in front of it."""
    max_request_bytes: Count = 8 * 2**20
    """Largest request over HTTP, in bytes; a larger one is refused with 413."""
    max_rows_per_request: Count = 1024
    """Each row costs at most the model's `max_length` tokens, so this bounds the tokens of a request too."""
    max_pending_rows: Count = 8192
    """Per replica; beyond it, requests are refused with 429 and Retry-After."""
    cache_entries: Annotated[int, Field(ge=0)] = 65536
    """Scores that a replica remembers, about 1 KB each; 0, as in the service of a training run, remembers none."""

    @model_validator(mode="after")
    def _replicas_fit(self) -> ScoringConfig:
        if self.max_replicas is None and self.replicas == 0:
            raise ValueError("replicas=0 serves nobody; set max_replicas too, and a request starts a replica")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than replicas={self.replicas}")
        return self


class RewardFunctionsConfig(Frozen):
    """Processes of `python` and `math` rewards, for each of them."""

    processes: Count = 1
    """Share the batches of a step."""
    cpus_per_process: NonNegative = 0.0
    """0 reserves none: the processes then take turns with whatever rests while responses are scored."""


class DeadlinesConfig(Frozen):
    """How long a remote call may take before it counts as hung; and how long this job has to leave."""

    start_s: Positive = 300.0
    """Seconds for an actor to start and load its model."""
    update_s: Positive = 1800.0
    """Seconds for one update or evaluation of the learner."""
    generate_s: Positive = 1800.0
    """Seconds for one chunk of responses."""
    score_s: Positive = 600.0
    """Seconds for the scores of one batch."""
    weights_s: Positive = 600.0
    """Seconds for new weights to be written, loaded and checked."""
    grace_s: Positive = 30.0
    """Seconds from SIGTERM to SIGKILL on this platform. Kubernetes, Slurm and most clouds' spot machines leave 30 s.
    Raise it on a platform that leaves more: a checkpoint that takes longer to save is lost."""


class PlanConfig(Frozen):
    """What the plan of memory and time assumes. It changes no result and nothing that runs."""

    policy_config: str | None = None
    """A config.json, or its directory, with the architecture of the policy. None takes the checkpoint's own, where it
    is on this machine, then the numbers that the package knows by the checkpoint's name."""
    backbone_config: str | None = None
    """The same for the backbone of the reward model, where it is not the policy's."""
    prompt_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Mean length of a prompt, as a share of `max_prompt_tokens`."""
    response_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Mean length of a response, as a share of `max_response_tokens`; the longest has all of it."""


class ClusterConfig(Frozen):
    """Where a run takes place. Never part of a stage's identity."""

    accelerator: str = "auto"
    """The GPU that memory and time are planned for: h200, h100, a100, l40s, or cpu for a recipe without GPUs. "auto"
    asks the machine; where it has no GPU and the recipe needs one, the plan is for the h100. A recipe without GPUs is
    planned by the measured speed of this machine's cores."""
    plan: PlanConfig = PlanConfig()
    sft: RanksConfig = RanksConfig()
    reward: RanksConfig = RanksConfig()
    alignment: RanksConfig = RanksConfig()
    rollout: RolloutConfig = RolloutConfig()
    scoring: ScoringConfig = ScoringConfig()
    reward_functions: RewardFunctionsConfig = RewardFunctionsConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    states_gib: Positive = 2.0
    """Largest size of the states of a frozen backbone (`reward.trainable_layers: 0`), on disk and in the memory of each
    trainer. A response takes 8 bytes a dimension: 4.6 KB for SmolLM2-135M, 33 KB for Qwen3-8B."""
    object_store_gib: Positive | None = None
    """Only used when the job starts its own local cluster."""

    @field_validator("accelerator")
    @classmethod
    def _the_plan_knows_the_accelerator(cls, written: str) -> str:
        name = written.lower()
        if name not in ("auto", *GPU_NAMES, CPU):
            near = difflib.get_close_matches(name, GPU_NAMES, n=1)
            guess = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"the plan knows no accelerator {written!r}.{guess} Known are {', '.join(GPU_NAMES)}, cpu")
        return name

    @property
    def needs_gpus(self) -> bool:
        """Whether the recipe gives a GPU, or a part of one, to any actor."""
        shares = [ranks.gpus_per_rank for ranks in (self.sft, self.reward, self.alignment)]
        return any([*shares, self.rollout.gpus_per_worker, self.scoring.gpus_per_replica])

    @model_validator(mode="after")
    def _gpus_are_not_planned_as_cpus(self) -> ClusterConfig:
        if self.accelerator == CPU and self.needs_gpus:
            raise ValueError(
                f"accelerator = cpu, but the recipe gives GPUs to its actors; name the GPU ({', '.join(GPU_NAMES)}), "
                "or set their gpus_per_* to 0"
            )
        return self

    def takes_whole_gpus(self, gpus_per_worker: float) -> bool:
        """Whether every rank of the PPO learner gets one whole GPU, and every engine one or more."""
        return self.alignment.gpus_per_rank == 1 and gpus_per_worker >= 1

    def why_gpus_do_not_suffice(self, gpus_per_worker: float) -> str:
        """Why placement or weight transfer cannot be as written, with the cure; empty where they can.

        Args:
            gpus_per_worker: GPUs of each rollout worker, as the plan resolved them.
        """
        rollout = self.rollout
        if not (rollout.asks_for_shared_gpus or rollout.weight_transfer == "nccl"):
            return ""
        if self.takes_whole_gpus(gpus_per_worker):
            return ""
        key = "placement" if rollout.placement == "colocated" else "weight_transfer"
        return (
            f"rollout.{key} = {getattr(rollout, key)} needs a whole GPU for every engine and every rank of the "
            f"learner, but rollout.gpus_per_worker = {gpus_per_worker:g} and alignment.gpus_per_rank = "
            f"{self.alignment.gpus_per_rank:g}; set both to 1, or leave rollout.{key} out"
        )

    @model_validator(mode="after")
    def _transfers_between_gpus_have_gpus(self) -> ClusterConfig:
        """Checks what the recipe writes; the plan checks `gpus_per_worker` where the recipe leaves it open."""
        written = self.rollout.gpus_per_worker
        message = "" if written is None else self.why_gpus_do_not_suffice(written)
        if message:
            raise ValueError(message)
        return self
