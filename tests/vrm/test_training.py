"""`vrm.train_reward_model`: own pairs, in one process."""

import json

import pytest

import vrm
from pipeline.errors import ConfigError, DataError
from pipeline.stages.workspace import MANIFEST_FILE

QUICK = [
    "reward.num_steps=3",
    "reward.batch_pairs=8",
    "reward.backbone_layers=null",
    "reward.backbone_dtype=float32",
    "logging=[]",
]
PROMPT = "how do I keep plants healthy"


def rows_of(world, *, with_scores):
    return [
        {"prompt": list(map(dict, pair.prompt)), "chosen": pair.chosen, "rejected": pair.rejected}
        | (
            {"scores_chosen": dict(pair.scores_chosen), "scores_rejected": dict(pair.scores_rejected)}
            if with_scores
            else {}
        )
        for pair in world.train_pairs()
    ]


@pytest.fixture(scope="module")
def trained(tiny_policy, world, tmp_path_factory):
    workspace = tmp_path_factory.mktemp("workspace")
    rows = rows_of(world, with_scores=True)
    return workspace, vrm.train_reward_model(rows, workspace, backbone=tiny_policy, overrides=QUICK, device="cpu")


def test_the_trained_model_lies_where_the_job_would_write_it(trained, world):
    workspace, model = trained
    [manifest] = workspace.glob(f"stages/train_reward_model-*/{MANIFEST_FILE}")
    assert model.directory == str(manifest.parent / "result")
    assert json.loads(manifest.read_text())["metrics"]["eval/accuracy"] >= 0.0
    assert set(model.description.objectives) == set(world.train_pairs()[0].scores_chosen)
    loaded = vrm.load_reward_model(workspace, device="cpu")
    assert loaded.score(PROMPT, ["yes", "no"]) == model.score(PROMPT, ["yes", "no"])


def test_the_same_pairs_are_not_trained_on_twice(trained, tiny_policy, world, tmp_path, capsys):
    workspace, model = trained
    rows = rows_of(world, with_scores=True)
    again = vrm.train_reward_model(rows, workspace, backbone=tiny_policy, overrides=QUICK, device="cpu")
    assert "finished before, skipped" in capsys.readouterr().out
    assert again.directory == model.directory


def test_a_file_of_pairs_without_scores_names_no_objective(tiny_policy, world, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(world, with_scores=False)))
    model = vrm.train_reward_model(file, tmp_path / "run", backbone=tiny_policy, overrides=QUICK, device="cpu")
    assert model.description.objectives[0] == "factor 1"
    assert not model.description.verified_objectives


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([], {}, DataError, "no pairs were given"),
        ([{"prompt": "hi", "chosen": object()}], {}, DataError, "cannot be written as JSON"),
        ([{"prompt": "hi", "chosen": "a"}], {}, DataError, "field 'rejected'"),
        ([{"prompt": "hi", "chosen": "a", "rejected": "b"}], {"objectives": ["one"]}, ConfigError, "at least 2"),
        (
            [{"prompt": "hi", "chosen": "a", "rejected": "b"}],
            {"overrides": ["reward.num_step=3"]},
            ConfigError,
            "did you mean reward.num_steps",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_a_model_is_loaded(tmp_path, pairs, options, error, message):
    with pytest.raises(error, match=message):
        vrm.train_reward_model(pairs, tmp_path, backbone="/nowhere", **options)
