"""The comparison of methods: cells that are missing alone are computed, and the tables are written."""

import json
import os
import subprocess
import sys
import time

import pytest

from actors.comparison_tasks import compute_cell, reward_recipe
from actors.experiment_tasks import ProcessResources
from jobs.compare_methods import compare_methods, compare_methods_command
from pipeline.config.load import load_recipe
from pipeline.data.run_data import load_data
from pipeline.errors import ConfigError, NumericsError, WorkerError
from pipeline.experiments.method_run import CellInputs, align_by_method
from pipeline.experiments.methods import judge_of, needs_reward_model, plan_cells
from pipeline.experiments.shared_stages import seconds_of, shared_policy, shared_reward_model
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from tests.experiments.test_methods import finished
from tests.jobs.test_experiments import SMALL_ALIGNMENT
from tests.support.paths import ROOT

parse = compare_methods_command.options

SMALL_CELL = (
    *SMALL_ALIGNMENT,
    *(
        "alignment.direct.epochs=null",
        "alignment.direct.num_steps=4",
        "alignment.direct.batch_pairs=8",
        "alignment.direct.eval_every=2",
    ),
    *("alignment.samples_per_prompt=4", "alignment.policy_pairs.prompts_per_round=8", "comparison.kl_samples=16"),
    "alignment.policy_pairs.rounds=1",
    *("alignment.max_response_tokens=40", "benchmark.max_response_tokens=40"),
)


def options_of(out, *more):
    return parse(["--out", str(out), *more])


class Fake:
    """Computes at once and remembers what it was asked for."""

    def __init__(self, failing=()):
        self.failing = failing
        self.computed = []

    def __call__(self, cells, out):
        for index, cell in enumerate(cells):
            self.computed.append((cell.variant.name, cell.seed))
            if cell.variant.name in self.failing:
                yield index, NumericsError("a gradient is not finite")
                continue
            run = finished(cell.variant.name, cell.seed, [1.0, 1.0, -1.0])
            yield index, {**run.result, "metrics": run.result["metrics"] | {"reward/win_rate": 0.5}}


def test_a_method_that_is_added_is_the_only_one_computed(tmp_path):
    first, second = Fake(), Fake()
    compare_methods(options_of(tmp_path, "--methods", "dpo", "ppo", "--seeds", "0", "1"), first)
    assert first.computed == [("dpo", 0), ("ppo", 0), ("dpo", 1), ("ppo", 1)]
    text = compare_methods(options_of(tmp_path, "--methods", "dpo", "ppo", "kto", "--seeds", "0", "1"), second)
    assert second.computed == [("kto", 0), ("kto", 1)]
    assert "| kto | 66.7" in text
    tables = json.loads((tmp_path / "comparison.json").read_text())
    assert list(tables["table1"]) == ["dpo", "ppo", "kto"]
    assert (tmp_path / "comparison.md").read_text() in text
    assert (tmp_path / "learning_curves.png").stat().st_size > 0


def test_a_cell_that_fails_leaves_the_others_committed(tmp_path):
    with pytest.raises(WorkerError, match=r"(?s)1 of 2 cells failed.*ppo, seed 0: NumericsError: a gradient"):
        compare_methods(options_of(tmp_path, "--methods", "dpo", "ppo", "--seeds", "0"), Fake(failing=["ppo"]))
    again = Fake()
    compare_methods(options_of(tmp_path, "--methods", "dpo", "ppo", "--seeds", "0"), again)
    assert again.computed == [("ppo", 0)]


def test_judgments_of_another_judge_are_read_from_the_cells(tmp_path):
    compare_methods(options_of(tmp_path, "--methods", "dpo", "--seeds", "0"), Fake())
    (cell,) = plan_cells("table1_tiny", (), ["dpo"], [0])
    place = tmp_path / "cells" / cell.config_hash
    place.mkdir(parents=True)
    rows = [
        {
            "instruction": f"p{n}",
            "generator_1": "base",
            "generator_2": "aligned",
            "preference": 1.75,
            "output_1": "a",
            "output_2": "b",
        }
        for n in range(3)
    ]
    (place / "gpt4.json").write_text(json.dumps(rows))
    again = options_of(tmp_path, "--methods", "dpo", "--seeds", "0", "--judgments", "gpt4.json")
    assert "75.0 [75.0, 75.0] (75)" in compare_methods(again, Fake())


def test_a_dry_run_lists_the_cells(tmp_path):
    table = compare_methods(options_of(tmp_path, "--dry-run", "--seeds", "0", "1"), Fake())
    assert table.count("vrm_ppo") == 2
    assert table.count("seed 1  selective_dpo") == 1
    assert list(tmp_path.iterdir()) == []


def test_bad_input_ends_before_anything_is_computed(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        options_of(tmp_path, "--methods", "dpo", "dppo")
    assert "dppo: unknown; there are dpo, ipo" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="seeds are whole numbers"):
        options_of(tmp_path, "--seeds", "one")
    with pytest.raises(ConfigError, match="the comparison varies it itself"):
        compare_methods(options_of(tmp_path, "--methods", "dpo", "reward.head=bt"), Fake())


