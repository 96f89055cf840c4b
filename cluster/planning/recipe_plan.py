"""Memory of every role and seconds of every phase of a recipe: the numbers, without a word."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.engine_build import ResolvedRolloutConfig, resolve_rollout
from cluster.planning.hardware import Hardware
from cluster.planning.memory import (
    BYTES,
    CHECKPOINT_BYTES,
    PROCESS_BYTES,
    Bytes,
    engine_memory,
    loading_bytes,
    scorer_memory,
    training_memory,
)
from cluster.planning.roofline import (
    Engines,
    Phase,
    Processor,
    Sequences,
    evaluate_phase,
    rollout_phase,
    score_phase,
    update_phase,
    weights_phase,
)
from cluster.planning.training_loads import Shapes, alignment_load, reward_load, sft_load
from cluster.rollout_plan import RolloutPlan
from pipeline.config.cluster import RanksConfig
from pipeline.config.recipe import Recipe
from pipeline.models.native_dtype import with_native_dtype

ASLEEP_BYTES = 1.5e9
"""What a sleeping engine keeps of a GPU: its context and graphs. An estimate."""
VERSIONS_IN_SHARED_MEMORY = 2


@dataclass(frozen=True, kw_only=True)
class RoleMemory:
    """What one actor of a role needs."""

    stage: str
    role: str
    setting: str
    """Section of the recipe that decides it."""
    count: int
    on_gpu: bool
    gpu_share: float
    gpus_together: float
    """GPUs that must be in one node."""
    device: Bytes
    host: Bytes
    """Beside the device; for an actor without a GPU the device is the host too."""

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """Of the node, for one actor."""
        return PROCESS_BYTES + sum(self.host.values()) + (0.0 if self.on_gpu else self.device_bytes)


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """One step of a stage."""

    stage: str
    unit: str
    phases: tuple[Phase, ...]
    seconds: float
    """Of a step. With prefetch rollouts run beside the update, so this is less than the sum of the phases."""
    steps: int | None
    """None: one pass over data that this machine may not have."""


@dataclass(frozen=True, kw_only=True)
class RecipePlan:
    """What a recipe needs and how long it takes, by arithmetic alone."""

    hardware: Hardware
    shapes: Shapes
    roles: tuple[RoleMemory, ...]
    times: tuple[StageTime, ...]
    shared_memory_bytes: float
    """Two published versions of the policy, in /dev/shm of a node."""
    checkpoint_bytes: Mapping[str, float]
    """Stage -> bytes of one commit."""
    gpus: float
    """The most that are held at once."""
    nodes: int

    def host_bytes(self, stage: str) -> float:
        """Of a node, in the mean over the nodes, while the stage runs."""
        held = sum(role.count * role.host_bytes for role in self.roles if role.stage == stage)
        return held / self.nodes + (self.shared_memory_bytes if stage == "align_policy" else 0.0)

    @property
    def alignment(self) -> StageTime | None:
        return next((time for time in self.times if time.stage == "align_policy"), None)


def plan_recipe(recipe: Recipe, rollouts: RolloutPlan, hardware: Hardware, shapes: Shapes) -> RecipePlan:
    """All of it.

    Args:
        rollouts: where the engines stand.
    """
    return _Planner(with_native_dtype(recipe), rollouts, hardware, shapes).plan()


class _Planner:
    """The parts of a plan have the recipe, the machines and the shapes in common."""

    def __init__(self, recipe: Recipe, rollouts: RolloutPlan, hardware: Hardware, shapes: Shapes) -> None:
        self.recipe = recipe
        self.cluster = recipe.cluster
        self.engine: ResolvedRolloutConfig = resolve_rollout(recipe.cluster.rollout)
        self.rollouts = rollouts
        self.hardware = hardware
        self.shapes = shapes
        self.colocated = rollouts.placement == "colocated"
        self.reward_dtype = str(recipe.reward.backbone_dtype)
        self.loads = {
            "sft": sft_load(recipe, shapes),
            "train_reward_model": reward_load(recipe, shapes, dtype=self.reward_dtype),
            "align_policy": alignment_load(recipe, shapes),
        }
        self.samples = recipe.alignment.samples_prompts
        self.trains_reward_model = recipe.scores_by_reward_model

    def plan(self) -> RecipePlan:
        gpus = self._gpus()
        self.nodes = self.hardware.nodes_for(gpus)
        ranks = {"align_policy": self.cluster.alignment}
        if self.trains_reward_model:
            ranks = {"train_reward_model": self.cluster.reward} | ranks
        if self.recipe.sft.num_steps:
            ranks = {"sft": self.cluster.sft} | ranks
        roles = [self._rank_role(stage, config) for stage, config in ranks.items()]
        if self.samples:
            roles.append(self._engine_role())
            if self.trains_reward_model:
                roles.append(self._scorer_role())
        checkpoints = {stage: CHECKPOINT_BYTES * float(self.loads[stage].num_trained) for stage in ranks}
        return RecipePlan(
            hardware=self.hardware,
            shapes=self.shapes,
            roles=tuple(roles),
            times=tuple(self._times()),
            shared_memory_bytes=self._published_bytes() * VERSIONS_IN_SHARED_MEMORY if self.samples else 0.0,
            checkpoint_bytes=checkpoints,
            gpus=gpus,
            nodes=self.nodes,
        )

    def _published_bytes(self) -> float:
        return BYTES[self.recipe.policy.dtype] * float(self.shapes.policy.num_parameters)

    def _gpus(self) -> float:
        cluster = self.cluster
        aligning = cluster.alignment.ranks * cluster.alignment.gpus_per_rank
        if self.samples:
            if self.trains_reward_model:
                aligning += max(1, cluster.scoring.replicas) * cluster.scoring.gpus_per_replica
            aligning += 0.0 if self.colocated else self.engine.workers * self.engine.gpus_per_worker
        return max(aligning, *(ranks.ranks * ranks.gpus_per_rank for ranks in (cluster.sft, cluster.reward)))

    # ------------------------------------------------------------------ memory

    def _rank_role(self, stage: str, ranks: RanksConfig) -> RoleMemory:
        load = self.loads[stage]
        device, host = (dict(part) for part in training_memory(load, ranks))
        host["snapshot"] = CHECKPOINT_BYTES * load.num_trained / ranks.ranks
        on_gpu = ranks.gpus_per_rank > 0
        # Models may pass through the host while they are loaded; the pages serve the snapshot later.
        at_start = 0.0 if on_gpu and ranks.zero_stage == 3 else loading_bytes(load, ranks)
        later = sum(host.values()) + (0.0 if on_gpu else sum(device.values()))
        if at_start > later:
            host["models at the start"] = at_start - later
        if stage == "align_policy" and self.colocated:
            device["engine asleep"] = ASLEEP_BYTES
        section = {"sft": "sft", "train_reward_model": "reward", "align_policy": "alignment"}[stage]
        return RoleMemory(
            stage=stage,
            role="training rank",
            setting=f"cluster.{section}",
            count=ranks.ranks,
            on_gpu=on_gpu,
            gpu_share=ranks.gpus_per_rank,
            gpus_together=ranks.gpus_per_rank,
            device=device,
            host=host,
        )

    def _engine_role(self) -> RoleMemory:
        on_gpu = self.engine.gpus_per_worker > 0
        shards = self.engine.shards
        device = engine_memory(
            self.shapes.policy,
            dtype=self.recipe.policy.dtype,
            shards=shards,
            cache_bytes=self._cache_bytes(),
            on_gpu=on_gpu,
        )
        if self.colocated:
            learner, _ = training_memory(self.loads["align_policy"], self.cluster.alignment)
            resting = ("parameters", "optimiser", "gradients", "reference")
            device["learner's share"] = sum(size for name, size in learner.items() if name in resting)
        return RoleMemory(
            stage="align_policy",
            role="rollout worker",
            setting="cluster.rollout",
            count=self.engine.workers * shards,
            on_gpu=on_gpu,
            gpu_share=self.engine.gpus_per_worker / shards,
            gpus_together=self.engine.gpus_per_worker,
            device=device,
            host={},
        )

    def _cache_bytes(self) -> float:
        """Of one shard: on a GPU what the engine's share leaves, on a CPU what its sequences need at most."""
        shape, shards, dtype = self.shapes.policy, self.engine.shards, self.recipe.policy.dtype
        gpu = self.hardware.gpu
        if self.engine.gpus_per_worker > 0 and gpu is not None and gpu.memory_bytes is not None:
            share = self.engine.memory_fraction(self.rollouts.placement) * gpu.memory_bytes
            used = engine_memory(shape, dtype=dtype, shards=shards, cache_bytes=0.0, on_gpu=True)
            return share - sum(used.values())
        tokens = self.engine.max_sequences * self._longest_tokens()
        needed = tokens * shape.kv_bytes_per_token(BYTES[dtype], shards=shards)
        return min(self.engine.kv_cache_gib * 2.0**30 / shards, needed)

    def _longest_tokens(self) -> int:
        alignment, benchmark = self.recipe.alignment, self.recipe.benchmark
        return max(
            alignment.max_prompt_tokens + alignment.max_response_tokens,
            benchmark.max_prompt_tokens + benchmark.max_response_tokens,
        )

    def _scorer_role(self) -> RoleMemory:
        scoring = self.cluster.scoring
        on_gpu = scoring.gpus_per_replica > 0
        return RoleMemory(
            stage="align_policy",
            role="scoring replica",
            setting="cluster.scoring",
            count=max(1, scoring.replicas),
            on_gpu=on_gpu,
            gpu_share=scoring.gpus_per_replica,
            gpus_together=scoring.gpus_per_replica,
            device=scorer_memory(self.shapes.backbone, dtype=self._scorer_dtype(), tokens=scoring.max_tokens_per_batch),
            host={},
        )

    def _scorer_dtype(self) -> str:
        """As `RewardModelScorer.load` chooses it."""
        return "bfloat16" if self.cluster.scoring.gpus_per_replica > 0 else "float32"

    # ------------------------------------------------------------------ time

    def _processor(self, gpus: float, cpus: float, threads: int | None, *, actors: int) -> Processor:
        """Of one actor. Actors without a GPU have their threads, and no more than the machine's cores together.

        A share of a GPU divides its memory, not its time: the phases of a step take turns.
        """
        gpu = self.hardware.gpu
        if gpus > 0 and gpu is not None:
            return Processor(accelerator=gpu, share=1.0)
        own = threads or max(1, int(cpus))
        return Processor(accelerator=self.hardware.cpu, share=min(own, self.hardware.cores / actors))

    def _rank_processor(self, ranks: RanksConfig) -> Processor:
        return self._processor(ranks.gpus_per_rank, ranks.cpus_per_rank, ranks.threads_per_rank, actors=ranks.ranks)

    def _training_time(
        self, stage: str, ranks: RanksConfig, batch: Sequences, *, steps: int | None, optimiser_steps: float = 1.0
    ) -> StageTime:
        spans = ranks.ranks * ranks.gpus_per_rank > self.hardware.gpus_per_node > 0
        phase = update_phase(
            self.loads[stage],
            batch,
            ranks,
            self._rank_processor(ranks),
            optimiser_steps=optimiser_steps,
            spans_nodes=spans,
        )
        return StageTime(stage=stage, unit="step", phases=(phase,), seconds=phase.seconds, steps=steps)

    def _times(self) -> list[StageTime]:
        recipe, plan = self.recipe, self.cluster.plan
        found = []
        if recipe.sft.num_steps:
            response = plan.response_share * recipe.sft.max_length
            batch = Sequences(
                count=recipe.sft.batch_size, prompt_tokens=0.0, response_tokens=response, longest_response=response
            )
            found.append(self._training_time("sft", self.cluster.sft, batch, steps=recipe.sft.num_steps))
        if self.trains_reward_model:
            reward = recipe.reward
            pairs = self._pairs(reward.batch_pairs, reward.max_length)
            found.append(self._training_time("train_reward_model", self.cluster.reward, pairs, steps=reward.num_steps))
        alignment = recipe.alignment
        if alignment.is_direct:
            batch = self._pairs(alignment.direct.batch_pairs, alignment.direct.max_length)
            steps = alignment.direct.num_steps
            found.append(self._training_time("align_policy", self.cluster.alignment, batch, steps=steps))
        else:
            found.append(self._alignment_time())
        return found

    def _pairs(self, count: int, max_length: int) -> Sequences:
        """A pair as two sequences. They share the prompt; its tokens are counted with the first."""
        plan = self.cluster.plan
        prompt, response = plan.prompt_share * max_length / 2, plan.response_share * max_length
        response *= 1 - plan.prompt_share
        return Sequences(
            count=2 * count, prompt_tokens=prompt / 2, response_tokens=response, longest_response=max_length
        )

    def _alignment_time(self) -> StageTime:
        alignment, plan, ranks = self.recipe.alignment, self.cluster.plan, self.cluster.alignment
        batch = Sequences(
            count=alignment.prompts_per_step * alignment.samples_per_prompt,
            prompt_tokens=plan.prompt_share * alignment.max_prompt_tokens,
            response_tokens=plan.response_share * alignment.max_response_tokens,
            longest_response=alignment.max_response_tokens,
        )
        engines = self._engines(batch)
        rank = self._rank_processor(ranks)
        epochs = alignment.ppo.epochs
        trained = Sequences(
            count=batch.count * epochs,
            prompt_tokens=batch.prompt_tokens,
            response_tokens=batch.response_tokens,
            longest_response=batch.longest_response,
        )
        load = self.loads["align_policy"]
        update = self._training_time(
            "align_policy",
            ranks,
            trained,
            steps=None,
            optimiser_steps=epochs * batch.count / alignment.ppo.mini_batch_size,
        ).phases[0]
        phases = (
            rollout_phase(engines, batch),
            *([self._score_phase(batch)] if self.trains_reward_model else []),
            evaluate_phase(load, batch, ranks, rank),
            update,
            weights_phase(engines, ranks, rank, way=self.rollouts.weight_transfer),
        )
        rollout, *rest = (phase.seconds for phase in phases)
        seconds = max(rollout, sum(rest)) if alignment.prefetch is not None else rollout + sum(rest)
        return StageTime(stage="align_policy", unit="step", phases=phases, seconds=seconds, steps=alignment.num_steps)

    def _score_phase(self, batch: Sequences) -> Phase:
        """By the reward model of this run. What other rewards take is not planned."""
        scoring = self.cluster.scoring
        replicas = max(1, scoring.replicas)
        scorer = self._processor(
            scoring.gpus_per_replica, scoring.cpus_per_replica, scoring.threads_per_replica, actors=replicas
        )
        return score_phase(self.shapes.backbone, self._scorer_dtype(), batch, scorer, replicas=replicas)

    def _engines(self, batch: Sequences) -> Engines:
        engine = self.engine
        context = batch.prompt_tokens + batch.response_tokens
        per_sequence = context * self.shapes.policy.kv_bytes_per_token(
            BYTES[self.recipe.policy.dtype], shards=engine.shards
        )
        return Engines(
            shape=self.shapes.policy,
            dtype=self.recipe.policy.dtype,
            workers=engine.workers,
            shards=engine.shards,
            processor=self._processor(
                engine.gpus_per_worker / engine.shards,
                engine.cpus_per_worker,
                engine.threads_per_worker,
                actors=engine.workers,
            ),
            sequences=max(1, min(engine.max_sequences, int(self._cache_bytes() / per_sequence))),
            eager=engine.enforce_eager,
        )
