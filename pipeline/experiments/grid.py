"""The experiments of docs/method.md section 15 as plain data: the settings that vary and the results to show.

A variant is a list of overrides of the recipe, as on the command line. Two experiments that train the same model share
its run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config.load import load_recipe
from pipeline.config.recipe import ExperimentConfig, Recipe
from pipeline.errors import ConfigError
from pipeline.models.native_dtype import with_native_dtype
from pipeline.stages.fingerprint import fingerprint

RUN_VERSION = 4
"""Version of the computation of a run; part of the run's hash."""

LOSS = "reward.loss"

Trained = Literal["reward_model", "policy", "method"]
ALIGNED_BY = {
    "seed",
    "objectives",
    "own_objectives",
    "data",
    "policy",
    "sft",
    "reward",
    "judge",
    "alignment",
    "benchmark",
}
READS: Mapping[Trained, set[str]] = {
    "reward_model": {"seed", "objectives", "own_objectives", "data", "policy", "reward", "judge"},
    "policy": ALIGNED_BY,
    "method": ALIGNED_BY,
}
"""What an experiment trains -> the sections of a recipe that its runs read."""

EQUAL_KL = "0.05"
"""KL coefficient of the over-optimisation arms. Rewards are standardised, so it has the same weight for every head."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One curve or one column of a figure."""

    name: str
    overrides: tuple[str, ...]
    """`key.path=value` on top of the recipe."""
    x: float | None = None
    """Position on a numeric axis."""
    series: str = "vrm"
    """Name of the curve on a numeric axis."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Variants to train with the same data, order, budget and seeds, and the columns that answer the question."""

    title: str
    question: str
    trains: Trained = "reward_model"
    """With "policy", a policy is aligned against a reward model. Runs that differ only in the alignment share it."""
    recipe: str = "experiments_tiny"
    """Default recipe."""
    variants: tuple[Variant, ...]
    panels: tuple[str, ...]
    """Result columns that the figure shows, one per panel."""
    axis: str | None = None
    """Label of the numeric axis; None if the variants have only names."""
    log_axis: bool = False
    compare_with: str | None = None
    """The variant with which the others are compared pair by pair."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """(first, second) variants whose difference, seed by seed, answers the question."""
    contrasted: Literal["gap_growth", "gold_end"] = "gap_growth"
    """The column whose differences the sentences are about."""
    curves_against: Literal["kl", "step"] = "kl"
    """What the rewards of aligned policies are drawn against."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of the plan."""

    trains: Trained
    variant: Variant
    seed: int
    recipe: Recipe
    config_hash: str
    """Hash of all inputs of the run. The place where it runs is not part of it."""


def _kl_weights(weight: str) -> tuple[str, ...]:
    return f"{LOSS}.kl_weight_w={weight}", f"{LOSS}.kl_weight_z={weight}"


def _supervision(form: str, on: str = "mean", target: str = "chosen") -> Variant:
    named = [form, *([] if on == "mean" else [f"on {on}"]), *([] if target == "chosen" else [f"from {target}"])]
    return Variant(
        name=" ".join(named),
        overrides=(f"{LOSS}.supervision={form}", f"{LOSS}.supervision_on={on}", f"{LOSS}.target_from={target}"),
    )


def _head(name: str) -> Variant:
    return Variant(name=name, overrides=(f"reward.head={name}",), series=name)


def _arm(name: str, head: str, reward: str, kl_coefficient: str) -> Variant:
    return Variant(
        name=name,
        overrides=(
            f"reward.head={head}",
            f"alignment.ppo.reward_transform={reward}",
            f"alignment.kl.coefficient={kl_coefficient}",
        ),
        series=name.removesuffix(NO_KL),
    )


def _supervised_alignment(name: str, weights: str, scores: str | None = None) -> Variant:
    of_scores = () if scores is None else (f"{LOSS}.score_weight={scores}",)
    return Variant(name=name, overrides=(f"{LOSS}.supervision_weight={weights}", *of_scores), series=name)


NO_KL = ", KL 0"
ARMS = (("bt", "bt", "zscore"), ("gate", "gate", "zscore"), ("vrm", "vrm", "zscore"), ("vrm lcb", "vrm", "lcb"))


