"""The cells of a comparison of methods: each method with each seed, from one policy and one data set a seed.

A method is a list of overrides of the recipe, as a variant of an experiment is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config.comparison import Method
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.data.files import content_fingerprint
from pipeline.data.run_data import resolve
from pipeline.errors import ConfigError
from pipeline.experiments.grid import Run, Variant, config_hash
from pipeline.models.native_dtype import with_native_dtype
from pipeline.stages.fingerprint import fingerprint

CELL_VERSION = 1
"""Raised when the computation of a cell changes its result."""

OWN_PAIRS = ("alignment.pairs=policy", "alignment.samples_per_prompt=8", "reward.head=vrm")

METHODS: Mapping[Method, tuple[str, ...]] = {
    **{
        name: (f"alignment.algorithm={name}",)
        for name in ("dpo", "ipo", "kto", "simpo", "cpo", "orpo", "wpo", "selective_dpo", "beta_dpo")
    },
    "online_dpo": ("alignment.algorithm=dpo", *OWN_PAIRS),
    "raft": ("alignment.algorithm=raft", *OWN_PAIRS),
    "ppo": ("alignment.algorithm=ppo", "reward.head=bt"),
    "vrm_ppo": ("alignment.algorithm=ppo", "reward.head=vrm"),
}
"""Method -> what makes it, on top of the recipe."""

JUDGE = "vrm"
"""The head of the reward model that judges all answers, beside the gold reward where it is known."""


def plan_cells(
    recipe: str, overrides: Sequence[str], methods: Sequence[Method], seeds: Sequence[int], data: Sequence[str] = ()
) -> list[Run]:
    """Every method with every seed: for each seed, the methods in their order.

    Cells of one seed share data, split, fine-tuned policy and judge. Only the method and its own settings differ.

    Args:
        recipe, overrides: as on the command line.
        data: content fingerprints of the files that the recipe reads.

    Raises:
        ConfigError: an override sets what the comparison varies, or settings contradict each other.
    """
    fixed = {"seed", "alignment.algorithm", "alignment.pairs", "reward.head"} & {o.partition("=")[0] for o in overrides}
    if fixed:
        raise ConfigError(f"{', '.join(sorted(fixed))}: the comparison varies it itself. Choose --methods and --seeds.")
    common = load_recipe(recipe, overrides)
    benchmarks = common.comparison.model_dump(mode="json", exclude={"settings"})
    files = [content_fingerprint(resolve(f)) for b in common.comparison.reward_benchmarks for f in b.files]
    cells = []
    for seed in dict.fromkeys(seeds):
        for method in dict.fromkeys(methods):
            # What the command line says wins over the settings of the recipe.
            changed = (*METHODS[method], *common.comparison.settings.get(method, ()), *overrides)
            loaded = with_native_dtype(load_recipe(recipe, [*changed, f"seed={seed}"]))
            require_pairs_for_the_judge(loaded)
            content = config_hash(loaded, data, trains="method")
            identity = fingerprint("comparison_cell", CELL_VERSION, {"run": content, "comparison": benchmarks}, files)
            cells.append(
                Run(
                    trains="method",
                    variant=Variant(name=method, overrides=changed, series=method),
                    seed=seed,
                    recipe=loaded,
                    config_hash=identity[:16],
                )
            )
    return cells


def require_pairs_for_the_judge(recipe: Recipe) -> None:
    """Raises ConfigError where the recipe has no pairs, of which the judge of a comparison learns."""
    if not recipe.data.has_pairs:
        raise ConfigError(
            f"recipe {recipe.name} has prompts and no pairs, and a reward model judges a comparison of methods. Give "
            "data.sources."
        )


def judge_of(recipe: Recipe) -> Recipe:
    """The recipe of the reward model that judges the answers of this cell: the same for all cells of a seed."""
    return recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"head": JUDGE})})


def needs_reward_model(recipe: Recipe) -> bool:
    """Whether the method asks a reward model, as PPO and the ranking of the policy's own responses do."""
    return recipe.alignment.needs_reward_model
