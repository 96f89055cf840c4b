"""Models filled parameter by parameter equal those that transformers loads whole."""

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import CheckpointError
from pipeline.models.backbone import load_backbone, load_causal_lm, write_causal_lm
from pipeline.models.packing import ATTENTION
from pipeline.models.reward_model import load_reward_backbone, load_reward_model
from pipeline.models.sharded_loading import WeightFiles, sources_of
from pipeline.models.tensor_stream import TensorStream
from tests.support.learners import untrained_reward_model


class OneRank:
    """Shards of a single rank: every parameter stays whole, and is kept as it was when it was split."""

    device = torch.device("cpu")
    reads = True

    def __init__(self):
        self.split_parameters = []

    def split(self, parameter):
        self.split_parameters.append(parameter.detach().clone())
        parameter.data = parameter.detach().clone()

    def gathering(self, model):
        return nullcontext()


def assert_equal_models(model, other):
    assert model.config.to_dict() == other.config.to_dict()
    assert not model.training
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in other.named_modules()
    }
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert not any(tensor.is_meta for tensor in model.buffers())
    for buffer, same in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, same)
    assert model.config._attn_implementation == ATTENTION


@pytest.fixture
def tied_policy(tiny_policy, tmp_path):
    """The tiny policy with one matrix for embedding and head, in bfloat16 and in two files."""
    directory = tmp_path / "tied"
    model, tokenizer = load_causal_lm(tiny_policy, dtype="bfloat16")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(directory, max_shard_size="50KB")
    tokenizer.save_pretrained(directory)
    assert (directory / "model.safetensors.index.json").is_file()
    return str(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_filled_parameter_by_parameter_equals_the_whole_one(dtype, tiny_policy):
    shards = OneRank()
    policy, tokenizer = load_causal_lm(tiny_policy, dtype=dtype, shards=shards)
    whole, same_tokenizer = load_causal_lm(tiny_policy, dtype=dtype)
    whole.set_attn_implementation(ATTENTION)
    assert_equal_models(policy, whole)
    assert tokenizer.get_vocab() == same_tokenizer.get_vocab()
    assert len(shards.split_parameters) == len(list(policy.parameters()))
    for split, parameter in zip(shards.split_parameters, policy.parameters(), strict=True):
        assert torch.equal(split, parameter)  # it was whole before it was split


def test_tied_embeddings_are_read_once_and_stay_tied(tied_policy):
    shards = OneRank()
    policy, _ = load_causal_lm(tied_policy, dtype="float32", shards=shards)
    whole, _ = load_causal_lm(tied_policy, dtype="float32")
    whole.set_attn_implementation(ATTENTION)
    assert_equal_models(policy, whole)
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight
    assert len(shards.split_parameters) == len(whole.state_dict()) - 1


def test_a_backbone_is_read_from_a_language_model_and_only_the_layers_that_it_keeps(tiny_policy):
    shards = OneRank()
    backbone = load_backbone(tiny_policy, dtype="float32", num_layers=1, shards=shards)
    whole = load_backbone(tiny_policy, dtype="float32", num_layers=1)
    whole.set_attn_implementation(ATTENTION)
    assert_equal_models(backbone, whole)
    assert len(shards.split_parameters) == len(list(whole.parameters()))
    assert len(backbone.layers) == 1


def test_a_critic_starts_from_the_backbone_of_a_reward_model(tiny_policy, tmp_path):
    untrained_reward_model(tiny_policy, str(tmp_path))
    whole = load_reward_model(str(tmp_path))[0].backbone
    shards = OneRank()
    assert_equal_models(load_reward_backbone(str(tmp_path), shards=shards), whole)
    assert len(shards.split_parameters) == len(list(whole.parameters()))
    state = load_file(tmp_path / "model.safetensors")
    del state["backbone.norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit .*it lacks 1 tensors, backbone.norm.weight first"):
        load_reward_backbone(str(tmp_path), shards=OneRank())


def test_weights_that_do_not_fit_are_refused_before_any_is_read(tied_policy, tmp_path):
    shards = OneRank()
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    wider = config | {"intermediate_size": 2 * config["intermediate_size"]}
    (tmp_path / "tied" / "config.json").write_text(json.dumps(wider))
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*mlp.*has the shape .*the architecture asks for"):
        load_causal_lm(tied_policy, dtype="float32", shards=shards)
    deeper = config | {"num_hidden_layers": config["num_hidden_layers"] + 1, "layer_types": None}
    (tmp_path / "tied" / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(CheckpointError, match=r"lacks 11 of the tensors its config.json asks for"):
        load_causal_lm(tied_policy, dtype="float32", shards=shards)
    (tmp_path / "tied" / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*safetensors"):
        load_causal_lm(tied_policy, dtype="float32", shards=shards)
    assert not shards.split_parameters


def test_a_tensor_is_read_in_pieces_into_any_dtype(tmp_path, monkeypatch):
    from pipeline.models import sharded_loading

    monkeypatch.setattr(sharded_loading, "PIECE_NUMBERS", 8)
    tensors = {"matrix": torch.arange(30.0).view(10, 3), "vector": torch.arange(20.0), "scalar": torch.tensor(3.0)}
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "file")
    with WeightFiles([str(tmp_path / "file")]) as files:
        for name, expected in tensors.items():
            target = torch.empty(files.shape(name))
            files.read(name, target)
            assert torch.equal(target, expected)


MIXTURE = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts_per_tok": 2,
}
EXPERTS = 11
"""The tenth's name comes before the second's."""


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def mixture(request, tokenizer, tmp_path):
    """A random mixture of experts, and the directory that transformers wrote it to."""
    kind = {"num_experts": EXPERTS, "moe_intermediate_size": 16}
    kind = kind if request.param == "qwen3_moe" else {"num_local_experts": EXPERTS}
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), **MIXTURE, **kind)
    config.eos_token_id = tokenizer.eos_token_id
    made = AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return made, tmp_path


