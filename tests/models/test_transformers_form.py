"""A reward model loads in transformers as what it is, and as nothing else."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.reward import EnsembleConfig, VRMHeadConfig
from pipeline.errors import CheckpointError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.backbone import load_backbone, load_tokenizer
from pipeline.models.reward_model import (
    RewardModel,
    RewardModelCard,
    load_reward_model,
    load_reward_tokenizer,
    make_head,
    read_backbone_config,
    save_reward_model,
)
from tests.support.chat_families import FAMILIES

HEAD = VRMHeadConfig(semantic_dims=4, hidden_size=32, decoder_hidden_size=16)
KINDS = {
    "bilinear": {"head": "vrm"},
    "hadamard": {"head": "vrm", "vrm": HEAD.model_copy(update={"decoder": "hadamard"})},
    "mlp": {"head": "vrm", "vrm": HEAD.model_copy(update={"decoder": "mlp", "initial_logvar": 1.0})},
    "film": {"head": "vrm", "vrm": HEAD.model_copy(update={"decoder": "film", "initial_logvar": 1.0})},
    "softplus": {"head": "vrm", "vrm": HEAD.model_copy(update={"weight_param": "softplus", "prior_alpha": 2.0})},
    "no scale": {"head": "vrm", "vrm": HEAD.model_copy(update={"learned_scale": False})},
    "gate": {"head": "gate"},
    "gate, no scale": {"head": "gate", "vrm": HEAD.model_copy(update={"learned_scale": False})},
    "regression": {"head": "regression", "reward_weights": (0.7, 0.8, 0.5, -0.4)},
    "regression, mean": {"head": "regression"},
    "bt": {"head": "bt"},
    "bt_aux": {"head": "bt_aux"},
    "ensemble": {"head": "ensemble", "ensemble": EnsembleConfig(members=3)},
    "worst of an ensemble": {"head": "ensemble", "ensemble": EnsembleConfig(members=3, reward="min")},
}
CONVERSATIONS = [
    (({"role": "user", "content": "Name a river"},), "The Elbe"),
    (({"role": "user", "content": "Name a river"},), "A river is water that flows."),
    (
        (
            {"role": "user", "content": "Name a river"},
            {"role": "assistant", "content": "The Elbe"},
            {"role": "user", "content": "And a lake?"},
        ),
        "Müritz",
    ),
]


def write_reward_model(backbone_directory, directory, **card):
    """A reward model with random weights, the zeros that heads start with among them."""
    card = RewardModelCard(
        **{"vrm": HEAD} | card,
        objectives=("helpfulness", "honesty", "safety", "brevity"),
        max_length=256,
        score_mean=(),
        score_std=(),
        reward_mean=0.5,
        reward_std=2.0,
        metrics={},
    )
    torch.manual_seed(0)
    backbone = load_backbone(backbone_directory, dtype="float32")
    size = backbone.config.hidden_size
    head = make_head(card.head, size, 4, card.vrm, reward_weights=card.reward_weights, ensemble=card.ensemble)
    model = RewardModel(backbone, head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if "rho" in name else 0.2))
    save_reward_model(
        str(directory),
        state_dict=model.state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=load_tokenizer(backbone_directory),
        card=card,
    )
    return str(directory)


def scores(directory, conversations):
    scorer = RewardModelScorer.load(directory, max_tokens_per_batch=512)
    return [score.mean for score in scorer.score(*map(list, zip(*conversations, strict=True)))]


def encoded(tokenizer, conversations, side):
    """As a user of transformers writes it."""
    tokenizer.padding_side = side
    messages = [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in conversations]
    texts = [tokenizer.apply_chat_template(m, tokenize=False, enable_thinking=False) for m in messages]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return FAMILIES["Qwen3"].write(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_logits_are_the_rewards(kind, qwen, tmp_path):
    directory = write_reward_model(qwen, tmp_path, **KINDS[kind])
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True).eval()
    expected = scores(directory, CONVERSATIONS)
    assert max(expected) - min(expected) > 0.01
    for side in ("left", "right"):
        with torch.no_grad():
            logits = model(
                **encoded(AutoTokenizer.from_pretrained(directory, trust_remote_code=True), CONVERSATIONS, side)
            ).logits
        assert logits.shape == (3, 1)
        assert logits[:, 0].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["Gemma", "Phi-3.5", "Llama-3", "Qwen3, base"])
def test_every_family_marks_where_the_answer_begins_and_ends(name, tmp_path):
    directory = write_reward_model(FAMILIES[name].write(tmp_path / "policy"), tmp_path / "reward", head="vrm")
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    tokenizer.pad_token = tokenizer.eos_token
    with torch.no_grad():
        logits = model(**encoded(tokenizer, CONVERSATIONS, "right")).logits[:, 0]
    assert logits.tolist() == pytest.approx(scores(directory, CONVERSATIONS), abs=1e-5)


def test_without_marks_the_caller_says_where_the_answer_begins(tmp_path):
    policy = FAMILIES["GPT-2, plain"].write(tmp_path / "policy")
    directory = write_reward_model(policy, tmp_path / "reward", head="vrm")
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    ids = tokenizer("user: Name a river\n\nassistant:The Elbe<|endoftext|>", return_tensors="pt")["input_ids"]
    with pytest.raises(ValueError, match="does not mark where an answer begins: pass answer_starts"):
        model(ids)
    starts = torch.tensor([len("user: Name a river\n\nassistant:")])
    with torch.no_grad():
        logits = model(ids, answer_starts=starts).logits[:, 0]
    assert logits.tolist() == pytest.approx(scores(directory, CONVERSATIONS[:1]), abs=1e-5)


def test_a_conversation_without_an_answer_or_its_end_is_refused(qwen, tmp_path):
    directory = write_reward_model(qwen, tmp_path, head="bt")
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    for text, reason in [
        ("<|im_start|>user\nhi<|im_end|>\n", "row 0 has no beginning of the assistant's turn"),
        ("hi", "row 0 has no beginning of the assistant's turn"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\nThe Elbe", "row 0 has no end of the assistant's turn"),
    ]:
        with pytest.raises(ValueError, match=reason):
            model(**tokenizer(text, return_tensors="pt"))


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoConfig]
)
def test_without_trust_nothing_is_loaded(auto_class, qwen, tmp_path):
    directory = write_reward_model(qwen, tmp_path, head="vrm")
    with pytest.raises(ValueError, match=r"(?s)contains custom code .*trust_remote_code=True"):
        auto_class.from_pretrained(directory)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_a_reward_model_is_never_a_plain_decoder(auto_class, qwen, tmp_path):
    directory = write_reward_model(qwen, tmp_path, head="vrm")
    with pytest.raises(ValueError, match=r"Unrecognized configuration class .*VRMRewardConfig"):
        auto_class.from_pretrained(directory, trust_remote_code=True)


def test_a_low_precision_keeps_the_head_in_float32(qwen, tmp_path):
    directory = write_reward_model(qwen, tmp_path, head="vrm")
    model = AutoModelForSequenceClassification.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.bfloat16
    ).eval()
    assert model.backbone.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.head.parameters()} == {torch.float32}
    batch = encoded(AutoTokenizer.from_pretrained(directory, trust_remote_code=True), CONVERSATIONS, "right")
    with torch.no_grad():
        assert model(**batch).logits[:, 0].tolist() == pytest.approx(scores(directory, CONVERSATIONS), abs=0.2)


def test_the_checkpoint_needs_nothing_of_this_project_and_can_be_saved_again(qwen, tmp_path):
    directory = write_reward_model(qwen, tmp_path / "first", head="vrm")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForSequenceClassification as Auto, AutoTokenizer\n"
        "for name in sys.argv[1:]:\n"
        "    model = Auto.from_pretrained(name, trust_remote_code=True).eval()\n"
        "    ids = AutoTokenizer.from_pretrained(name, trust_remote_code=True)(\n"
        "        '<|im_start|>user\\nName a river<|im_end|>\\n'\n"
        "        '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\nThe Elbe<|im_end|>\\n', return_tensors='pt')\n"
        "    print(model(**ids).logits.item())\n"
        "    model.save_pretrained(sys.argv[2])\n"
        "    AutoTokenizer.from_pretrained(name, trust_remote_code=True).save_pretrained(sys.argv[2])\n"
        "assert 'pipeline' not in sys.modules\n"
    )
    again = str(tmp_path / "again")
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, directory, again],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, second = map(float, run.stdout.split())
    # The same tensors at other places of the file, from which a product may be added up in another order.
    assert first == pytest.approx(second, abs=1e-6)
    assert first == pytest.approx(scores(directory, CONVERSATIONS[:1])[0], abs=1e-5)
    state, same = load_file(f"{directory}/model.safetensors"), load_file(f"{again}/model.safetensors")
    assert state.keys() - same.keys() == {name for name in state if name.startswith("head.last_layer.")}
    assert all(torch.equal(state[name], tensor) for name, tensor in same.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "qwen3"}, r"config\.json does not have the model_type 'vrm_reward_model'"),
        ({"backbone": {"model_type": "distilbert"}}, "not a causal decoder"),
        ({"backbone": {"model_type": "nonsense"}}, r"config\.json cannot be read"),
        ({"backbone": None}, r"config\.json cannot be read"),
    ],
)
def test_our_loader_reads_the_decoder_from_the_config_and_refuses_what_is_none(change, reason, qwen, tmp_path):
    directory = write_reward_model(qwen, tmp_path, head="bt")
    assert read_backbone_config(directory).hidden_size == 64
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=reason):
        load_reward_model(directory)


def test_our_loader_runs_no_code_of_the_checkpoint_and_reads_its_tokenizer_as_the_decoders(qwen, tmp_path, caplog):
    directory = write_reward_model(qwen, tmp_path, head="vrm")
    caplog.clear()
    before = scores(directory, CONVERSATIONS)
    (tmp_path / "modeling_vrm_reward.py").write_text("raise SystemExit('was run')")
    assert scores(directory, CONVERSATIONS) == before
    assert "to instantiate a model of type" not in caplog.text
    ours, decoders = load_reward_tokenizer(directory), load_tokenizer(qwen)
    assert type(ours) is type(decoders)
    assert ours.get_vocab() == decoders.get_vocab()
