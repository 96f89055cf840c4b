"""What a plan forbids, and the one setting that would help it most: found by planning again with other values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic import ValidationError

from cluster.planning.hardware import Hardware
from cluster.planning.recipe_plan import RecipePlan, RoleMemory, plan_recipe
from cluster.planning.training_loads import Shapes, check_sequence_groups
from cluster.rollout_plan import RolloutPlan, plan_rollouts
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError, ResourceError

LEAST_GAIN = 0.03
"""A smaller share of the step is within what the plan does not know."""

GB = 1e9

Overrides = Mapping[str, Any]
"""Dotted settings -> values."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A setting, and what it does to an alignment step."""

    setting: str
    seconds: float
    before_s: float

    def __str__(self) -> str:
        share = 1 - self.seconds / self.before_s
        return f"{self.setting} would save most: {self.before_s:.3g} s to {self.seconds:.3g} s a step, {share:.0%}."


def require_memory(recipe: Recipe, rollouts: RolloutPlan, hardware: Hardware, shapes: Shapes, plan: RecipePlan) -> None:
    """Refuses a plan that cannot fit, before anything starts.

    Raises:
        ResourceError: a role exceeds its GPU, or a stage the host's memory; names need, have, largest part and cure.
    """
    problem = _problem(plan)
    if problem is None:
        return
    message, role = problem
    single = list(changes(recipe, role.setting))
    cures = [setting for setting, changed in single if _fits(changed, rollouts, hardware, shapes)]
    if not cures:
        pairs = (
            (second if _key(first) == _key(second) else f"{first} {second}", changed)
            for first, halfway in single
            for second, changed in changes(halfway, role.setting)
        )
        found = next((setting for setting, changed in pairs if _fits(changed, rollouts, hardware, shapes)), None)
        cures = [] if found is None else [found]
    cure = f"{' or '.join(cures[:2])} would fit."
    if not cures:
        cure = f"No two settings of {role.setting} suffice; give it more or larger machines, or take a smaller model."
    raise ResourceError(f"{message} {cure}")


def _key(setting: str) -> str:
    return setting.partition("=")[0]


def _problem(plan: RecipePlan) -> tuple[str, RoleMemory] | None:
    """What does not fit, in words, and the role to change."""
    gpu = plan.hardware.gpu
    for role in plan.roles:
        if not role.on_gpu or gpu is None or gpu.memory_bytes is None:
            continue
        most = plan.hardware.gpus_per_node
        if role.gpus_together > most:
            return (
                f"a {role.role} of stage {role.stage} takes {role.gpus_together:g} GPUs and never spans nodes; a node "
                f"of {gpu.name} has {most}."
            ), role
        have = gpu.memory_bytes * min(1.0, role.gpu_share)
        smallest = min(role.device.values())
        if role.device_bytes <= have and smallest >= 0:
            continue
        if smallest < 0:  # the engine's share of the GPU is smaller than its weights
            used = role.device["parameters"] + role.device["work"]
            what = f"needs {used / GB:.0f} GB for weights and work, more than its share of a {gpu.name}"
        else:
            what = f"needs {role.device_bytes / GB:.0f} GB of a {gpu.name} with {have / GB:.0f} GB"
        return f"a {role.role} of stage {role.stage} {what}: {parts_in_words(role.device)}.", role
    for stage in dict.fromkeys(role.stage for role in plan.roles):
        need, have = plan.host_bytes(stage), plan.hardware.host_bytes
        if need > have:
            largest = max(
                (role for role in plan.roles if role.stage == stage), key=lambda role: role.count * role.host_bytes
            )
            parts = parts_in_words(largest.host if largest.on_gpu else {**largest.device, **largest.host})
            return (
                f"stage {stage} needs {need / GB:.1f} GB of host memory on each of {plan.nodes} node(s) with "
                f"{have / GB:.1f} GB; most is of {largest.count} x {largest.role}: {parts}.",
                largest,
            )
    return None


def parts_in_words(parts: Mapping[str, float]) -> str:
    """The parts of at least a tenth, largest first."""
    total = sum(size for size in parts.values() if size > 0)
    large = sorted(((size, name) for name, size in parts.items() if size >= 0.1 * total), reverse=True)
    return ", ".join(f"{name} {size / GB:.3g}" for size, name in large)


def _fits(recipe: Recipe, rollouts: RolloutPlan, hardware: Hardware, shapes: Shapes) -> bool:
    return _problem(plan_recipe(recipe, rollouts, hardware, shapes)) is None


