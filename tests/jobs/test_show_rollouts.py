"""`vrm rollouts`: which rollouts of a workspace it shows, and what it says where there are none."""

import json

import pytest

from jobs.show_rollouts import kept_rollouts_of, show_rollouts_command
from pipeline.errors import ConfigError, WorkspaceError
from tests.rollouts.test_kept_rollouts import batch, files_in


def workspace_with(tmp_path, *fingerprints):
    (tmp_path / "stages" / "train_reward_model-000000000000").mkdir(parents=True)
    (tmp_path / "stages" / "align_policy-ffffffffffff").mkdir()  # a direct alignment, which samples nothing
    for fingerprint in fingerprints:
        files_in(tmp_path / "stages" / f"align_policy-{fingerprint}").keep(batch(4))
    return str(tmp_path)


def test_a_workspace_without_rollouts_is_said_with_the_setting_that_keeps_them(tmp_path):
    with pytest.raises(WorkspaceError, match=r"holds no kept rollouts.*alignment\.keep_rollouts is all or a share"):
        kept_rollouts_of(workspace_with(tmp_path), None)
    with pytest.raises(WorkspaceError, match="nowhere holds no kept rollouts"):
        kept_rollouts_of(str(tmp_path / "nowhere"), None)


def test_of_several_alignments_one_is_chosen_by_its_fingerprint(tmp_path):
    workspace = workspace_with(tmp_path, "aaaa00000000", "bbbb00000000")
    with pytest.raises(ConfigError, match="several alignments; choose one by --stage: aaaa00000000, bbbb00000000"):
        kept_rollouts_of(workspace, None)
    with pytest.raises(ConfigError, match="no single alignment with --stage cc; choose"):
        kept_rollouts_of(workspace, "cc")
    assert kept_rollouts_of(workspace, "bb") == f"{workspace}/stages/align_policy-bbbb00000000/rollouts"


def test_all_rollouts_go_to_a_file_one_a_line(tmp_path, capsys):
    workspace = workspace_with(tmp_path, "aaaa00000000")
    out = tmp_path / "rollouts.jsonl"
    show_rollouts_command([workspace, "--jsonl", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["step"], row["prompt_id"], row["contributions"]) for row in rows] == [
        (4, "a", {"help": 1.0, "safety": 1.5}),
        (4, "b", {"help": 1.0, "safety": 1.5}),
    ]
    assert capsys.readouterr().out == f"2 rollouts: {out}\n"


def test_a_file_in_a_directory_that_does_not_exist_is_refused_first(tmp_path):
    with pytest.raises(ConfigError, match=r"--jsonl .* its directory does not exist"):
        show_rollouts_command.options(["anywhere", "--jsonl", str(tmp_path / "no" / "file")])
