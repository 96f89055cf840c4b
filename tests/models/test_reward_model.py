import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from pipeline.config.schema import VRMHeadConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.learning.reward_scorer import RewardModelScorer
from pipeline.models.backbone import load_backbone, load_config, require_context, train_only_last_layers
from pipeline.models.packing import pack
from pipeline.models.reward_heads import BradleyTerryHead, RewardOutput, VRMHead
from pipeline.models.reward_model import RewardModel, RewardModelCard, load_reward_model, save_reward_model
from pipeline.objectives.variational import dirichlet_kl
from pipeline.records import PromptGroup

HEAD = VRMHeadConfig(semantic_dims=6, hidden_size=32)


def vrm(tiny_policy, seed=0):
    torch.manual_seed(seed)
    backbone = load_backbone(tiny_policy, dtype="float32")
    return RewardModel(backbone, VRMHead(backbone.config.hidden_size, 4, HEAD))


def card(head="vrm"):
    return RewardModelCard(
        head=head,
        vrm=HEAD,
        objectives=("helpfulness", "honesty", "safety", "brevity"),
        max_length=64,
        score_mean=(),
        score_std=(),
        reward_mean=0.5,
        reward_std=2.0,
        metrics={},
    )


def test_the_head_starts_at_its_priors():
    head = VRMHead(8, 4, HEAD)
    output = head(torch.randn(3, 8), torch.randn(3, 8), None)
    torch.testing.assert_close(output.alpha, torch.ones(3, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dirichlet_kl(output.alpha, torch.ones(4)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logvar, torch.full((3, 6), -2.0), atol=1e-4, rtol=0)


def test_the_mean_reward_is_the_sum_of_its_contributions():
    torch.manual_seed(0)
    output = VRMHead(8, 4, HEAD)(torch.randn(5, 8), torch.randn(5, 8), None)
    weights = output.alpha / output.alpha.sum(-1, keepdim=True)
    torch.testing.assert_close(output.mean, (weights * output.scores).sum(-1))


def test_heads_stay_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for head in (VRMHead(8, 4, HEAD), BradleyTerryHead(8)):
            output = head(torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.tensor([1, 2]))
            assert {t.dtype for t in output} == {torch.float32}


def test_both_rows_of_a_pair_share_one_draw_of_the_weights():
    torch.manual_seed(0)
    noiseless = VRMHeadConfig(semantic_dims=6, hidden_size=32, logvar_min=-60.0, initial_logvar=-59.0)
    head = VRMHead(8, 4, noiseless)
    h = torch.randn(1, 8)
    output = head(torch.cat([h, h]), torch.cat([h, h]), torch.tensor([5]))
    # Equal states and noiseless features: only a shared w makes the two rewards agree.
    torch.testing.assert_close(output.sampled[0], output.sampled[1])
    assert abs(output.sampled[0] - output.mean[0]) > 1e-3


def test_alpha_is_the_same_from_the_chosen_and_the_rejected_row(tiny_policy, world, tokenizer):
    model = vrm(tiny_policy).eval()
    with torch.no_grad():
        torch.nn.init.normal_(model.head.weight_head.output.weight)
        pair = PromptGroup(prompt_ids=(7, 8, 9), response_ids=((20, 21), (40, 41, 42, 43)))
        output = RewardOutput(*model(pack([pair])))
    torch.testing.assert_close(output.alpha[0], output.alpha[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output.mu[0], output.mu[1], atol=1e-3)


def test_a_score_does_not_depend_on_its_batch(tiny_policy, tokenizer, world, tmp_path):
    model = vrm(tiny_policy)
    scorer = RewardModelScorer(model.eval(), tokenizer, card(), max_tokens_per_batch=100)
    pairs = world.heldout_pairs()
    prompts, responses = [p.prompt for p in pairs], [p.chosen for p in pairs]
    together = scorer.score(prompts, responses)
    alone = [scorer.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert a.mean == pytest.approx(b.mean, abs=1e-4)
        assert a.std == pytest.approx(b.std, abs=1e-4)


def test_thinking_is_not_scored(tiny_policy, tokenizer, world):
    scorer = RewardModelScorer(vrm(tiny_policy).eval(), tokenizer, card(), max_tokens_per_batch=100)
    prompt = world.heldout_prompts[0].messages
    plain, thought = scorer.score([prompt, prompt], ["do check", "<think>hm hm</think>\ndo check"])
    assert plain == thought


def test_an_over_long_response_is_still_scored_at_the_end_of_its_turn(tiny_policy, tokenizer, world):
    scorer = RewardModelScorer(vrm(tiny_policy).eval(), tokenizer, card(), max_tokens_per_batch=100)
    prompt, response = scorer._encode(world.heldout_prompts[0].messages, "do check " * 200)
    assert len(prompt) + len(response) == card().max_length
    assert response[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("head", ["vrm", "bt"])
def test_a_checkpoint_round_trips(head, tiny_policy, tokenizer, world, tmp_path):
    torch.manual_seed(0)
    backbone = load_backbone(tiny_policy, dtype="float32")
    module = VRMHead(64, 4, HEAD) if head == "vrm" else BradleyTerryHead(64)
    model = RewardModel(backbone, module).eval()
    save_reward_model(
        str(tmp_path),
        state_dict=model.state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=card(head),
    )
    loaded, loaded_tokenizer, loaded_card = load_reward_model(str(tmp_path))
    assert loaded_card == card(head)
    prompt = [world.heldout_prompts[0].messages]
    before = RewardModelScorer(model, tokenizer, card(head), max_tokens_per_batch=100).score(prompt, ["do check"])
    after = RewardModelScorer(loaded, loaded_tokenizer, loaded_card, max_tokens_per_batch=100).score(
        prompt, ["do check"]
    )
    assert before == after
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))


def test_a_checkpoint_of_another_architecture_is_refused(tiny_policy, tokenizer, tmp_path):
    model = vrm(tiny_policy)
    save_reward_model(
        str(tmp_path),
        state_dict=model.state_dict(),
        backbone_config=model.backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=card(),
    )
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load_reward_model(str(tmp_path))


def test_a_directory_that_is_no_reward_model_is_refused(tiny_policy):
    with pytest.raises(CheckpointError, match=r"holds no reward_model\.json"):
        load_reward_model(tiny_policy)


def test_an_encoder_is_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "distilbert"}))
    with pytest.raises(CheckpointError, match="not a causal decoder"):
        load_config(str(tmp_path))


def test_a_llama_backbone_works_too():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = RewardModel(LlamaModel(config), VRMHead(32, 4, HEAD))
    output = RewardOutput(*model(pack([PromptGroup(prompt_ids=(1, 1), response_ids=((1, 1, 1, 1), (1, 1)))])))
    assert output.mean.shape == (2,)
    assert math.isfinite(output.mean.sum().item())


def test_only_the_last_layers_train_when_asked(tiny_policy):
    backbone = load_backbone(tiny_policy, dtype="float32")
    train_only_last_layers(backbone, 1)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in backbone.named_parameters() if n.startswith(("layers.1.", "norm."))}
    train_only_last_layers(backbone, 0)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_a_recipe_longer_than_the_context_is_refused(tiny_policy):
    require_context(tiny_policy, 128, "alignment")
    with pytest.raises(ConfigError, match="= 129 exceeds the model's context of 128"):
        require_context(tiny_policy, 129, "alignment")
