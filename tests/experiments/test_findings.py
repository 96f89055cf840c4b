"""From runs to a table: spreads over seeds, and paired comparisons on the same rows."""

import csv
import io
import math

import numpy as np
import pytest

from pipeline.errors import ShapeError
from pipeline.experiments.figures import write_figures
from pipeline.experiments.findings import (
    FinishedRun,
    by_variant,
    findings_text,
    paired_differences,
    results_csv,
    spread,
)
from pipeline.experiments.grid import EXPERIMENTS, plan_runs

HEADS = EXPERIMENTS["heads"]


def result(margins, prompts=None, **metrics):
    """What a run leaves behind, with the margins of its held-out pairs."""
    measured = {
        "eval/accuracy": float(np.mean([m > 0 for m in margins])),
        "eval/nll": float(np.logaddexp(0.0, -np.array(margins)).mean()),
        "eval/ece": 0.1,
        "eval/ece_uncalibrated": 0.2,
        "eval/margin": float(np.abs(margins).mean()),
        "eval/kl_w": 0.0,
        "eval/kl_z": 0.0,
        "eval/longer_is_better": 0.25,
    }
    return {
        "metrics": measured | metrics,
        "curve": [{"step": 2.0, "eval/accuracy": 0.5}, {"step": 4.0, "eval/accuracy": measured["eval/accuracy"]}],
        "prompts": prompts or [f"prompt {i}" for i in range(len(margins))],
        "margins": {"mean": list(margins)},
        "seconds": 12.0,
    }


def finished(results, seeds=(0, 1), experiment=HEADS):
    """`results`: variant -> result of every seed; variants without one are left out."""
    runs = plan_runs(experiment, "experiments_tiny", (), seeds)
    return [
        FinishedRun(run=run, result=results[run.variant.name][seeds.index(run.seed)])
        for run in runs
        if run.variant.name in results
    ]


def test_the_interval_over_seeds_is_students():
    found = spread([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3.0))  # t_{0.975, 2}, s = 1
    assert math.isnan(spread([0.5]).high)


def test_a_comparison_pairs_the_rows_of_each_seed_and_pools_the_seeds():
    vrm = [result([1.0, -1.0, 1.0, -1.0]), result([1.0, 1.0, 1.0, 1.0])]
    bt = [result([1.0, 1.0, 1.0, -1.0]), result([1.0, 1.0, 1.0, 0.0])]
    (one,) = paired_differences(finished({"vrm": vrm, "bt": bt}), "vrm")
    assert (one.variant, one.reading, one.by_seed) == ("bt", "mean", (0.25, -0.125))
    assert one.accuracy[0] == pytest.approx(0.0625)
    assert one.accuracy[1] < 0.0 < one.accuracy[2]


def test_a_model_has_no_difference_from_itself_and_a_better_one_excludes_zero():
    good, bad = [1.0] * 40, [1.0, -1.0] * 20
    equal, better = (
        paired_differences(finished({"vrm": [result(ours)] * 2, "bt": [result(bad)] * 2}), "vrm")[0]
        for ours in (bad, good)
    )
    assert equal.accuracy == equal.nll == (0.0, 0.0, 0.0)
    assert better.accuracy[0] == -0.5
    assert better.accuracy[2] < 0.0


def test_another_reading_of_the_same_run_is_compared_too():
    vrm = result([1.0, -1.0]) | {"margins": {"mean": [1.0, -1.0], "lcb": [1.0, 1.0]}}
    (lcb,) = paired_differences(finished({"vrm": [vrm]}, seeds=(0,)), "vrm")
    assert (lcb.variant, lcb.reading, lcb.accuracy[0]) == ("vrm", "lcb", 0.5)


def test_runs_on_other_rows_are_not_compared():
    other = result([1.0], prompts=["another prompt"])
    with pytest.raises(ShapeError, match="bt was measured on other held-out pairs"):
        paired_differences(finished({"vrm": [result([1.0])], "bt": [other]}, seeds=(0,)), "vrm")


def test_the_table_has_a_row_per_run_and_an_empty_cell_where_a_head_knows_nothing():
    runs = finished({"vrm": [result([1.0, -1.0], **{"eval/active_units": 5.0})] * 2, "bt": [result([1.0, 1.0])] * 2})
    rows = list(csv.DictReader(io.StringIO(results_csv(runs))))
    assert [(row["variant"], row["seed"], row["reward.head"]) for row in rows] == [
        ("vrm", "0", "vrm"),
        ("bt", "0", "bt"),
        ("vrm", "1", "vrm"),
        ("bt", "1", "bt"),
    ]
    assert [row["active_units"] for row in rows] == ["5", "", "5", ""]
    assert [row["kl_z"] for row in rows] == ["0", "", "0", ""]
    assert [row["accuracy"] for row in rows] == ["0.5", "1", "0.5", "1"]
    assert {row["config_hash"] for row in rows} == {run.run.config_hash for run in runs}
    words = findings_text(HEADS, runs, paired_differences(runs, "vrm"))
    assert "longer is better" in words
    assert "+0.500 [" in words
    assert list(by_variant(runs, "active_units")) == ["vrm"]


@pytest.mark.parametrize("name", ["heads", "collapse", "label_noise"])
def test_figures_are_drawn_even_while_runs_are_missing(name, tmp_path):
    experiment = EXPERIMENTS[name]
    some = {variant.name: [result([1.0, -1.0, 2.0])] for variant in experiment.variants[:3]}
    written = write_figures(name, experiment, finished(some, seeds=(0,), experiment=experiment), tmp_path)
    assert [path.name for path in written] == [f"{name}.png", f"{name}_curves.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
