"""Rollouts, measured: against HF generate, over workers, hidden behind the update, and what new weights cost.

    python -m tests.benchmarks.rollout_speed --json rollout_speed.json

Everything in one run on one machine, a policy of SmolLM2-135M's shape with random weights in float32, one thread a
process: (a) tokens per second of one worker against HF generate, (b) of two workers against one, (c) the share of the
smaller of rollout and update time that prefetch hides, in `align` itself with a one-process learner, (d) seconds and
GB/s of a weight transfer beside a memory copy of as many bytes. Needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.rollout_pool import RolloutPool
from pipeline.config.schema import AlignmentConfig, DeadlinesConfig, OptimiserConfig, PPOConfig, RolloutConfig
from pipeline.data.planted import build_tokenizer
from pipeline.data.prompts import PromptStream
from pipeline.learning.engine import TorchEngine
from pipeline.learning.experience import RewardScale
from pipeline.learning.memory import copy_gb_per_s
from pipeline.learning.parameter_groups import parameter_groups
from pipeline.learning.ppo_update import PPOLearner
from pipeline.learning.probes import choose_probes
from pipeline.learning.publishing import publish_checkpoint
from pipeline.loops.alignment import align
from pipeline.models.backbone import load_causal_lm, save_causal_lm
from pipeline.models.critic import PolicyWithCritic
from pipeline.records import Metrics, Prompt, SamplingParams
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.fakes import FakeScorer, reference_of

GATE_TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of alignment; the first is left out")
    parser.add_argument("--json", help="write the numbers here, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory(dir=shared) as published:
        model = create_policy(place, options)
        prompts = random_prompts(options)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            measured = measure(model, prompts, place, published, options)
        finally:
            ray.shutdown()
    report(measured, options)
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "measured": measured}, indent=2) + "\n")


def create_policy(place: str, options: argparse.Namespace) -> str:
    """A directory with random weights in the shape of SmolLM2-135M, unless the options say otherwise."""
    tokenizer = build_tokenizer()
    heads = options.hidden_size // 64
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=options.hidden_size,
        intermediate_size=options.hidden_size * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    directory = os.path.join(place, "policy")
    save_causal_lm(AutoModelForCausalLM.from_config(config).state_dict(), config, tokenizer, directory)
    return directory


def random_prompts(options: argparse.Namespace) -> list[Prompt]:
    tokens = torch.randint(
        1000, 49152, (options.prompts, options.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    return [
        Prompt(id=str(n), messages=({"role": "user", "content": "-"},), token_ids=tuple(row))
        for n, row in enumerate(tokens.tolist())
    ]


def measure(model: str, prompts: list[Prompt], place: str, published: str, options: argparse.Namespace) -> Metrics:
    """All four, in turns where two things are compared."""
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_response_tokens=options.response_tokens, samples_per_prompt=1, seed=0
    )
    probes = choose_probes(prompts, vocabulary_size=49152, seed=0, count=4)
    weights = publish_checkpoint(model, os.path.join(published, "policy"), probes, dtype="float32", version=0)
    measured: Metrics = {}
    with open_pool(model, options, workers=2) as pool:
        pool.load_weights(weights)
        speeds: dict[int, list[float]] = {1: [], 2: []}
        transfers = []
        for workers in (2, 1):
            pool.resize(workers)
            pool.generate(prompts, sampling)  # warm
            for n in range(options.rounds):
                started = time.perf_counter()
                rollouts = pool.generate(prompts, SamplingParams(**{**vars(sampling), "seed": n}))
                seconds = time.perf_counter() - started
                speeds[workers].append(sum(len(r.response_ids) for r in rollouts) / seconds)
        for _ in range(options.rounds):
            transfers.append(pool.load_weights(weights))
        measured["rollout/tokens_per_s_1_worker"] = max(speeds[1])
        measured["rollout/tokens_per_s_2_workers"] = max(speeds[2])
        measured["rollout/tokens_per_s_hf_generate"] = time_hf(model, prompts, options)
        seconds = min(t["weights/seconds"] for t in transfers)
        num_bytes = os.path.getsize(os.path.join(weights.location, "model.safetensors"))
        measured["weights/seconds"] = seconds
        measured["weights/gb"] = num_bytes / 1e9
        measured["weights/gb_per_s"] = num_bytes / 1e9 / seconds
        measured["weights/copy_gb_per_s"] = copy_gb_per_s(num_bytes, torch.device("cpu"), rounds=options.rounds)
        steps = {
            name: run_alignment(model, prompts, pool, os.path.join(place, name), published, options, prefetch)
            for name, prefetch in (("synchronous", None), ("prefetch", "continue"))
        }
    off, on = steps["synchronous"], steps["prefetch"]
    measured["step/rollout_s"] = off["rollout"]
    measured["step/update_s"] = off["score"] + off["evaluate"] + off["update"]
    measured["step/weights_s"] = off["weights"]
    measured["step/synchronous_s"] = sum(off.values())
    measured["step/prefetch_s"] = sum(on.values())
    smaller = min(measured["step/rollout_s"], measured["step/update_s"])
    measured["step/hidden_share"] = (measured["step/synchronous_s"] - measured["step/prefetch_s"]) / smaller
    return measured


def open_pool(model: str, options: argparse.Namespace, *, workers: int) -> RolloutPool:
    config = RolloutConfig(workers=workers, cpus_per_worker=1, chunk_size=max(1, options.prompts // 4))
    return RolloutPool(
        model,
        config,
        DeadlinesConfig(),
        dtype="float32",
        max_model_len=options.prompt_tokens + options.response_tokens,
        gate_tolerance=GATE_TOLERANCE,
        seed=0,
    )


def time_hf(model: str, prompts: list[Prompt], options: argparse.Namespace) -> float:
    """Tokens per second of HF generate on the whole batch at once, one thread, best round."""
    module = load_causal_lm(model, dtype="float32")[0].eval()
    tokens = torch.tensor([prompt.token_ids for prompt in prompts])
    rates = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        with torch.no_grad():
            sequences = module.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=True,
                top_k=0,
                max_new_tokens=options.response_tokens,
            )
        rates.append(sequences[:, tokens.shape[1] :].numel() / (time.perf_counter() - started))
    return max(rates)


def run_alignment(
    model: str,
    prompts: list[Prompt],
    pool: RolloutPool,
    directory: str,
    published: str,
    options: argparse.Namespace,
    prefetch: str | None,
) -> dict[str, float]:
    """Mean seconds of each phase of a step, the first left out: nothing is prefetched for it."""
    config = AlignmentConfig(
        num_steps=options.steps,
        prompts_per_step=options.prompts,
        max_prompt_tokens=options.prompt_tokens,
        max_response_tokens=options.response_tokens,
        ppo=PPOConfig(
            mini_batch_size=options.prompts,
            critic="value_head",
            importance_cap=2.0,
            policy=OptimiserConfig(learning_rate=1e-6),
        ),
        max_tokens_per_micro_batch=2048,
        checkpoint_every=options.steps,
        prefetch=prefetch,
    )
    policy, tokenizer = load_causal_lm(model, dtype="float32")
    module = PolicyWithCritic(policy, None)
    groups = parameter_groups(policy, module.value_head, config.ppo.policy, head_learning_rate=1e-5)
    learner = PPOLearner(
        TorchEngine(module, groups, betas=config.ppo.policy.betas, max_grad_norm=1.0),
        reference_of(model),
        config=config,
        model_config=policy.config,
        tokenizer=tokenizer,
        probes=choose_probes(prompts, vocabulary_size=49152, seed=0, count=4),
        publish_directory=os.path.join(published, str(prefetch)),
        seed=0,
    )
    align(
        pool,
        FakeScorer(),
        learner,
        PromptStream(prompts=tuple(prompts), seed=0),
        StageDirectory(directory, "align_policy", "0" * 64),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
        seed=0,
    )
    rows = read_metrics(os.path.join(directory, METRICS_FILE))[1:]
    return {
        phase: sum(row[f"seconds/{phase}"] for row in rows) / len(rows)
        for phase in ("rollout", "score", "evaluate", "update", "weights")
    }


def report(measured: Metrics, options: argparse.Namespace) -> None:
    one, two = measured["rollout/tokens_per_s_1_worker"], measured["rollout/tokens_per_s_2_workers"]
    hf, share = measured["rollout/tokens_per_s_hf_generate"], measured["step/hidden_share"]
    copy = measured["weights/copy_gb_per_s"]
    print(
        f"\n{options.layers} layers of width {options.hidden_size}, float32, {options.prompts} prompts of "
        f"{options.prompt_tokens} tokens, {options.response_tokens} response tokens, one thread a process\n"
    )
    print(f"{'':<34}{'tokens/s':>10}{'ratio':>8}")
    print(f"{'HF generate':<34}{hf:>10.0f}{1.0:>8.2f}")
    print(f"{'pool, 1 worker':<34}{one:>10.0f}{one / hf:>8.2f}  of HF generate")
    print(f"{'pool, 2 workers':<34}{two:>10.0f}{two / one:>8.2f}  of 1 worker\n")
    print(f"{'':<34}{'s a step':>10}")
    for name in ("rollout", "update", "weights", "synchronous", "prefetch"):
        print(f"{name:<34}{measured[f'step/{name}_s']:>10.2f}")
    print(f"hidden of the smaller of rollout and update: {share:.0%}\n")
    print(f"{'':<34}{'seconds':>10}{'GB/s':>8}")
    print(f"{'weights into an engine':<34}{measured['weights/seconds']:>10.3f}{measured['weights/gb_per_s']:>8.2f}")
    print(f"{'memory copy of as much':<34}{measured['weights/gb'] / copy:>10.3f}{copy:>8.2f}")


if __name__ == "__main__":
    main()
