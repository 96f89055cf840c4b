"""The states that a head reads: which layer, which tokens, and that they are computed once and found again."""

import json
import shutil

import pytest
import torch

from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.backbone import keep_first_layers, load_backbone
from pipeline.models.frozen_states import (
    FrozenStates,
    StatesSpec,
    compute_states,
    load_frozen_backbone,
    write_states,
)
from pipeline.models.packing import pack, packed_states, prompt_and_response_states
from pipeline.models.reward_model import RewardModel, load_reward_model, make_head
from pipeline.records import PromptGroup
from tests.models.test_reward_model import HEAD, card, saved

PAIR = PromptGroup(prompt_ids=(5, 6, 7), response_ids=((8, 9, 10), (11, 12)))
OTHER = PromptGroup(prompt_ids=(5, 6), response_ids=((8, 9), (11, 12), (8, 9), (13,)))


def spec(backbone, **changes):
    return StatesSpec(**({"backbone": backbone, "dtype": "float32", "layers": None, "pooling": "last"} | changes))


def test_the_mean_state_is_that_of_each_responses_own_tokens(tiny_policy):
    model = RewardModel(load_backbone(tiny_policy, dtype="float32"), make_head("bt", 64, 4, HEAD), "mean").eval()
    prompts, responses = model.encode(pack([PAIR, OTHER]))
    with torch.no_grad():
        alone = packed_states(model.backbone, pack([PromptGroup(prompt_ids=(5, 6), response_ids=((11, 12),))]))
    assert torch.allclose(responses[3], alone[2:].mean(0), atol=1e-5)  # the second of every group is behind the first
    assert torch.allclose(prompts[3], alone[1], atol=1e-5)


def test_the_first_layers_are_the_model_up_to_there(tiny_policy):
    whole = load_backbone(tiny_policy, dtype="float32")
    first = load_backbone(tiny_policy, dtype="float32")
    keep_first_layers(first, 1)
    tokens = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        after_one = whole(tokens, output_hidden_states=True).hidden_states[1]
        assert torch.allclose(first(tokens).last_hidden_state, whole.norm(after_one), atol=1e-6)
    assert first.config.num_hidden_layers == 1
    keep_first_layers(whole, None)
    assert len(whole.layers) == 2
    with pytest.raises(ConfigError, match=r"reward\.backbone_layers = 3, but the backbone has 2 layers"):
        keep_first_layers(whole, 3)


def test_a_checkpoint_remembers_its_layers_and_its_pooling(tiny_policy, tokenizer, world, tmp_path):
    backbone = load_backbone(tiny_policy, dtype="float32")
    keep_first_layers(backbone, 1)
    model = RewardModel(backbone, make_head("bt", 64, 4, HEAD), "mean").eval()
    described = card("bt").model_copy(update={"pooling": "mean"})
    loaded, _, loaded_card = load_reward_model(saved(model, tokenizer, described, tmp_path))
    prompt, responses = [world.heldout_prompts[0].messages] * 2, ["do check", "do not check ."]
    scores = [
        [score.mean for score in RewardModelScorer(m, tokenizer, c, max_tokens_per_batch=100).score(prompt, responses)]
        for m, c in ((model, described), (loaded, loaded_card), (loaded, card("bt")))
    ]
    assert scores[0] == scores[1]
    assert loaded.pooling == "mean"
    written = json.loads((tmp_path / "config.json").read_text())["backbone"]
    assert (written["num_hidden_layers"], len(loaded.backbone.layers)) == (1, 1)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_states_are_those_of_training(tiny_policy, tmp_path, pooling, dtype):
    wanted = spec(tiny_policy, pooling=pooling, dtype=dtype, layers=1)
    missing = FrozenStates({}).missing([PAIR, OTHER])
    assert [len(group.response_ids) for group in missing] == [2, 3]  # one of the five stands twice
    computed = compute_states(load_frozen_backbone(wanted, device="cpu"), missing, wanted, most_responses=2)
    write_states(computed, str(tmp_path))
    kept = FrozenStates.read(str(tmp_path))
    assert len(kept) == 5
    assert kept.missing([PAIR, OTHER]) == []
    backbone = load_backbone(tiny_policy, dtype="float32")
    keep_first_layers(backbone, 1)
    model = RewardModel(backbone, make_head("bt", 64, 4, HEAD), pooling).eval()
    packed = pack([PAIR, OTHER])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        as_trained = prompt_and_response_states(packed_states(model.backbone, packed), packed, pooling)
    model.frozen_states = kept
    for found, state in zip(model.encode(packed), as_trained, strict=True):
        torch.testing.assert_close(found, state.float(), atol=1e-5 if dtype == "float32" else 3e-2, rtol=1e-2)


def test_states_are_named_by_what_the_weights_are_and_not_by_where_they_lie(tiny_policy, tmp_path):
    moved = shutil.copytree(tiny_policy, tmp_path / "moved")
    key = spec(tiny_policy).key
    assert spec(str(moved)).key == key
    others = [spec(tiny_policy, **change) for change in ({"dtype": "bfloat16"}, {"layers": 1}, {"pooling": "mean"})]
    assert len({key, *(other.key for other in others)}) == 4
    changed = shutil.copytree(tiny_policy, tmp_path / "changed")
    weights = changed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert spec(str(changed)).key != key


def test_a_damaged_file_is_named(tiny_policy, tmp_path):
    wanted = spec(tiny_policy)
    write_states(compute_states(load_frozen_backbone(wanted, device="cpu"), [PAIR], wanted), str(tmp_path))
    [damaged] = tmp_path.glob("*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot be read.*Delete it to compute it again"):
        FrozenStates.read(str(tmp_path))