EXPERIMENTS: dict[str, Experiment] = {
    "supervision": Experiment(
        title="Supervision of the objective weights",
        question="Does it matter how the weights are compared with their target?",
        variants=(
            Variant(name="none", overrides=(f"{LOSS}.supervision_weight=0",)),
            *map(_supervision, ("kl", "mse", "mae", "rank")),
            _supervision("kl", on="sample"),
            _supervision("kl", on="expected_log"),
            _supervision("rank", on="expected_log"),
            _supervision("kl", target="diff"),
            _supervision("kl", target="both"),
        ),
        panels=("accuracy", "nll", "weight_correlation", "supervision"),
    ),
    "heads": Experiment(
        title="VRM against its baselines",
        question="Does the variational part help?",
        variants=tuple(map(_head, ("vrm", "bt", "bt_aux", "gate", "regression", "ensemble"))),
        panels=("accuracy", "nll", "ece", "weight_correlation"),
        compare_with="vrm",
    ),
    "supervision_weight": Experiment(
        title="Weight of the supervision",
        question="How much supervision do the objective weights need?",
        variants=tuple(
            Variant(name=f"lambda {value}", overrides=(f"{LOSS}.supervision_weight={value}",), x=float(value))
            for value in ("0", "0.01", "0.1", "0.5", "1")
        ),
        panels=("accuracy", "nll", "weight_correlation", "supervision"),
        axis="supervision weight lambda",
    ),
    "collapse": Experiment(
        title="Collapse",
        question="At which KL weight does the reward stop saying anything?",
        variants=tuple(
            Variant(name=f"KL weight {value}", overrides=_kl_weights(value), x=float(value))
            for value in ("1e-5", "1e-4", "1e-3", "1e-2", "0.1", "1")
        ),
        panels=("accuracy", "margin", "active_units", "kl_z", "kl_w", "nll"),
        axis="KL weight, of w and of z",
        log_axis=True,
    ),
    "overoptimization": Experiment(
        title="Over-optimisation",
        question="Does the policy win what the truth values, and whom does it fool when no KL holds it back?",
        trains="policy",
        recipe="experiments_alignment_tiny",
        variants=tuple(
            _arm(f"{name}{suffix}", head, reward, coefficient)
            for suffix, coefficient in (("", EQUAL_KL), (NO_KL, "0"))
            for name, head, reward in ARMS
        ),
        panels=("gold_win_rate", "gap_growth"),
        contrasts=(
            *((f"{name}{NO_KL}", name) for name, *_ in ARMS),
            *((f"vrm lcb{suffix}", f"vrm{suffix}") for suffix in ("", NO_KL)),
            *((f"vrm{suffix}", f"{baseline}{suffix}") for suffix in ("", NO_KL) for baseline in ("bt", "gate")),
        ),
    ),
    "supervised_alignment": Experiment(
        title="Alignment with and without supervision",
        question="Does a policy win more of what the truth values when annotations supervise the reward?",
        trains="policy",
        recipe="experiments_alignment_tiny",
        variants=(
            _supervised_alignment("weights and scores", "0.1"),
            _supervised_alignment("scores only", "0"),
            _supervised_alignment("weights only", "0.1", scores="0"),
            _supervised_alignment("nothing", "0", scores="0"),
        ),
        panels=("gold_win_rate", "gap_growth"),
        contrasts=(
            ("weights and scores", "scores only"),
            ("weights only", "nothing"),
            ("scores only", "nothing"),
            ("weights and scores", "nothing"),
        ),
        contrasted="gold_end",
        curves_against="step",
    ),
    "label_noise": Experiment(
        title="Label noise",
        question="Which head bears wrong labels better?",
        variants=tuple(
            Variant(
                name=f"{head}, {100 * share:.0f}% flipped",
                overrides=(f"reward.head={head}", f"data.label_flips={share}"),
                x=share,
                series=head,
            )
            for head in ("vrm", "bt")
            for share in (0.0, 0.1, 0.2, 0.3, 0.4)
        ),
        panels=("accuracy", "nll", "ece", "margin"),
        axis="share of training labels flipped",
    ),
}


def plan_runs(
    experiment: Experiment, recipe: str, overrides: Sequence[str], seeds: Sequence[int], data: Sequence[str] = ()
) -> list[Run]:
    """Every variant with every seed: for each seed, the variants in their order.

    The seed determines data, split, order, initial weights and noise. Runs of one seed differ only in their variant.

    Args:
        recipe, overrides: as on the command line.
        data: content fingerprints of the files that the recipe reads.

    Raises:
        ConfigError: an override sets what the experiment varies, a variant contradicts the recipe, or the experiment
            needs the planted truth and the recipe reads other data.
    """
    varied = {override.partition("=")[0] for variant in experiment.variants for override in variant.overrides}
    fixed = sorted((varied | {"seed"}) & {override.partition("=")[0] for override in overrides})
    if fixed:
        raise ConfigError(f"{', '.join(fixed)}: this experiment varies it itself. Leave it out, or use --seeds.")
    runs = []
    for seed in dict.fromkeys(seeds):
        for variant in experiment.variants:
            loaded = with_native_dtype(load_recipe(recipe, [*overrides, *variant.overrides, f"seed={seed}"]))
            if experiment.trains == "policy" and not loaded.data.is_planted:
                raise ConfigError(
                    "data.sources names real data: this experiment compares the reward with the planted truth, which "
                    "other data does not have. Leave data.sources empty."
                )
            identity = config_hash(loaded, data, trains=experiment.trains)
            runs.append(Run(trains=experiment.trains, variant=variant, seed=seed, recipe=loaded, config_hash=identity))
    return runs


def config_hash(experiment: ExperimentConfig, data: Sequence[str], *, trains: Trained = "reward_model") -> str:
    """16 hex digits over the sections of a recipe that a run reads."""
    config = experiment.model_dump(mode="json", include=READS[trains])
    return fingerprint("experiment_run", RUN_VERSION, config, data)[:16]


def varied_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Override key -> its value in the recipe of every run."""
    keys = dict.fromkeys(o.partition("=")[0] for run in runs for o in run.variant.overrides)
    return {key: [_setting(run.recipe, key) for run in runs] for key in keys}


def _setting(recipe: Recipe, key: str) -> str:
    value: object = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return f"{value:g}" if isinstance(value, float) else str(value)
