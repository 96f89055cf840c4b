import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import jobs.pac_bayes
from jobs.pac_bayes import measure_model, pac_bayes_command
from pipeline.data.planted import OBJECTIVES
from pipeline.data.preferences import normalised_prompt
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.models.backbone import load_backbone
from pipeline.models.reward_model import RewardModel, make_head, save_reward_model
from pipeline.stages.fingerprint import directory_fingerprint
from tests.support.learners import HEAD, reward_card, statistics_of
from tests.support.paths import ROOT

parse = pac_bayes_command.options

SMALL = [
    "data.planted.num_train_pairs=40",
    "data.planted.num_heldout_pairs=30",
    "data.planted.num_train_prompts=30",
    "data.planted.num_heldout_prompts=10",
]


def save_model(directory, tiny_policy, world, tokenizer, head="vrm"):
    torch.manual_seed(0)
    backbone = load_backbone(tiny_policy, dtype="float32")
    module = make_head(head, backbone.config.hidden_size, len(OBJECTIVES), HEAD)
    save_reward_model(
        str(directory),
        state_dict=RewardModel(backbone, module).state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=reward_card(head, statistics_of(world)),
    )
    return str(directory)


@pytest.fixture(scope="module")
def model(tiny_policy, world, tokenizer, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("reward-model"), tiny_policy, world, tokenizer)


def run(*arguments):
    return measure_model(parse([*arguments, "--samples", "2"]))


def write_pairs(path, pairs):
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
    return str(path)


def test_the_data_of_a_recipe_is_measured_with_one_heldout_pair_a_prompt(model, tmp_path, capsys):
    output = tmp_path / "report.json"
    text = run("--model", model, "--output", str(output), "--recipe", "tiny", *SMALL)
    last_line = capsys.readouterr().out.splitlines()[-1]
    record = json.loads(output.read_text())
    assert record["model_fingerprint"] == directory_fingerprint(model)
    assert record["training"]["num_pairs"] == 40
    assert record["heldout"]["num_pairs"] == record["heldout"]["num_prompts"] <= 10
    num_pairs = 40 + record["heldout"]["num_pairs"]
    assert last_line == f"pac_bayes  {num_pairs}/{num_pairs} pairs  0:00 left"
    assert record["shared_prompts"] == 0
    parts = [record["training"][name] for name in ("kl_w", "kl_z_chosen", "kl_z_rejected")]
    assert record["kl"] == pytest.approx(sum(parts))
    assert f"{record['heldout_mean_reward_at_most']:.4f}" in text


def test_progress_is_said_every_few_seconds_over_both_splits(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(jobs.pac_bayes, "time", SimpleNamespace(monotonic=lambda: now))
    report = jobs.pac_bayes.progress(total=15)
    for moment, measured in ((2.0, 4), (6.0, 8), (7.0, 10), (13.0, 3), (14.0, 5)):
        now = moment
        report(measured)
    assert capsys.readouterr().out.splitlines() == [
        "pac_bayes  8/15 pairs  0:05 left",
        "pac_bayes  13/15 pairs  0:02 left",
        "pac_bayes  15/15 pairs  0:00 left",
    ]


def test_files_are_measured_and_the_report_may_have_a_bare_name(model, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = write_pairs(tmp_path / "train.jsonl", world.train_pairs())
    heldout = write_pairs(tmp_path / "heldout.jsonl", [*world.heldout_pairs(), world.train_pairs()[0]])
    text = run("--model", model, "--train", train, "--heldout", heldout, "--output", "bare.json")
    record = json.loads((tmp_path / "bare.json").read_text())
    assert record["training"]["num_pairs"] == 64
    assert record["heldout"]["num_pairs"] == len({normalised_prompt(p.prompt) for p in world.heldout_pairs()}) + 1
    assert "some held-out prompts (1) are also in training" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the data once"),
        (["--train", "a.jsonl"], "name the data once"),
        (["--recipe", "tiny", "--heldout", "a.jsonl"], "name the data once"),
        (["--train", "a.jsonl", "--heldout", "b.jsonl", "--samples", "4", "seed=1"], "name the data once"),
        (["--recipe", "tiny", "--delta", "5"], r"--delta 5.0: .* give 0 < delta < 1"),
        (["--recipe", "tiny", "--samples", "1"], r"--samples 1: .* at least 2 draws"),
    ],
)
def test_options_that_make_no_sense_are_an_error_message(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(["--model", "m", *arguments])


def test_a_head_without_a_posterior_is_refused(tiny_policy, world, tokenizer, tmp_path):
    model = save_model(tmp_path, tiny_policy, world, tokenizer, head="bt")
    with pytest.raises(CheckpointError, match=r"has a 'bt' head, and no posterior to bound"):
        run("--model", model, "--recipe", "tiny", *SMALL)


def test_pairs_of_a_renamed_objective_or_of_another_scale_are_refused(model, world, tmp_path):
    def train_on(change):
        pairs = [
            replace(pair, scores_chosen=change(pair.scores_chosen), scores_rejected=change(pair.scores_rejected))
            for pair in world.train_pairs()
        ]
        train, heldout = write_pairs(tmp_path / "t.jsonl", pairs), write_pairs(tmp_path / "h.jsonl", pairs[:2])
        run("--model", model, "--train", train, "--heldout", heldout, "--output", str(tmp_path / "report.json"))

    with pytest.raises(DataError, match=r"unknown objective 'helpful'.*Did you mean 'helpfulness'"):
        train_on(lambda scores: {"helpful": scores["helpfulness"]})
    with pytest.raises(DataError, match=r"t\.jsonl: the scores of 'helpfulness' .*on another scale"):
        train_on(lambda scores: {name: score / 5 for name, score in scores.items()})


def test_a_recipe_of_other_objectives_is_refused(model):
    with pytest.raises(ConfigError, match="it is not the recipe of this model"):
        run("--model", model, "--recipe", "tiny", "objectives=[helpfulness,honesty]")


def test_help_needs_no_torch_and_a_missing_model_is_an_error_message(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['job', '--help']\n"
        "try: runpy.run_path('jobs/pac_bayes.py', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("False False"), done.stderr
    with pytest.raises(CheckpointError, match=r"holds no reward_model\.json"):
        run("--model", str(tmp_path), "--recipe", "tiny", *SMALL)
