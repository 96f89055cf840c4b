import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from pipeline.config.reward import EnsembleConfig, VRMHeadConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation.conversation_tokens import ConversationEncoder
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.backbone import load_backbone, load_config, require_context, train_only_last_layers
from pipeline.models.packing import pack
from pipeline.models.reward_heads import (
    SCALE_SPEED,
    BradleyTerryHead,
    EnsembleHead,
    GateHead,
    RegressionHead,
    RewardOutput,
    VRMHead,
    mean_and_concentration,
)
from pipeline.models.reward_model import RewardModel, RewardModelCard, load_reward_model, make_head, save_reward_model
from pipeline.objectives.variational import dirichlet_kl
from pipeline.records import PromptGroup

PAPER = VRMHeadConfig(
    weight_param="softplus", prior_alpha=1.0, initial_logvar=-2.0, learned_scale=False, semantic_dims=6, hidden_size=32
)
HEAD = PAPER.model_copy(update={"learned_scale": True})
HADAMARD = HEAD.model_copy(update={"decoder": "hadamard", "semantic_dims": 4})
MLP = HEAD.model_copy(update={"decoder": "mlp", "decoder_hidden_size": 16})
FILM = HEAD.model_copy(update={"decoder": "film", "decoder_hidden_size": 16})
MEAN_CONC = HEAD.model_copy(update={"weight_param": "mean_conc"})


def vrm(tiny_policy, seed=0, config=HEAD):
    torch.manual_seed(seed)
    backbone = load_backbone(tiny_policy, dtype="float32")
    return RewardModel(backbone, VRMHead(backbone.config.hidden_size, 4, config))


def card(head="vrm", config=HEAD):
    return RewardModelCard(
        head=head,
        vrm=config,
        objectives=("helpfulness", "honesty", "safety", "brevity"),
        max_length=64,
        score_mean=(),
        score_std=(),
        reward_mean=0.5,
        reward_std=2.0,
        metrics={},
    )


