"""Under ZeRO-3 no rank ever holds a whole model: not while it loads one, not while it exports or publishes one."""

import gc
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from actors.deepspeed_learners import deepspeed_ppo_learner
from actors.rank_group import RankGroup
from pipeline.config.alignment import PPOConfig
from pipeline.config.cluster import RanksConfig
from pipeline.config.models import LoRAConfig
from pipeline.learning.builders import PPOLearnerSpec, build_ppo_learner, reference_in_process
from pipeline.learning.engine import TorchEngine
from pipeline.models.backbone import load_backbone, load_causal_lm, save_causal_lm
from pipeline.models.reward_model import load_reward_backbone
from pipeline.records import PromptGroup
from tests.support.allocations import peak_tensor_bytes
from tests.support.learners import ALIGNMENT, untrained_reward_model

pytestmark = pytest.mark.components

RANKS = 2
WIDTH, LAYERS, TOKENS = 128, 8, 512
LARGEST = 4 * TOKENS * WIDTH
"""Bytes of the largest tensor, the embedding; a layer of this shape is as large."""


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """A policy with tied embeddings in bfloat16, one in float32, and a reward model of the first one's decoder."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, tied, dtype in (("tied", True, torch.bfloat16), ("untied", False, torch.float32)):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=TOKENS,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            tie_word_embeddings=tied,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = Qwen3ForCausalLM(config).to(dtype)
        save_causal_lm(model.state_dict(), model.config, tokenizer, str(root / name))
    untrained_reward_model(str(root / "tied"), str(root / "reward"))
    return root


@pytest.fixture(scope="module")
def spec(checkpoints):
    """A policy and a critic of its own, both with adapters."""
    return PPOLearnerSpec(
        config=ALIGNMENT.model_copy(update={"ppo": PPOConfig(mini_batch_size=4, lora=LoRAConfig(rank=2))}),
        policy_uri=str(checkpoints / "untied"),
        reward_model_uri=str(checkpoints / "reward"),
        dtype="float32",
        probes=(PromptGroup(prompt_ids=(1, 2, 3), response_ids=((4, 5),)),),
        publish_directory=str(checkpoints / "published"),
        seed=0,
    )


@pytest.fixture(scope="module")
def group(local_ray, spec):
    ranks = RanksConfig(ranks=RANKS, cpus_per_rank=1, zero_stage=3)
    with RankGroup("test ranks", ranks, start_s=240) as group:
        group.build(deepspeed_ppo_learner, spec, ranks)
        yield group


def on_every_rank(group, work, *arguments):
    """`work(rank, *arguments)` on each, all at once; what each returned."""
    return group.all(lambda rank: rank.__ray_call__.remote(work, *arguments), doing="testing", deadline_s=240)


def load(rank, way, directory):
    """Runs on every rank: the peak while a model is loaded, its largest tensor afterwards, and this rank's part."""
    from actors.deepspeed_engine import ZeroShards

    shards, loaded = ZeroShards(rank._device), SimpleNamespace()

    def loading():
        match way:
            case "policy":
                loaded.model = load_causal_lm(directory, dtype="float32", shards=shards)[0]
            case "reference":
                loaded.model = load_causal_lm(directory, dtype="bfloat16", shards=shards)[0]
            case "first layers":
                loaded.model = load_backbone(directory, dtype="float32", num_layers=LAYERS // 2, shards=shards)
            case "critic":
                loaded.model = load_reward_backbone(directory, shards=shards)

    gc.collect()  # what becomes free of an earlier model would count as memory given back
    peak = peak_tensor_bytes(loading)
    parameters = dict(loaded.model.named_parameters(remove_duplicate=False))
    return {
        "peak": peak,
        "whole": [name for name, parameter in parameters.items() if parameter.numel() > 0],
        "shapes": {name: tuple(parameter.ds_shape) for name, parameter in parameters.items()},
        "part": {name: parameter.ds_tensor.clone() for name, parameter in parameters.items()},
        "shard": sum(p.ds_tensor.nbytes for p in {id(p): p for p in parameters.values()}.values()),
    }


@pytest.mark.parametrize(
    ("way", "source", "prefix"),
    [
        ("policy", "tied", ""),
        ("policy", "untied", ""),
        ("reference", "untied", ""),
        ("first layers", "untied", "model."),
        ("critic", "reward", "backbone."),
    ],
)
def test_a_rank_holds_its_part_and_one_parameter_while_it_loads_a_model(way, source, prefix, group, checkpoints):
    results = on_every_rank(group, load, way, str(checkpoints / source))
    file = load_file(checkpoints / source / "model.safetensors")
    for result in results:
        assert not result["whole"]
        # The parameter, what is read of its file at a time, and activations of a few tokens.
        assert result["shard"] < result["peak"] < result["shard"] + 2.5 * LARGEST
    for name, shape in results[0]["shapes"].items():
        stored = file["model.embed_tokens.weight" if (source, name) == ("tied", "lm_head.weight") else prefix + name]
        whole = torch.cat([result["part"][name] for result in results])
        assert torch.equal(whole[: stored.numel()].view(shape), stored.to(whole.dtype)), name


def test_ranks_split_the_experts_of_a_mixture_while_they_load_them(group, tokenizer, tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        moe_intermediate_size=WIDTH // 2,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    assert max(parameter.nbytes for parameter in model.parameters()) == LARGEST  # the experts of a layer, together
    save_causal_lm(model.state_dict(), config, tokenizer, str(tmp_path))
    results = on_every_rank(group, load, "policy", str(tmp_path))
    for result in results:
        assert not result["whole"]
        # To compute, a layer's experts are gathered together: gates and inputs as above, and half as many of outputs.
        assert result["shard"] < result["peak"] < result["shard"] + 3 * LARGEST
    for name, tensor in model.state_dict().items():
        whole = torch.cat([result["part"][name] for result in results])
        assert torch.equal(whole[: tensor.numel()].view_as(tensor), tensor), name


def tensors(rank):
    """Runs on every rank: all that it and the others hold, by name."""
    return {name: tensor.clone() for name, tensor in rank._learner.engine.stream().tensors}


def test_ranks_start_from_the_numbers_of_one_process(group, spec):
    alone = dict(build_ppo_learner(spec, TorchEngine, reference_in_process("float32", "cpu")).engine.stream().tensors)
    assert any("lora_A" in name for name in alone)
    for ranks in on_every_rank(group, tensors):
        assert ranks.keys() == alone.keys()
        assert all(torch.equal(ranks[name], alone[name]) for name in alone)


def autocast_of_deepspeed(rank):
    """Runs on every rank: whether products inside are cast, and whether the casts of weights outlive them."""
    from deepspeed.runtime.torch_autocast import autocast_if_enabled

    engine = SimpleNamespace(torch_autocast_enabled=lambda: True, torch_autocast_dtype=lambda: torch.bfloat16)
    with autocast_if_enabled(engine):
        return torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()


def test_no_rank_keeps_the_casts_of_weights_until_the_forward_pass_ends(group):
    assert on_every_rank(group, autocast_of_deepspeed) == [(True, False)] * RANKS


def export(rank, directory):
    """Runs on every rank: the most bytes that tensors took beyond those that the rank has all the time."""
    gc.collect()
    return peak_tensor_bytes(lambda: rank._learner.export(directory))


def test_a_policy_is_exported_tensor_by_tensor(group, checkpoints, tmp_path):
    for peak in on_every_rank(group, export, str(tmp_path)):
        # The head, its sum with the adapters, and what of others is not free yet; the policy is 14 times LARGEST.
        assert 0 < peak < 4 * LARGEST
    exported, start = (load_file(f"{place}/model.safetensors") for place in (tmp_path, checkpoints / "untied"))
    assert exported.keys() == start.keys()
    assert all(torch.equal(exported[name], start[name]) for name in start)  # adapters start at nothing