def test_a_method_that_reads_pairs_trains_no_reward_model_of_its_own():
    dpo, ppo = (cell.recipe for cell in plan_cells("table1_tiny", (), ["dpo", "ppo"], [0]))
    assert reward_recipe(dpo) == judge_of(dpo)
    assert reward_recipe(ppo) == ppo != judge_of(ppo)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Where the cells of this file share the fine-tuned policy and the judge."""
    return str(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def policy(shared):
    return shared_policy(small_cell("dpo"), shared, device="cpu")


@pytest.fixture(scope="module")
def judge(shared, policy):
    return shared_reward_model(judge_of(small_cell("dpo")), policy, shared, device="cpu")


def small_cell(method, *overrides):
    (cell,) = plan_cells("table1_tiny", (*SMALL_CELL, *overrides), [method], [0])
    return cell.recipe


@pytest.mark.parametrize("method", ["simpo", "selective_dpo", "raft", "vrm_ppo"])
def test_a_cell_is_computed_from_the_first_stage_to_its_measurements(method, shared, policy, judge, tmp_path):
    recipe = small_cell(method)
    resources = ProcessResources(cpus=1.0, gpus=0.0, data_root="")
    result = compute_cell(recipe, policy, judge, judge, shared, str(tmp_path / "cell"), resources)
    metrics = result["metrics"]
    assert len(result["prompts"]) == len(result["margins"]["gold"]) == len(result["margins"]["reward"]) == 8
    assert metrics["kl/standard_error"] > 0.0
    assert 0.0 <= metrics["table2/held-out pairs/accuracy"] <= 1.0
    assert metrics["budget/steps"] >= 3
    assert (metrics["budget/sampled_tokens"] > 0) == needs_reward_model(recipe)
    assert result["curve"]
    assert not (tmp_path / "cell" / "published").exists()
    json.dumps(result, allow_nan=False)


def test_the_start_has_no_distance_to_itself_and_a_finished_cell_trains_nothing(shared, policy, judge, tmp_path):
    """A learning rate of nearly 0 leaves the policy where it is."""
    recipe = small_cell("dpo", "alignment.direct.optimiser.learning_rate=1e-12")
    inputs = CellInputs(policy=policy, judge=judge, reward_model=judge, reward_model_seconds=seconds_of(judge))
    arguments = {"shared": shared, "directory": str(tmp_path / "cell"), "device": "cpu"}
    first = align_by_method(recipe, load_data(recipe), inputs, **arguments)
    assert first.metrics["kl/to_start"] == pytest.approx(0.0, abs=1e-4)
    assert first.metrics["reward/win_rate"] == 0.5
    again = align_by_method(recipe, load_data(recipe), inputs, **arguments)
    assert again.metrics == first.metrics
    assert again.seconds == first.seconds


@pytest.mark.parametrize("recipe", ["table1_tiny", "table1_qwen2.5_7b", "table1_qwen3_8b"])
def test_recipes_of_the_comparison_hold_every_method_of_the_paper(recipe, tmp_path):
    listed = compare_methods(options_of(tmp_path, "--recipe", recipe, "--dry-run", "--seeds", "0"), Fake())
    assert len(listed.partition("\n\n")[0].splitlines()) == 8
    assert load_recipe(recipe).benchmark.temperature > 0


# ------------------------------------------------------------------ on a real cluster

ONE_CORE_EACH = (
    "cluster.reward.cpus_per_rank=1",
    "alignment.direct.num_steps=60",
    "alignment.direct.eval_every=60",
    "alignment.direct.checkpoint_every=1",
)


def start(out, *methods):
    command = [sys.executable, "jobs/compare_methods.py", "--out", str(out), "--seeds", "0", "--methods", *methods]
    return subprocess.Popen(
        [*command, *SMALL_CELL, *ONE_CORE_EACH],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"},
    )


def end_of(driver):
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output[-4000:]
    return output


@pytest.mark.long
@pytest.mark.e2e
def test_killed_cells_go_on_and_a_method_that_is_added_is_the_only_one_computed_on_ray(tmp_path):
    driver = start(tmp_path, "dpo", "simpo")
    deadline = time.monotonic() + 400
    while not (begun := list(tmp_path.glob("cells/*/align_policy-*/checkpoints/step-*.json"))):
        assert driver.poll() is None, driver.stdout.read()[-4000:]
        assert time.monotonic() < deadline, "no cell committed a step"
        time.sleep(0.1)
    driver.kill()
    driver.stdout.close()
    driver.wait()
    log = begun[0].parents[1] / METRICS_FILE
    first_row = read_metrics(log)[0]

    assert "2 runs, 0 finished before, 2 to do" in end_of(start(tmp_path, "dpo", "simpo"))
    rows = read_metrics(log)
    assert rows[0] == first_row  # with the time at which it was written: the killed cell was not begun again
    assert [row["step"] for row in rows] == [*range(60), 59]
    finished = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert len(finished) == 2

    assert "3 runs, 2 finished before, 1 to do" in end_of(start(tmp_path, "dpo", "simpo", "ipo"))
    assert finished.items() < {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}.items()
    tables = json.loads((tmp_path / "comparison.json").read_text())
    assert list(tables["table1"]) == list(tables["table2"]) == ["dpo", "simpo", "ipo"]
    for row in tables["table1"].values():
        assert set(row["win_rates"]) == {"gold", "reward"}
        assert row["budget"]["budget/steps"] == 60