@pytest.mark.parametrize("config", [HEAD, MEAN_CONC], ids=["softplus", "mean_conc"])
def test_the_head_starts_at_its_priors(config):
    head = VRMHead(8, 4, config)
    output = head(torch.randn(3, 8), torch.randn(3, 8), None)
    torch.testing.assert_close(output.alpha, torch.ones(3, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dirichlet_kl(output.alpha, torch.ones(4)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logvar, torch.full((3, 6), -2.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [HEAD, HADAMARD], ids=["bilinear", "hadamard"])
def test_the_mean_reward_is_the_sum_of_its_contributions(config):
    torch.manual_seed(0)
    output = VRMHead(8, 4, config)(torch.randn(5, 8), torch.randn(5, 8), None)
    torch.testing.assert_close(output.weights, output.alpha / output.alpha.sum(-1, keepdim=True))
    torch.testing.assert_close(output.mean, (output.weights * output.scores).sum(-1))


def test_hadamard_is_bilinear_with_the_identity():
    torch.manual_seed(0)
    hadamard, bilinear = (VRMHead(8, 4, HADAMARD.model_copy(update={"decoder": d})) for d in ("hadamard", "bilinear"))
    bilinear.load_state_dict({**hadamard.state_dict(), "score_matrix": torch.eye(4)})
    torch.nn.init.normal_(hadamard.weight_head.output.weight)
    bilinear.weight_head.load_state_dict(hadamard.weight_head.state_dict())
    inputs = torch.randn(4, 8), torch.randn(4, 8), torch.tensor([3, 4])
    for ours, theirs in zip(hadamard(*inputs), bilinear(*inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("config", [MLP, FILM], ids=["mlp", "film"])
def test_the_mean_of_a_network_is_that_of_its_samples(config):
    torch.manual_seed(0)
    head, precise = VRMHead(8, 4, config), VRMHead(8, 4, config.model_copy(update={"inference_draws": 50_000}))
    with torch.no_grad():
        for parameter in head.decoder.parameters():
            parameter.mul_(3.0)  # else the network is nearly linear, and its mean the network of the means
        precise.load_state_dict(head.state_dict())
        prompt, response, n = torch.randn(1, 8), torch.randn(1, 8), 4000
        output = precise(prompt, response, None)
        sampled = head(prompt.expand(2 * n, 8), response.expand(2 * n, 8), torch.arange(n)).sampled[:n]
        at_the_means = head.decode(output.weights, output.mu)
    tolerance = 4 * sampled.std().item() * math.sqrt(1 / n + 1 / 50_000)
    assert output.mean.item() == pytest.approx(sampled.mean().item(), abs=tolerance)
    assert output.variance.item() == pytest.approx(sampled.var().item(), rel=0.1)
    assert abs(at_the_means.item() - output.mean.item()) > tolerance
    assert output.scores.shape == (1, 0)


@pytest.mark.parametrize(
    "config", [HEAD, HADAMARD, MLP, FILM, MEAN_CONC], ids=lambda c: f"{c.decoder}-{c.weight_param}"
)
def test_the_loss_of_a_pair_reaches_every_parameter_of_the_head(config):
    torch.manual_seed(0)
    head = VRMHead(8, 4, config)
    torch.nn.init.normal_(head.weight_head.output.weight)
    output = head(torch.randn(6, 8), torch.randn(6, 8), torch.tensor([1, 2, 3]))
    (output.sampled[:3] - output.sampled[3:]).sigmoid().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_mean_of_the_weights_is_apart_from_their_concentration():
    u = torch.tensor([[1.0, 0.0, -1.0, 2.0, v] for v in (-3.0, 0.0, 5.0)])
    alpha = mean_and_concentration(u, low=0.05, high=1000.0)
    w_bar = alpha / alpha.sum(-1, keepdim=True)
    torch.testing.assert_close(w_bar, torch.softmax(u[:, :4], dim=-1), atol=0.01, rtol=0)
    # A / K = f + bounded softplus from .049: .05 + ln(1 + e^v), and far from the upper bound
    expected = [0.05 + math.log1p(math.exp(v)) for v in (-3.0, 0.0, 5.0)]
    torch.testing.assert_close(alpha.mean(-1), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_certain_mean_keeps_the_divergence_finite():
    u = torch.tensor([[400.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1e6]], requires_grad=True)
    alpha = mean_and_concentration(u, low=0.05, high=1000.0)
    assert alpha.min().item() >= 0.05 / 50
    assert alpha.mean(-1).max().item() <= 1000.001
    kl = dirichlet_kl(alpha, torch.ones(4))
    kl.sum().backward()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(u.grad).all()


def test_heads_stay_float32_under_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for head in (VRMHead(8, 4, HEAD), VRMHead(8, 4, MLP), VRMHead(8, 4, FILM), BradleyTerryHead(8)):
            output = head(torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.tensor([1, 2]))
            assert {t.dtype for t in output} == {torch.float32}


def test_a_gate_is_the_vrm_head_without_its_posterior():
    torch.manual_seed(0)
    gate, posterior = GateHead(8, 4, HEAD), VRMHead(8, 4, HEAD)
    with torch.no_grad():
        torch.nn.init.normal_(gate.weight_head.output.weight)
        posterior.score_matrix.copy_(gate.score_matrix)
        posterior.feature_head.hidden.load_state_dict(gate.feature_head.hidden.state_dict())
        posterior.feature_head.output.weight[:6] = gate.feature_head.output.weight
    h = torch.randn(4, 8), torch.randn(4, 8)
    output, seeded = gate(*h, None), gate(*h, torch.tensor([1, 2]))
    torch.testing.assert_close(output.scores, posterior(*h, None).scores)
    torch.testing.assert_close(output.weights, torch.softmax(gate.weight_head(h[0]), dim=-1))
    torch.testing.assert_close(output.mean, (output.weights * output.scores).sum(-1))
    assert all(torch.equal(a, b) for a, b in zip(output, seeded, strict=True))  # nothing to sample
    assert output.variance.tolist() == [0.0] * 4


def test_a_regression_head_weighs_its_scores_as_told_and_equally_when_not():
    for given, expected in (((1.0, 0.0, 0.5, -0.25), (1.0, 0.0, 0.5, -0.25)), ((), (0.25,) * 4)):
        head = RegressionHead(8, 4, given)
        torch.nn.init.normal_(head.linear.weight)
        output = head(torch.randn(3, 8), torch.randn(3, 8), None)
        assert output.weights[1].tolist() == list(expected)
        torch.testing.assert_close(output.mean, output.scores @ torch.tensor(expected))


def test_an_ensemble_combines_its_members_and_trains_the_one_that_is_drawn():
    """Two responses, three members with rewards 1, 2, 6 and 0, 3, 3."""
    head = EnsembleHead(2, EnsembleConfig(members=3))
    with torch.no_grad():
        head.linear.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 3.0], [6.0, 3.0]]))
    responses = torch.eye(2)
    output = head(responses, responses, torch.tensor([7]))  # 7 mod 3: member 1, for both rows
    assert output.mean.tolist() == [3.0, 2.0]
    assert output.variance.tolist() == pytest.approx([14 / 3, 2.0])
    assert output.sampled.tolist() == [2.0, 3.0]
    output.sampled.sum().backward()
    assert head.linear.weight.grad.abs().sum(1).tolist() == [0.0, 2.0, 0.0]
    head.reward = "min"
    assert head(responses, responses, None).sampled.tolist() == [1.0, 0.0]


def test_the_members_of_an_ensemble_start_apart_and_their_mean_loss_is_the_expected_one():
    torch.manual_seed(0)
    head = EnsembleHead(4, EnsembleConfig(members=2))
    states = torch.randn(6, 4)
    members = states @ head.linear.weight.T
    assert (members[:, 0] - members[:, 1]).abs().min() > 1e-3

    def loss(seed):
        sampled = head(states, states, torch.tensor([seed] * 3)).sampled
        return torch.nn.functional.softplus(sampled[3:] - sampled[:3]).mean()

    each = torch.nn.functional.softplus(members[3:] - members[:3]).mean(0)
    assert (loss(0) + loss(1)).item() == pytest.approx(each.sum().item(), abs=1e-6)


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


@pytest.mark.parametrize("config", [HEAD, MLP, FILM], ids=lambda c: c.decoder)
def test_a_score_does_not_depend_on_its_batch(config, tiny_policy, tokenizer, world):
    model = vrm(tiny_policy, config=config)
    scorer = RewardModelScorer(model.eval(), tokenizer, card(), max_tokens_per_batch=100)
    pairs = world.heldout_pairs()
    prompts, responses = [p.prompt for p in pairs], [p.chosen for p in pairs]
    together = scorer.score(prompts, responses)
    alone = [scorer.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert a.mean == pytest.approx(b.mean, abs=1e-4)
        assert a.std == pytest.approx(b.std, abs=1e-4)
    assert scorer.score(prompts, responses) == together


def test_thinking_is_not_scored(tiny_policy, tokenizer, world):
    scorer = RewardModelScorer(vrm(tiny_policy).eval(), tokenizer, card(), max_tokens_per_batch=100)
    prompt = world.heldout_prompts[0].messages
    plain, thought = scorer.score([prompt, prompt], ["do check", "<think>hm hm</think>\ndo check"])
    assert plain == thought


def test_an_over_long_response_is_still_scored_at_the_end_of_its_turn(tokenizer, world):
    encode = ConversationEncoder(tokenizer=tokenizer, max_length=card().max_length)
    [(prompt, response)] = encode([world.heldout_prompts[0].messages], ["do check " * 200])
    assert len(prompt) + len(response) == card().max_length
    assert response[-1] == tokenizer.eos_token_id


def saved(model, tokenizer, card, directory):
    save_reward_model(
        str(directory),
        state_dict=model.state_dict(),
        backbone_config=model.backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=card,
    )
    return str(directory)


@pytest.mark.parametrize(
    ("head", "config"),
    [
        ("vrm", HEAD),
        ("vrm", HADAMARD),
        ("vrm", MLP),
        ("vrm", FILM),
        ("vrm", MEAN_CONC),
        ("gate", HEAD),
        ("bt", HEAD),
        ("bt_aux", HEAD),
        ("ensemble", HEAD),
    ],
    ids=["bilinear", "hadamard", "mlp", "film", "mean_conc", "gate", "bt", "bt_aux", "ensemble"],
)
def test_a_checkpoint_round_trips(head, config, tiny_policy, tokenizer, world, tmp_path):
    torch.manual_seed(0)
    backbone = load_backbone(tiny_policy, dtype="float32")
    model = RewardModel(backbone, make_head(head, 64, 4, config)).eval()
    loaded, loaded_tokenizer, loaded_card = load_reward_model(saved(model, tokenizer, card(head, config), tmp_path))
    assert loaded_card == card(head, config)
    prompt = [world.heldout_prompts[0].messages]
    before = RewardModelScorer(model, tokenizer, card(head), max_tokens_per_batch=100).score(prompt, ["do check"])
    after = RewardModelScorer(loaded, loaded_tokenizer, loaded_card, max_tokens_per_batch=100).score(
        prompt, ["do check"]
    )
    assert before == after
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))


def test_the_card_names_decoder_and_parameterisation(tiny_policy, tokenizer, tmp_path):
    saved(vrm(tiny_policy), tokenizer, card(), tmp_path)
    written = json.loads((tmp_path / "reward_model.json").read_text())["vrm"]
    assert (written["decoder"], written["weight_param"], written["learned_scale"]) == ("bilinear", "softplus", True)


def test_the_scale_multiplies_mean_and_sample_and_the_variance_by_its_square():
    torch.manual_seed(0)
    head, inputs = VRMHead(8, 4, HEAD), (torch.randn(4, 8), torch.randn(4, 8), torch.tensor([3, 4]))
    torch.nn.init.normal_(head.weight_head.output.weight)
    plain = head(*inputs)
    with torch.no_grad():
        head.units.rho.fill_(math.log(3.0) / SCALE_SPEED)  # tau = 3
    scaled = head(*inputs)
    torch.testing.assert_close(scaled.mean, 3.0 * plain.mean)
    torch.testing.assert_close(scaled.sampled, 3.0 * plain.sampled)
    torch.testing.assert_close(scaled.variance, 9.0 * plain.variance)
    torch.testing.assert_close(scaled.annotation_scores, plain.annotation_scores)
    torch.testing.assert_close((scaled.weights * scaled.scores).sum(-1), scaled.mean)


def test_mean_and_variance_of_a_scaled_reward_are_those_of_its_samples():
    torch.manual_seed(1)
    head, n = VRMHead(8, 4, HEAD), 40_000
    with torch.no_grad():
        head.units.rho.fill_(math.log(2.5) / SCALE_SPEED)
        torch.nn.init.normal_(head.weight_head.output.weight)
        prompt, response = torch.randn(1, 8), torch.randn(1, 8)
        exact = head(prompt, response, None)
        draws = head(prompt.expand(2 * n, 8), response.expand(2 * n, 8), torch.arange(n)).sampled
    assert draws.mean().item() == pytest.approx(exact.mean.item(), abs=4 * draws.std().item() / math.sqrt(2 * n))
    assert draws.var().item() == pytest.approx(exact.variance.item(), rel=0.05)


@pytest.mark.parametrize("weight_param", ["softplus", "mean_conc"])
def test_the_prior_may_favour_an_objective_and_the_head_starts_there(weight_param):
    config = VRMHeadConfig(semantic_dims=6, hidden_size=32, weight_param=weight_param, prior_alpha=(4.0, 1.0, 0.5, 2.0))
    output = VRMHead(8, 4, config)(torch.randn(3, 8), torch.randn(3, 8), None)
    torch.testing.assert_close(output.alpha, torch.tensor([[4.0, 1.0, 0.5, 2.0]]).expand(3, 4), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_another_number_of_objectives_is_refused(tiny_policy, tokenizer, tmp_path):
    three = card().model_copy(update={"objectives": ("helpfulness", "honesty", "safety")})
    directory = saved(vrm(tiny_policy), tokenizer, three, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)a 'vrm' head for 3 objectives, helpfulness, .*score_matrix"):
        load_reward_model(directory)


def test_a_regression_checkpoint_remembers_how_it_weighs_its_scores(tiny_policy, tokenizer, tmp_path):
    weights = (0.7, 0.8, 0.5, -0.4)
    backbone = load_backbone(tiny_policy, dtype="float32")
    model = RewardModel(backbone, make_head("regression", 64, 4, HEAD, reward_weights=weights))
    written = card("regression").model_copy(update={"reward_weights": weights})
    loaded, _, loaded_card = load_reward_model(saved(model, tokenizer, written, tmp_path))
    assert loaded_card == written
    assert loaded.head.reward_weights == weights


def test_weights_of_one_decoder_are_refused_under_the_card_of_another(tiny_policy, tokenizer, tmp_path):
    directory = saved(vrm(tiny_policy), tokenizer, card(config=FILM), tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)does not fit .*Missing key.*head\.decoder\.features"):
        load_reward_model(directory)


def test_a_checkpoint_of_another_architecture_is_refused(tiny_policy, tokenizer, tmp_path):
    saved(vrm(tiny_policy), tokenizer, card(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"] |= {"num_hidden_layers": 3, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
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
