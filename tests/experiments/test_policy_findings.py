"""What is said of finished alignments: tables, contrasts, words and figures."""

import csv
import io

import pytest

from pipeline.experiments.figures import write_figures
from pipeline.experiments.findings import POLICY_COLUMNS, FinishedRun, results_csv
from pipeline.experiments.grid import EXPERIMENTS, plan_runs
from pipeline.experiments.policy_findings import (
    POLICY_CURVE_METRICS,
    arm_contrasts,
    curves_csv,
    fall_from_peak,
    gold_win_rate,
    moving_average,
    policy_findings_text,
)

OVEROPTIMIZATION = EXPERIMENTS["overoptimization"]
SUPERVISED = EXPERIMENTS["supervised_alignment"]


def aligned(*, gold=(2.0, 3.0), fall=0.0, gap=0.5, steps=7):
    """What an alignment leaves behind: mean gold reward before and after, and by how much the gap grew."""
    metrics = dict.fromkeys(POLICY_COLUMNS.values(), 0.5) | {
        "gold/base": gold[0],
        "gold/aligned": gold[1],
        "gold/fall": fall,
        "gap/growth": gap,
    }
    return {
        "metrics": metrics,
        "curve": [{"step": float(s)} | dict.fromkeys(POLICY_CURVE_METRICS, s / 4) for s in range(steps)],
        "prompts": ["a", "b"],
        "margins": {"gold": [0.0, 1.0], "reward": [1.0, 1.0]},
        "seconds": 60.0,
    }


def finished(results, seeds, experiment=OVEROPTIMIZATION):
    """`results`: arm -> what every seed left behind."""
    runs = plan_runs(experiment, experiment.recipe, (), seeds)
    return [
        FinishedRun(run=run, result=results[run.variant.name][seeds.index(run.seed)])
        for run in runs
        if run.variant.name in results
    ]


def test_a_moving_average_is_of_five_steps():
    assert moving_average([1.0, 2.0, 3.0, 4.0, 5.0, 11.0]).tolist() == pytest.approx([3.0, 5.0])
    assert moving_average([1.0, 3.0]).tolist() == [2.0]


