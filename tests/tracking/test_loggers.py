"""The real libraries, offline: what they are told, what a resumed run adds, what a failure says."""

import importlib.util
import json
import re
import sqlite3
import subprocess
import sys
import tomllib
from dataclasses import asdict

import pytest

from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError
from pipeline.stages.workspace import Workspace
from pipeline.tracking import background_logger, logger_names
from pipeline.tracking.logger_names import LOGGERS, LoggerNeeds, require_loggers
from pipeline.tracking.metrics_logger import LoggedRun
from pipeline.tracking.stage_loggers import StageLogging, group_name
from tests.support.paths import ROOT

CONFIG = {"num_steps": 4, "ppo": {"epochs": 2}}
RUN = LoggedRun(
    project="tiny",
    group="tiny-abc",
    stage="align_policy",
    run_id=None,
    first_step=0,
    config=CONFIG,
    versions={"torch": "2.13.0"},
)


def installed(name):
    """Extras: `install/install.sh` installs them, another environment may lack them."""
    missing = importlib.util.find_spec(LOGGERS[name].module) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"needs {LOGGERS[name].requirement}"))


@pytest.fixture
def offline(tmp_path, monkeypatch):
    for variable, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(variable, value)
    # A crowded machine takes its time to import a library.
    monkeypatch.setattr(background_logger, "CLOSE_S", 240.0)
    return tmp_path


def stage_of(workspace, name):
    logging = StageLogging(names=(name,), project="tiny", group="tiny-abc", versions={"torch": "2.13.0"})
    return Workspace(str(workspace), owner=None, logging=logging).stage("align_policy", "0" * 64, config=CONFIG)


def run_twice(workspace, name):
    """An attempt that is killed after step 2 but committed step 1, and one that resumes."""
    for first_step, steps in ((0, (0, 1, 2)), (2, (2, 3))):
        with stage_of(workspace, name).metrics_log(num_steps=4, first_step=first_step) as log:
            for step in steps:
                log.write(step, {"reward/mean": 10.0 + step, "kl/per_response": 0.5})


def logged_by_tensorboard(directory):
    from tensorboardX.proto.event_pb2 import Event

    runs = sorted((directory / "run").glob("stages/*/tensorboard"))
    points, texts = {}, []
    for file in sorted(runs[0].iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                if value.tag == "reward/mean":
                    points[event.step] = value.simple_value
                elif "text" in value.tag:
                    texts += [text.decode() for text in value.tensor.string_val]
    told = dict(line.split(" = ") for line in "\n".join(texts).split("\n") if " = " in line)
    return len(runs), points, {key.strip(): value for key, value in told.items()}


def wandb_records(data):
    """LevelDB's log format: blocks of 32 KiB, each fragment behind a checksum, its length and its kind."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last fragment
            yield record
            record = b""


def logged_by_wandb(directory):
    from wandb.proto.wandb_internal_pb2 import Record

    points, told, ids = {}, {}, set()
    for file in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(Record.FromString, wandb_records(file.read_bytes())):
            if record.WhichOneof("record_type") == "run":
                assert record.run.run_group == "tiny-abc"
                ids.add(record.run.run_id)
                told |= {item.key: item.value_json for item in record.run.config.update}
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if row:
                points[int(row["_step"])] = float(row["reward/mean"])
    return len(ids), points, {"ppo.epochs": re.search(r'"epochs":(\d)', told["ppo"])[1], **versions_in(told)}


def versions_in(told):
    return {"versions.torch": re.search(r'"torch":"([^"]*)"', told["versions"])[1]}


def logged_by_mlflow(directory):
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert runs[0].data.tags["group"] == "tiny-abc"
    assert runs[0].info.status == "FINISHED"
    history = client.get_metric_history(runs[0].info.run_id, "reward/mean")
    return len(runs), {point.step: point.value for point in history}, runs[0].data.params


def logged_by_trackio(directory):
    with sqlite3.connect(directory / "trackio" / "tiny.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        [(config,)] = database.execute("select config from configs").fetchall()
    told = json.loads(config)
    assert told["_Group"] == "tiny-abc"
    points = {step: json.loads(metrics)["reward/mean"] for _, step, metrics in rows}
    return len({name for name, _, _ in rows}), points, {key: str(value) for key, value in told.items()}


READERS = {
    "tensorboard": logged_by_tensorboard,
    "wandb": logged_by_wandb,
    "mlflow": logged_by_mlflow,
    "trackio": logged_by_trackio,
}


@pytest.mark.parametrize("name", [installed(name) for name in LOGGERS])
def test_a_resumed_stage_is_one_run_with_every_step_on_its_place(name, offline, capsys):
    run_twice(offline / "run", name)
    num_runs, points, told = READERS[name](offline)
    assert num_runs == 1
    assert points == {0: 10.0, 1: 11.0, 2: 12.0, 3: 13.0}
    assert told["ppo.epochs"] == "2"
    assert told.get("versions.torch", told.get("torch")) == "2.13.0"
    assert "logging:" not in capsys.readouterr().out
    assert (next((offline / "run" / "stages").iterdir()) / f"logger-{name}.txt").read_text()


@pytest.mark.parametrize("name", [installed("mlflow")])
def test_a_library_that_fails_says_why_and_where_it_printed(name, offline, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    run_twice(offline / "run", name)
    out = capsys.readouterr().out
    assert out.count("logging: mlflow fails (") == 2  # once an attempt
    assert f"what it printed is in {offline}/run/stages/align_policy-000000000000/loggers.log" in out
    assert "logging: mlflow lost 3 of 3 rows" in out
    assert [row["step"] for row in stage_of(offline / "run", name).metrics_rows()] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [installed("trackio")])
def test_a_killed_run_leaves_its_last_rows_in_the_logger(name, offline):
    questions = json.dumps(asdict(RUN)) + "\n" + json.dumps({"step": 0, "metrics": {"reward/mean": 10.0}}) + "\n"
    # The pipe ends without a word, as that of a killed run does.
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.tracking.logger_process", name],
        input=questions,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    _, points, _ = logged_by_trackio(offline)
    assert points == {0: 10.0}


def test_an_unknown_logger_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"logging\[1\] = 'wandbb': .*'tensorboard', 'wandb', 'mlflow' or 'trackio'"):
        load_recipe("tiny", ["logging=[tensorboard,wandbb]"])


def test_a_missing_extra_is_refused_with_the_command_that_installs_it(monkeypatch):
    needs = LoggerNeeds(module="no_such_module", requirement="wandb>=0.31,<0.32")
    monkeypatch.setitem(logger_names.LOGGERS, "wandb", needs)
    with pytest.raises(ConfigError) as refused:
        require_loggers(["tensorboard", "wandb"])
    assert f'{sys.executable} -m pip install "wandb>=0.31,<0.32"' in str(refused.value)


def test_mlflow_without_an_address_is_refused():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        require_loggers(["mlflow"], environment={})


def test_the_extras_of_the_package_are_those_that_messages_name():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: [needs.requirement] for name, needs in LOGGERS.items() if name != "tensorboard"} == {
        name: extras[name] for name in ("wandb", "mlflow", "trackio")
    }


def test_workspaces_of_one_name_are_groups_of_their_own():
    one, other = group_name("/home/a/runs/tiny"), group_name("/home/b/runs/tiny/")
    assert one.startswith("tiny-")
    assert other.startswith("tiny-")
    assert one != other