def test_the_experts_of_a_mixture_are_read_into_the_tensor_that_the_model_has(mixture):
    made, directory = mixture
    # transformers keeps the experts of a layer in one tensor, and files each for itself.
    assert any(f".experts.{EXPERTS - 1}." in name for name in load_file(directory / "model.safetensors"))
    shards = OneRank()
    policy, _ = load_causal_lm(str(directory), dtype="bfloat16", shards=shards)
    whole, _ = load_causal_lm(str(directory), dtype="bfloat16")
    whole.set_attn_implementation(ATTENTION)
    assert_equal_models(policy, whole)
    assert len(shards.split_parameters) == len(list(made.parameters()))
    assert_equal_models(
        load_backbone(str(directory), dtype="float32", num_layers=1, shards=OneRank()),
        _packed(load_backbone(str(directory), dtype="float32", num_layers=1)),
    )


def _packed(model):
    model.set_attn_implementation(ATTENTION)
    return model


def test_a_mixture_is_written_tensor_by_tensor_as_transformers_writes_it(mixture, tokenizer, tmp_path):
    made, directory = mixture
    seen = []

    def one_by_one():
        for name, tensor in made.state_dict().items():
            seen.append((name, (tmp_path / "ours" / "model.safetensors").exists()))
            yield name, tensor

    (tmp_path / "ours").mkdir()
    stream = TensorStream(outline=TensorStream.of(made.state_dict()).outline, tensors=one_by_one())
    write_causal_lm(stream, made.config, tokenizer, str(tmp_path / "ours"))
    ours, theirs = (load_file(place / "model.safetensors") for place in (tmp_path / "ours", directory))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert seen[-1][1], "the file was begun before the last tensor came"


def test_a_mixture_that_lacks_an_expert_is_refused_before_any_is_read(mixture):
    _, directory = mixture
    state = load_file(directory / "model.safetensors")
    save_file({name: t for name, t in state.items() if ".experts.3." not in name}, directory / "model.safetensors")
    shards = OneRank()
    with pytest.raises(CheckpointError, match=rf"cannot be loaded: .* the architecture has {EXPERTS} experts"):
        load_causal_lm(str(directory), dtype="float32", shards=shards)
    assert not shards.split_parameters


def test_what_transformers_computes_from_several_tensors_is_loaded_and_saved_whole(tokenizer, tmp_path):
    config = AutoConfig.for_model("hrm_text", vocab_size=len(tokenizer), **MIXTURE)
    made = AutoModelForCausalLM.from_config(config)
    write_causal_lm(TensorStream.of(made.state_dict()), made.config, tokenizer, str(tmp_path))
    written = load_file(tmp_path / "model.safetensors")
    assert "model.L_module.layers.0.mlp.gate_up_proj.weight" in written  # two matrices of the model
    assert sources_of(made, list(written)) is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.state_dict().items())
