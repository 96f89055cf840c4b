"""Rows, curves and the progress line of a stage."""

import io
import json

import pytest

from pipeline.errors import WorkspaceError
from pipeline.stages.metrics_log import MetricsLog, StepWork, keep_rows_before, read_metrics


def write_rows(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": step, "reward": step / 2}) + "\n" for step in steps) + tail)


def test_a_row_holds_stage_step_time_and_metrics(tmp_path):
    with MetricsLog(str(tmp_path), "align_policy", num_steps=2, first_step=0, console=io.StringIO()) as log:
        log.write(0, {"reward/mean": 1.25})
        log.write(1, {"reward/mean": 1.5, "kl/per_response": 4.0})
    first, second = read_metrics(str(tmp_path / "metrics.jsonl"))
    assert first["time"] <= second["time"]
    del first["time"], second["time"]
    assert first == {"stage": "align_policy", "step": 0, "reward/mean": 1.25}
    assert second == {"stage": "align_policy", "step": 1, "reward/mean": 1.5, "kl/per_response": 4.0}


def test_the_progress_line_shows_place_metrics_and_time_left(tmp_path):
    console = io.StringIO()
    with MetricsLog(str(tmp_path), "align_policy", num_steps=40, first_step=0, console=console) as log:
        log.write(39, {"reward/mean": 1.23, "kl/per_response": 4.5, "tokens_per_s/step": 1830.4, "loss/unshown": 7.0})
    [line] = console.getvalue().splitlines()
    assert line.split() == [
        *("align_policy", "40/40", "reward", "1.23", "kl", "4.5", "1,830", "tokens/s"),
        *("0:00", "left"),
    ]


def test_an_evaluation_is_shown_at_once_with_three_numbers_of_each_kind_and_the_rate(tmp_path):
    console = io.StringIO()
    with MetricsLog(str(tmp_path), "train_reward_model", num_steps=300, first_step=0, console=console) as log:
        log.write(8, {"train/nll": 0.5, "train/accuracy": 0.75}, StepWork(count=64, unit="pairs"))
        assert console.getvalue() == ""
        log.write(9, {"train/nll": 0.5, "eval/nll": 0.4, "eval/accuracy": 0.8}, StepWork(count=64, unit="pairs"))
    [line] = console.getvalue().splitlines()
    assert "10/300  nll 0.5  " in line
    assert " pairs/s  held-out nll 0.4  held-out accuracy 0.8  " in line


def test_raised_alarms_stand_in_the_progress_line(tmp_path):
    console = io.StringIO()
    with MetricsLog(str(tmp_path), "align_policy", num_steps=1, first_step=0, console=console) as log:
        log.write(0, {"kl/per_response": 12.0, "alarm/far_from_start": 1.0, "alarm/length_drift": 0.0})
    assert console.getvalue() == "align_policy              1/1  kl 12  alarms: far_from_start  0:00 left\n"


def test_a_full_disk_becomes_a_letter(tmp_path):
    log = MetricsLog(str(tmp_path), "align_policy", num_steps=2, first_step=0, console=io.StringIO())
    log._rows.close()
    log._rows = open("/dev/full", "a")  # noqa: SIM115 - closed by the log
    with pytest.raises(WorkspaceError, match="no space is left while writing /dev/full"), log:
        log.write(0, {"reward": 1.0})


def test_a_resumed_log_drops_the_steps_it_will_repeat(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", [0, 1, 2, 3])
    with MetricsLog(str(tmp_path), "align_policy", num_steps=4, first_step=2, console=io.StringIO()) as log:
        log.write(2, {"reward": 9.0})
    assert [(row["step"], row["reward"]) for row in read_metrics(str(tmp_path / "metrics.jsonl"))] == [
        (0, 0.0),
        (1, 0.5),
        (2, 9.0),
    ]


def test_a_line_cut_by_a_kill_is_ignored_and_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [0, 1], tail='{"step": 2, "rew')
    assert [row["step"] for row in read_metrics(str(path))] == [0, 1]
    keep_rows_before(str(path), 5)
    assert path.read_text().endswith('{"step": 1, "reward": 0.5}\n')