def best_setting(recipe: Recipe, hardware: Hardware, shapes: Shapes, plan: RecipePlan) -> Advice | None:
    """The one change that shortens an alignment step most, with no more GPUs, in the memory there is."""
    if plan.alignment is None:
        return None
    best: Advice | None = None
    for setting, changed in changes(recipe):
        try:
            rollouts = plan_rollouts(changed, [])
        except ConfigError:
            continue
        other = plan_recipe(changed, rollouts, hardware, shapes)
        if other.alignment is None or other.gpus > plan.gpus or _problem(other) is not None:
            continue
        seconds = other.alignment.seconds
        if seconds < (1 - LEAST_GAIN) * plan.alignment.seconds and (best is None or seconds < best.seconds):
            best = Advice(setting=setting, seconds=seconds, before_s=plan.alignment.seconds)
    return best


def changes(recipe: Recipe, section: str | None = None) -> Iterator[tuple[str, Recipe]]:
    """Recipes that differ in one decision, and the overrides that make each.

    Args:
        section: only settings that change the memory of its role; None gives those that may change the time.
    """
    sections = [section] if section is not None else ["cluster.alignment", "cluster.rollout", "cluster.scoring"]
    candidates = chain(*(_settings_of(recipe, name) for name in sections))
    for overrides in candidates if section is not None else chain(candidates, _layouts(recipe)):
        changed = _with(recipe, overrides)
        if changed is not None:
            yield " ".join(f"{path}={_as_text(value)}" for path, value in overrides.items()), changed


def _settings_of(recipe: Recipe, section: str) -> Iterator[Overrides]:
    cluster, engine = recipe.cluster, recipe.cluster.rollout
    if section == "cluster.rollout":
        for name, value in (
            ("max_sequences", 2 * engine.max_sequences),
            ("max_sequences", max(1, engine.max_sequences // 2)),
            ("workers", engine.workers + 1),
            ("kv_cache_gib", max(1, engine.kv_cache_gib // 2)),
        ):
            yield {f"{section}.{name}": value}
        if engine.gpus_per_worker:
            yield {f"{section}.gpus_per_worker": 2 * max(1, int(engine.gpus_per_worker))}
            yield {f"{section}.gpus_per_worker": max(1, int(engine.gpus_per_worker) // 2)}
            if engine.asks_for_shared_gpus:
                # Only engines with GPUs of their own have several.
                transfer = {f"{section}.weight_transfer": "nccl"} if engine.weight_transfer == "ipc" else {}
                yield {f"{section}.placement": "disaggregated", f"{section}.gpus_per_worker": 2, **transfer}
            yield {f"{section}.enforce_eager": not engine.enforce_eager}
        return
    if section == "cluster.scoring":
        yield {f"{section}.max_tokens_per_batch": max(1, cluster.scoring.max_tokens_per_batch // 4)}
        return
    part = section.removeprefix("cluster.")
    stage, ranks = getattr(recipe, part), getattr(cluster, part)
    for factor in (2.0, 0.5, 0.25):
        yield {f"{part}.max_tokens_per_micro_batch": max(1, int(stage.max_tokens_per_micro_batch * factor))}
    if part != "sft":
        yield {f"{part}.gradient_checkpointing": not stage.gradient_checkpointing}
    for zero_stage in sorted({1, 2, 3} - {ranks.zero_stage}):
        yield {f"{section}.zero_stage": zero_stage}
    yield {f"{section}.offload_optimiser": not ranks.offload_optimiser}
    yield {f"{section}.sequence_parallel": 2 * ranks.sequence_parallel}
    yield {f"{section}.ranks": 2 * ranks.ranks}


def _layouts(recipe: Recipe) -> Iterator[Overrides]:
    """The same GPUs, divided otherwise; and rollouts beside the update."""
    alignment, ranks, engine = recipe.alignment, recipe.cluster.alignment.ranks, recipe.cluster.rollout
    if alignment.is_direct:
        return
    ranks_key, workers_key = "cluster.alignment.ranks", "cluster.rollout.workers"
    if ranks > 1:
        yield {ranks_key: ranks - 1, workers_key: engine.workers + 1}
    if engine.workers > 1:
        yield {ranks_key: ranks + 1, workers_key: engine.workers - 1}
    if recipe.cluster.takes_whole_gpus(engine.gpus_per_worker or 0.0) and not engine.asks_for_shared_gpus:
        together = ranks + engine.workers
        yield {ranks_key: together, workers_key: together, "cluster.rollout.placement": "colocated"}
    # Learner and engines that share a GPU by its memory would slow each other.
    if alignment.prefetch is None and recipe.cluster.alignment.gpus_per_rank in (0, 1):
        yield {"alignment.prefetch": "continue", "alignment.ppo.tis_cap": alignment.ppo.tis_cap or 2.0}


def _with(recipe: Recipe, overrides: Overrides) -> Recipe | None:
    """The recipe with other values, validated again; None where they are refused."""
    written = recipe.model_dump()
    for path, value in overrides.items():
        section = written
        *parents, last = path.split(".")
        for name in parents:
            section = section[name]
        section[last] = value
    try:
        changed = Recipe.model_validate(written)
        check_sequence_groups(changed)
    except (ValidationError, ConfigError):
        return None
    return changed


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
