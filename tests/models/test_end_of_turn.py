"""Every end of a turn survives in the checkpoints that are written, and samplers stop at each."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.models import OptimiserConfig, PolicyConfig
from pipeline.config.sft import SFTConfig
from pipeline.data.collate import tokenise_texts
from pipeline.data.prompts import tokenise_prompts
from pipeline.errors import CheckpointError
from pipeline.learning.builders import SFTTrainerSpec, build_sft_trainer
from pipeline.learning.engine import TorchEngine
from pipeline.learning.starting_policy import write_starting_policy
from pipeline.models.backbone import load_causal_lm, load_config, load_tokenizer, save_causal_lm, stop_token_ids
from pipeline.records import SamplingParams
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.publishing import publish_checkpoint
from pipeline.rollouts.torch_rollouts import TorchRollouts
from tests.support.chat_families import FAMILIES

QUESTIONS = [({"role": "user", "content": f"Which river is number {n}?"},) for n in range(4)]
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=24, samples_per_prompt=8, seed=0)


def sampled(directory, scratch, sampling=SAMPLING):
    """Responses of the in-process sampler, which holds the policy of the directory."""
    tokenizer = load_tokenizer(directory)
    named = [(str(n), question) for n, question in enumerate(QUESTIONS)]
    prompts = tokenise_prompts(named, tokenizer, max_prompt_tokens=128)
    probes = choose_probes(prompts, vocabulary_size=len(tokenizer), seed=0)
    rollouts = TorchRollouts(directory, dtype="float32")
    rollouts.load_weights(publish_checkpoint(directory, str(scratch), probes, dtype="float32", version=0))
    return rollouts.generate(prompts, sampling)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_checkpoint_names_every_end_of_a_turn(name, tmp_path):
    family = FAMILIES[name]
    model, tokenizer = load_causal_lm(family.write(tmp_path / "theirs"), dtype="float32")
    ours = str(tmp_path / "ours")
    save_causal_lm(model.state_dict(), model.config, tokenizer, ours)

    expected = tokenizer.convert_tokens_to_ids([*family.ends])
    for file in ("generation_config.json", "config.json"):
        written = json.loads((tmp_path / "ours" / file).read_text())["eos_token_id"]
        assert (written if isinstance(written, list) else [written]) == expected
    assert stop_token_ids(ours, load_config(ours), load_tokenizer(ours)) == tuple(expected)


def test_a_config_that_names_no_end_is_completed_as_it_is_saved(tmp_path):
    theirs = FAMILIES["Gemma"].write(tmp_path / "theirs")
    model, config = AutoModelForCausalLM.from_pretrained(theirs), load_config(theirs)
    assert config.eos_token_id is None
    save_causal_lm(model.state_dict(), config, load_tokenizer(theirs), str(tmp_path / "ours"))
    for file in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "ours" / file).read_text())["eos_token_id"] == [259, 257]


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("Gemma", "<end_of_turn>"),
        ("Gemma", "<eos>"),
        ("Phi-3.5", "<|end|>"),
        ("Llama-3", "<|eom_id|>"),
        ("Qwen3, base", "<|im_end|>"),
        ("GPT-2, plain", "<|endoftext|>"),
        ("turns that are not special", "<|im_end|>"),
    ],
)
def test_the_in_process_sampler_stops_at_each_end(name, ending, tmp_path):
    directory = FAMILIES[name].write(tmp_path / "model", ending=ending)
    index = load_tokenizer(directory).convert_tokens_to_ids(ending)
    responses = sampled(directory, tmp_path / "published")
    stopped = [r for r in responses if r.response_ids[-1] == index]
    assert len(stopped) > len(responses) / 2
    assert {r.finish_reason for r in stopped} == {"stop"}
    for response in responses:
        assert index not in response.response_ids[:-1]
        assert ending not in response.response_text


def test_without_a_generation_config_the_config_names_the_ends(tmp_path):
    directory = FAMILIES["Gemma"].write(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": [257, 258]}))
    assert stop_token_ids(directory, load_config(directory), load_tokenizer(directory)) == (259, 257, 258)


def test_a_damaged_generation_config_is_refused(tmp_path):
    directory = FAMILIES["Gemma"].write(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json of .* cannot be read"):
        stop_token_ids(directory, load_config(directory), load_tokenizer(directory))


@pytest.mark.parametrize("name", ["Gemma", "Phi-3.5"])
def test_fine_tuning_teaches_to_stop_where_the_template_ends_the_turn(name, tmp_path):
    family, start = FAMILIES[name], str(tmp_path / "start")
    policy = PolicyConfig(checkpoint=family.write(tmp_path / "theirs"))
    tokenizer = write_starting_policy(policy, start, seed=0)
    config = SFTConfig(num_steps=40, batch_size=4, optimiser=OptimiserConfig(learning_rate=1e-2, warmup_fraction=0.1))
    trainer = build_sft_trainer(SFTTrainerSpec(config=config, policy_uri=start, dtype="float32", seed=0), TorchEngine)
    texts = tokenise_texts([(question, "Elbe") for question in QUESTIONS], tokenizer, max_length=256)
    for step in range(config.num_steps):
        trainer.update(texts, step)
    trainer.export(str(tmp_path / "tuned"))

    responses = sampled(str(tmp_path / "tuned"), tmp_path / "published")
    stopped = [r for r in responses if r.response_text == "Elbe" and r.finish_reason == "stop"]
    assert len(stopped) > 0.9 * len(responses)
    [end] = {r.response_ids[-1] for r in stopped}
    assert tokenizer.convert_ids_to_tokens(end) == family.ends[0]
    # transformers' own generation knows nothing of this project, and stops there too.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    prompt = torch.tensor([texts[0].prompt_ids])
    answer = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    assert theirs.decode(answer) == f"Elbe{family.ends[0]}"
