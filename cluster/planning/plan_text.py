"""A plan of memory and time for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cluster.launch.machines import Machine
from cluster.planning.advice import GB, best_setting, parts_in_words, require_memory
from cluster.planning.hardware import hardware_for
from cluster.planning.recipe_plan import RecipePlan, StageTime, plan_recipe
from cluster.planning.training_loads import shapes_of, unknown_checkpoint
from cluster.rollout_plan import RolloutPlan
from pipeline.config.recipe import Recipe


def memory_and_time(recipe: Recipe, rollouts: RolloutPlan, *, is_for_here: bool = True) -> str:
    """What `--dry-run` says of memory and time, before anything starts.

    Args:
        is_for_here: False for a cluster that nobody has looked at. Without GPUs its machines may be larger than this
            one, so its memory refuses nothing.

    Raises:
        ResourceError: the plan cannot fit.
        ConfigError: a named config.json is missing or cannot be read, or nobody knows the machine's GPU.
    """
    shapes = shapes_of(recipe)
    if shapes is None:
        return unknown_checkpoint(recipe)
    hardware = hardware_for(recipe.cluster)
    plan = plan_recipe(recipe, rollouts, hardware, shapes)
    if is_for_here or hardware.gpu is not None:
        require_memory(recipe, rollouts, hardware, shapes, plan)
    advice = best_setting(recipe, hardware, shapes, plan)
    lines = [*_memory_lines(plan), "", *_time_lines(recipe, plan)]
    return "\n".join([*lines, *([] if advice is None else [str(advice)])])


def check_memory(
    recipe: Recipe,
    rollouts: RolloutPlan,
    nodes: Sequence[Mapping[str, float]] = (),
    machine: Machine | None = None,
) -> None:
    """Refuses a plan that cannot fit; a model whose architecture nobody knows is let through.

    Args:
        nodes: each node's total resources as Ray has them.
        machine: as for `hardware_for`.

    Raises:
        ResourceError, ConfigError: as `memory_and_time`.
    """
    shapes = shapes_of(recipe)
    if shapes is not None:
        hardware = hardware_for(recipe.cluster, nodes, machine)
        require_memory(recipe, rollouts, hardware, shapes, plan_recipe(recipe, rollouts, hardware, shapes))


def _memory_lines(plan: RecipePlan) -> Iterator[str]:
    shapes = plan.shapes
    yield f"Planned for {plan.hardware.remark}."
    yield f"Policy: {count_in_words(shapes.policy.num_parameters)} parameters, by {shapes.policy.source}."
    if shapes.backbone != shapes.policy:
        yield f"Reward backbone: {count_in_words(shapes.backbone.trunk_parameters)}, by {shapes.backbone.source}."
    yield f"{'memory, GB':<20}{'role':<17}{'GPU':>7}{'host':>7}  largest parts"
    for role in plan.roles:
        device = f"{role.device_bytes / GB:.3g}" if role.on_gpu else "-"
        parts = parts_in_words(role.device)
        yield f"{role.stage:<20}{role.role:<17}{device:>7}{role.host_bytes / GB:>7.3g}  {parts}"
    stages = dict.fromkeys(role.stage for role in plan.roles)
    most = max(stages, key=plan.host_bytes)
    yield (
        f"A node holds at most {plan.host_bytes(most) / GB:.3g} of {plan.hardware.host_bytes / GB:.3g} GB ({most}), of "
        f"which two published policies in /dev/shm are {plan.shared_memory_bytes / GB:.3g} in align_policy."
    )
    commits = ", ".join(f"{stage} {size / GB:.3g}" for stage, size in plan.checkpoint_bytes.items())
    yield f"A checkpoint takes, GB: {commits}."


def _time_lines(recipe: Recipe, plan: RecipePlan) -> Iterator[str]:
    assumed = recipe.cluster.plan
    yield (
        f"{'time, s a step':<20}{'phase':<17}{'s':>9}{'MFU':>6}  what binds   "
        f"(mean prompt {assumed.prompt_share:g} and response {assumed.response_share:g} of the longest)"
    )
    for time in plan.times:
        for phase in time.phases:
            mfu = f"{phase.mfu:.0%}" if phase.model_flops else "-"
            yield f"{time.stage:<20}{phase.name:<17}{phase.seconds:>9.3g}{mfu:>6}  {phase.binds}"
        yield _total(time, plan)


def _total(time: StageTime, plan: RecipePlan) -> str:
    together = f"{time.seconds:.3g} s a step"
    if time.steps is not None:
        together += f", {time.steps} steps {duration(time.steps * time.seconds)}"
    if len(time.phases) > 1 and plan.gpus:
        busy = sum(phase.seconds * phase.gpus for phase in time.phases) / (time.seconds * plan.gpus)
        together += f"; GPUs work {busy:.0%} of the time"
    return f"{'':<20}{together}"


def count_in_words(number: float) -> str:
    """Of parameters: 8.19B, 135M."""
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def duration(seconds: float) -> str:
    """In the largest unit that reads well."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