def test_a_fall_is_from_the_highest_average_to_the_last():
    # averages 1, 2, 1: the spike at the end of a step is no peak of its own
    assert fall_from_peak([0.0, 0.0, 5.0, 0.0, 0.0, 5.0, 0.0, -5.0, 5.0]) == pytest.approx(1.0)
    assert fall_from_peak([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 0.0
    assert fall_from_peak([3.0, 1.0]) == 0.0  # too short to have fallen


def test_a_contrast_is_the_difference_on_each_seed():
    held = [aligned(gap=0.1), aligned(gap=0.3), aligned(gap=0.2)]
    free = [aligned(gap=1.1, gold=(2.0, 2.5)), aligned(gap=1.5), aligned(gap=1.3)]
    (one,) = arm_contrasts(OVEROPTIMIZATION, finished({"bt": held, "bt, KL 0": free}, [0, 1, 2]))
    assert (one.variant, one.reference) == ("bt, KL 0", "bt")
    gap = one.by_column["gap_growth"]
    assert gap.values == pytest.approx((1.0, 1.2, 1.1))
    assert gap.high - gap.mean == pytest.approx(4.302653 * 0.1 / 3**0.5)  # t_{0.975, 2}, s = 0.1
    assert one.by_column["gold_end"].values == pytest.approx((-0.5, 0.0, 0.0))


def test_the_words_say_what_rose_what_stayed_up_and_what_the_seeds_do_not_tell():
    arms = {
        "bt": [aligned(gap=0.2)] * 2,
        "bt, KL 0": [aligned(gap=1.2, gold=(2.0, 3.0), fall=0.2), aligned(gap=1.3, gold=(2.0, 1.8), fall=1.0)],
        "vrm": [aligned(gap=0.1), aligned(gap=0.2)],
        "vrm lcb": [aligned(gap=0.3), aligned(gap=0.1)],
    }
    words = policy_findings_text(OVEROPTIMIZATION, finished(arms, [0, 1]))
    assert (
        "bt: the gold reward goes from 2.00 to 3.00; it rose in 2 and stayed up in 2 of 2 seeds. 75% [50%, 100%]"
        in words
    )
    # 0.2 lost of the 1.2 it had won is more than a tenth; the other seed ends below its start
    assert "bt, KL 0: the gold reward goes from 2.00 to 2.40; it rose in 1 and stayed up in 0 of 2 seeds." in words
    assert "bt, KL 0: the gap grows by 1.05 sd more than with bt." in words
    assert "vrm lcb: the gap grows by 0.05 sd more than with vrm, which these seeds do not tell from 0." in words
    assert "+1.050 [+0.415, +1.685]*" in words  # 1.05 +- 12.706 * 0.0707 / sqrt 2
    assert "minus vrm, KL 0" not in words  # not run
    alone = finished({name: runs[:1] for name, runs in arms.items()}, [0])
    assert "bt, KL 0: the gap grows by 1.00 sd more than with bt, in one seed." in policy_findings_text(
        OVEROPTIMIZATION, alone
    )


def test_an_experiment_about_the_gold_reward_says_how_much_higher_it_ends():
    arms = {
        "weights and scores": [aligned(gold=(2.0, 3.5)), aligned(gold=(2.0, 3.4))],
        "scores only": [aligned(gold=(2.0, 3.5)), aligned(gold=(2.0, 3.6))],
        "nothing": [aligned(gold=(2.0, 3.0)), aligned(gold=(2.0, 3.1))],
    }
    words = policy_findings_text(SUPERVISED, finished(arms, [0, 1], SUPERVISED))
    assert "scores only: the gold reward ends 0.50 higher than with nothing." in words
    assert (
        "weights and scores: the gold reward ends 0.10 lower than with scores only, which these seeds do not tell "
        "from 0." in words
    )
    assert "gold by seed +0.50 +0.50" in words


def test_the_win_rate_counts_a_tie_half_and_its_interval_draws_prompts():
    # prompt a ties, prompt b wins, in both seeds: a draw of prompts sees one of them or both
    assert gold_win_rate(finished({"bt": [aligned()] * 2}, [0, 1])) == (0.75, 0.5, 1.0)


def test_the_tables_have_a_row_per_run_and_a_row_per_step():
    runs = finished({"bt": [aligned()], "vrm lcb, KL 0": [aligned(gold=(2.0, 1.5))]}, [0])
    rows = list(csv.DictReader(io.StringIO(results_csv(runs, (*POLICY_COLUMNS,)))))
    assert [(r["variant"], r["alignment.kl.coefficient"], r["alignment.ppo.reward_transform"]) for r in rows] == [
        ("bt", "0.05", "zscore"),
        ("vrm lcb, KL 0", "0", "lcb"),
    ]
    assert [row["gold_end"] for row in rows] == ["3", "1.5"]
    steps = list(csv.DictReader(io.StringIO(curves_csv(runs))))
    assert [row["step"] for row in steps] == [str(s) for s in range(7)] * 2
    assert steps[3]["gold/gap"] == "0.75"


@pytest.mark.parametrize(
    ("experiment", "arms"), [(OVEROPTIMIZATION, ("bt", "vrm, KL 0")), (SUPERVISED, ("scores only", "nothing"))]
)
def test_figures_are_drawn_even_while_arms_and_seeds_are_missing(experiment, arms, tmp_path):
    runs = finished({arm: [aligned(), aligned()] for arm in arms}, [0, 1], experiment)[:3]
    written = write_figures("figure", experiment, runs, tmp_path)
    assert [path.name for path in written] == ["figure.png", "figure_curves.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
