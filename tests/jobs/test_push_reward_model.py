"""`vrm push`: a reward model and its card on a stand-in of the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.push_reward_model import push_reward_model_command
from pipeline.models.reward_model_card import CARD_FILE, RewardModelCard
from tests.support.hub_server import TOKEN, hub_server

REPO = "acme/tiny-reward"
METRICS = {
    "eval/accuracy": 0.75,
    "eval/accuracy_low": 0.66,
    "eval/accuracy_high": 0.83,
    "eval/ece_uncalibrated": 0.062,
    "eval/ece": 0.021,
    "eval/scale": 4.5,
    "reasons/helpfulness/pair_accuracy": 0.8,
    "reasons/helpfulness/pairs": 100.0,
    "reasons/safety/pair_accuracy": 0.6,
    "reasons/safety/pairs": 100.0,
}


@pytest.fixture(scope="module")
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture
def checkpoint(trained_reward_model, tmp_path):
    """A finished stage with known numbers."""
    result = tmp_path / "train_reward_model-0" / "result"
    shutil.copytree(trained_reward_model, result)
    card = RewardModelCard.model_validate_json((result / CARD_FILE).read_text())
    calibration = card.calibration.model_copy(update={"temperature": 0.25})
    known = card.model_copy(update={"metrics": METRICS, "calibration": calibration})
    (result / CARD_FILE).write_text(known.model_dump_json())
    (result / "notes.txt").write_text("of nobody's concern")
    source = {"name": "mine", "path": "/home/somebody/mine.jsonl", "hub": None, "format": "pairs"}
    manifest = {
        "config": {"data": {"sources": [source]}, "reward": {"backbone": "/home/somebody/backbone"}},
        "metrics": {"data/source/mine/train_pairs": 1200.0, "data/heldout_pairs": 80.0},
    }
    (result.parent / "manifest.json").write_text(json.dumps(manifest))
    return str(result)


def push(hub, *arguments, token=TOKEN):
    """In a process of its own: the library reads its address as it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": "/nowhere", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if token is not None:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-m", "jobs.push_reward_model", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_push_commits_the_checkpoint_and_its_card_to_a_private_repository(hub, checkpoint, capsys):
    push_reward_model_command([checkpoint, REPO, "--licence", "apache-2.0", "--dry-run"])
    shown = capsys.readouterr().out
    done = push(hub, checkpoint, REPO, "--licence", "apache-2.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/{REPO}\n"
    assert hub.private[REPO]
    pushed = hub.files[REPO]
    here = {file.name: file.read_bytes() for file in Path(checkpoint).iterdir() if file.name != "notes.txt"}
    assert {name: content for name, content in pushed.items() if name != "README.md"} == here
    assert {"model.safetensors", CARD_FILE, "modeling_vrm_reward.py"} <= pushed.keys()
    assert shown.startswith(pushed["README.md"].decode())
    assert all(name in shown for name in here)


def test_the_card_says_what_was_measured(checkpoint, capsys):
    push_reward_model_command([checkpoint, REPO, "--dry-run"])
    page = capsys.readouterr().out
    assert "| helpfulness | 80.0% [71.1, 86.7] | 100 | yes |" in page  # Wilson, by hand
    assert "| safety | 60.0% [50.2, 69.1] | 100 | no |" in page
    assert "| honesty | not measured | 0 | no |" in page
    assert "| all | 75.0% [66.0, 83.0] | 80 |" in page
    assert "- mine (`mine.jsonl`, format pairs): 1,200 pairs to train on" in page
    assert "It cannot tell why where the reason would be honesty, safety, brevity." in page
    assert "before calibration: 0.062\n- the same, after calibration: 0.021\n- learned scale" in page
    assert "annotations: 4.500\n- temperature of the log-odds, fitted on held-out pairs: 0.25" in page
    assert "The publisher has named no licence." in page
    assert "somebody" not in page, "a path of the machine that trained"


def test_a_public_repository_is_published_to_only_when_asked(hub, checkpoint):
    hub.private["acme/known"] = False
    refused = push(hub, checkpoint, "acme/known")
    assert (refused.returncode, refused.stderr.count("acme/known exists and everybody may read it")) == (2, 1)
    assert "acme/known" not in hub.files


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "ConfigError: there is no token of the hub. Set HF_TOKEN"), ("hf_wrong", "ConfigError: http://127.0.0.1")],
)
def test_without_a_right_token_nothing_is_sent(hub, checkpoint, token, message):
    done = push(hub, checkpoint, "acme/other", token=token)
    assert (done.returncode, done.stderr[: len(message)]) == (2, message)
    assert "acme/other" not in hub.files


@pytest.mark.parametrize(
    ("directory", "repo", "message"),
    [
        ("{checkpoint}", "acme/a/b", "ConfigError: 'acme/a/b' is no repository of the hub"),
        ("{empty}", REPO, "holds neither reward_model.json nor a finished reward model"),
        ("{pickled}", REPO, "holds pytorch_model.bin: pickled files run code"),
    ],
)
def test_what_cannot_be_published_is_refused_before_the_hub_is_asked(
    checkpoint, tmp_path, directory, repo, message, capsys
):
    pickled = tmp_path / "pickled"
    shutil.copytree(checkpoint, pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    place = directory.format(checkpoint=checkpoint, empty=tmp_path / "empty", pickled=pickled)
    with pytest.raises(SystemExit) as ended:
        push_reward_model_command([place, repo])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
