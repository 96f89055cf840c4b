"""A real vLLM engine stops where the template ends a turn, though the model's own files name another token."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.data.prompts import tokenise_prompts
from pipeline.models.backbone import load_tokenizer
from pipeline.records import SamplingParams
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.publishing import publish_checkpoint
from tests.support.chat_families import FAMILIES

pytestmark = pytest.mark.components

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=24, samples_per_prompt=16, seed=5)


def test_a_sampled_end_of_turn_stops_the_response_and_counts_as_ended(local_ray, tmp_path):
    directory = FAMILIES["Qwen3, base"].write(tmp_path / "model", ending="<|im_end|>")
    tokenizer = load_tokenizer(directory)
    assert AutoModelForCausalLM.from_pretrained(directory).generation_config.eos_token_id == tokenizer.eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    named = [(str(n), ({"role": "user", "content": f"Which river is number {n}?"},)) for n in range(4)]
    prompts = tokenise_prompts(named, tokenizer, max_prompt_tokens=128)
    probes = choose_probes(prompts, vocabulary_size=len(tokenizer), seed=0)
    settings = EngineSettings(model_uri=directory, dtype="float32", max_model_len=192, gate_tolerance=1e-4, seed=0)
    config = RolloutConfig(workers=1, cpus_per_worker=1, chunk_size=64, max_sequences=64)
    with RolloutPool(settings, config, DeadlinesConfig()) as pool:
        pool.load_weights(publish_checkpoint(directory, str(tmp_path / "0"), probes, dtype="float32", version=0))
        responses = pool.generate(prompts, SAMPLING)

    stopped = [r for r in responses if r.response_ids[-1] == end]
    # Of the responses, 1 - (5/6)^24 = 0.99 should sample the token at least once.
    assert len(stopped) > 0.9 * len(responses)
    assert {r.finish_reason for r in stopped} == {"stop"}
    lengths = torch.tensor([float(len(r.response_ids)) for r in stopped])
    assert 3 < lengths.mean() < 10
    for response in responses:
        assert end not in response.response_ids[:-1]
        assert "<|im_end|>" not in response.response_text
        assert len(response.logprobs) == len(response.response_ids)
