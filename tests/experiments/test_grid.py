"""The grid of an experiment: which runs there are, and when two of them are the same."""

import pytest

from pipeline.errors import ConfigError
from pipeline.experiments.grid import EXPERIMENTS, plan_runs, varied_settings

FEW = ("reward.num_steps=3",)


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("supervision", 10),
        ("heads", 6),
        ("supervision_weight", 5),
        ("collapse", 6),
        ("overoptimization", 8),
        ("supervised_alignment", 4),
        ("label_noise", 10),
    ],
)
def test_every_variant_runs_with_every_seed_and_no_two_runs_are_the_same(name, variants):
    runs = plan_runs(EXPERIMENTS[name], "experiments_tiny", FEW, [0, 7])
    assert len(runs) == 2 * variants
    assert len({run.config_hash for run in runs}) == 2 * variants
    assert [run.seed for run in runs] == [run.recipe.seed for run in runs] == [0] * variants + [7] * variants


def test_experiments_share_the_runs_that_train_the_same_model():
    def of(name, variant, overrides=FEW):
        runs = plan_runs(EXPERIMENTS[name], "experiments_tiny", overrides, [0])
        return next(run.config_hash for run in runs if run.variant.name == variant)

    vrm = of("heads", "vrm")
    assert (
        vrm
        == of("collapse", "KL weight 1e-4")
        == of("supervision_weight", "lambda 0.5")
        == of("supervision", "kl")
        == of("label_noise", "vrm, 0% flipped")
    )
    assert of("heads", "bt") == of("label_noise", "bt, 0% flipped") != vrm
    assert of("heads", "vrm", ["reward.num_steps=4"]) != vrm


def test_where_a_run_computes_is_no_part_of_its_identity_and_its_data_is():
    def first(overrides, data=()):
        return plan_runs(EXPERIMENTS["heads"], "experiments_tiny", overrides, [0], data)[0].config_hash

    assert first([]) == first(["cluster.reward.cpus_per_rank=2"]) == first(["alignment.num_steps=3"])
    assert first([]) != first([], ["another file"])


def test_an_alignment_is_another_run_than_the_training_of_its_reward_model_and_reads_more_of_the_recipe():
    def first(*overrides):
        return plan_runs(EXPERIMENTS["overoptimization"], "experiments_alignment_tiny", overrides, [0])[0].config_hash

    assert first() == first("cluster.rollout.workers=7")
    assert len({first(), *map(first, ("alignment.num_steps=3", "sft.num_steps=3", "benchmark.num_prompts=3"))}) == 4


def test_the_arms_of_over_optimisation_differ_in_head_reward_and_kl_alone():
    told = varied_settings(plan_runs(EXPERIMENTS["overoptimization"], "experiments_alignment_tiny", (), [0]))
    assert told == {
        "reward.head": ["bt", "gate", "vrm", "vrm"] * 2,
        "alignment.ppo.reward_transform": ["zscore", "zscore", "zscore", "lcb"] * 2,
        "alignment.kl.coefficient": ["0.05"] * 4 + ["0"] * 4,
    }


def test_the_arms_of_supervised_alignment_differ_in_supervision_alone():
    experiment = EXPERIMENTS["supervised_alignment"]
    told = varied_settings(plan_runs(experiment, experiment.recipe, (), [0]))
    assert told == {
        "reward.loss.supervision_weight": ["0.1", "0", "0.1", "0"],
        "reward.loss.score_weight": ["None", "None", "0", "0"],  # None: the weight of every recipe
    }


@pytest.mark.parametrize("experiment", ["overoptimization", "supervised_alignment"])
def test_every_contrast_is_between_two_arms(experiment):
    names = {variant.name for variant in EXPERIMENTS[experiment].variants}
    assert {name for contrast in EXPERIMENTS[experiment].contrasts for name in contrast} == names


def test_what_an_experiment_varies_cannot_be_set_beside_it():
    with pytest.raises(ConfigError, match=r"kl_weight_w, seed: this experiment varies it itself"):
        plan_runs(EXPERIMENTS["collapse"], "experiments_tiny", ["seed=3", "reward.loss.kl_weight_w=0"], [0])


def test_the_varied_settings_are_told_for_every_run_even_where_the_recipe_made_them():
    runs = plan_runs(EXPERIMENTS["supervision"], "experiments_tiny", FEW, [0])
    told = varied_settings(runs)
    assert told["reward.loss.supervision"] == [
        "kl",
        "kl",
        "mse",
        "mae",
        "rank",
        "kl",
        "kl",
        "rank",
        "kl",
        "kl",
    ]
    assert told["reward.loss.supervision_weight"] == ["0", *["0.5"] * 9]
