"""The PPO learner alone: tokens per second, share of the device's peak, memory with and without chunked logits.

    python -m tests.performance.learner_speed --json learner_speed.json     # a GPU: Qwen3-0.6B's and Qwen3-4B's shape
    python -m tests.performance.learner_speed --responses 16 --prompt-tokens 128 --response-tokens 512    # two cores

Times `PPOLearner.update` on a `TorchEngine`: forward, backward and step on one batch, one epoch of one mini-batch in
packed micro-batches. The policy has random weights, float32, the critic is a value head on its trunk; bfloat16, the
default on a GPU, computes under autocast. Prompts and responses have random lengths between half of the limit and the
limit. Every row of the table is a process of its own, which warms up and then counts the median.

Twice each: "chunked" is the learner as it is, "plain" the same with log-softmax over all logits of a micro-batch.
Memory is the most that tensors took of the GPU during the updates, on a CPU the largest resident size of the process;
its floor is 16 bytes a parameter: weight, gradient and two moments.

MFU: the FLOPs that the model needs, over those that the device could have done in the time. An update needs

    6 P T + 6 H V N + 6 L A D sum_b l_b^2

P weights of the layers' matrix products (no embeddings), T tokens in all, H V weights of the vocabulary head, which
only the N response tokens need, L layers with A heads of D, l_b tokens of prompt and response b. A weight costs a token
2 forward and 4 backward; causal attention needs half of its square. What is computed again to spare memory does not
count. The peak is the data sheet's where `PEAK_TFLOPS` knows the GPU, for bfloat16; elsewhere it is measured, as the
best of a few large matrix products in the same process, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from pipeline.columns import Rollouts
from pipeline.config.alignment import AlignmentConfig, PPOConfig
from pipeline.config.models import OptimiserConfig
from pipeline.data.planted import build_tokenizer
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.engine import TorchEngine
from pipeline.learning.memory import keep_freed_memory, peak_memory
from pipeline.learning.parameter_groups import policy_parameter_groups
from pipeline.learning.ppo_learner import PPOLearner, reference_without_adapters
from pipeline.learning.rewarded_rows import reward_rows
from pipeline.models import critic
from pipeline.models.backbone import DTYPES
from pipeline.models.critic import PolicyWithCritic
from pipeline.models.onednn_linear import with_onednn
from pipeline.records import Experience, Prompt, PromptGroup, RewardScore, Rollout
from tests.performance.processor import processor

SHAPES = {
    "small": {
        "vocab_size": 49152,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "4b": {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
RECOMPUTED = ("4b",)
"""Whose activations of a micro-batch would take, by estimate, 60 GiB beside 60 of parameters and optimiser."""

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
"""Dense bfloat16 products with float32 sums, from the data sheets; the first name that is part of the device's."""

CHUNKED, PLAIN = "chunked", "plain"


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "4b"] if on_gpu else ["small"])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--responses", type=int, default=64, help="of an update, to as many prompts")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="at most")
    parser.add_argument("--response-tokens", type=int, default=1024, help="at most")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help=f"activations of the layers (gradient_checkpointing); by default for {', '.join(RECOMPUTED)} alone",
    )
    parser.add_argument("--rounds", type=int, default=5, help="updates after one to warm up; the median counts")
    parser.add_argument("--peak-tflops", type=float, help="of the device; default: the data sheet's, else measured")
    parser.add_argument("--json", help="write the numbers here, too")
    options = parser.parse_args()

    device, peak = name_and_peak(options)
    source = f"peak {peak:g} TFLOP/s" if peak is not None else "peak measured as a large matrix product"
    print(processor())
    print(f"{device}, {options.dtype}, {source}; micro-batches of up to {options.micro_batch_tokens:,} tokens\n")
    print(
        f"{'':<7}{'logits':<9}{'recompute':<11}{'tokens':>8}{'tokens/s':>11}{'s':>9}{'floor s':>9}"
        f"{'TFLOP/s':>9}{'of peak':>9}{'MFU':>6}{'GiB':>8}{'floor':>7}",
        flush=True,
    )
    measured = []
    for shape in options.shapes:
        recompute = shape in RECOMPUTED if options.recompute is None else options.recompute
        peaks_gib = {}
        for logits in (CHUNKED, PLAIN):
            row: dict[str, Any] = {"shape": shape, "logits": logits, "recompute": recompute}
            start = f"{shape:<7}{logits:<9}{'yes' if recompute else 'no':<11}"
            try:
                row |= in_own_process(shape, logits, options, recompute=recompute, peak=peak)
            except torch.OutOfMemoryError as error:
                row["out_of_memory"] = str(error)
                print(f"{start}does not fit: {str(error).splitlines()[0]}", flush=True)
            else:
                peaks_gib[logits] = row["peak_gib"]
                print(
                    f"{start}{row['tokens']:>8,}{row['tokens_per_s']:>11,.0f}{row['seconds']:>9.3f}"
                    f"{row['floor_seconds']:>9.3f}{row['tflops_per_s']:>9.2f}{row['device_tflops_per_s']:>9.2f}"
                    f"{row['mfu']:>6.0%}{row['peak_gib']:>8.2f}{row['floor_gib']:>7.2f}",
                    flush=True,
                )
            measured.append(row)
        if len(peaks_gib) == 2:
            print(f"chunked logits spare {peaks_gib[PLAIN] - peaks_gib[CHUNKED]:.2f} GiB\n", flush=True)
    if options.json:
        written = {"device": device, "processor": processor(), "options": vars(options), "measured": measured}
        Path(options.json).write_text(json.dumps(written, indent=2) + "\n")


def name_and_peak(options: argparse.Namespace) -> tuple[str, float | None]:
    """The device in words, and its TFLOP/s as far as they are known without measuring."""
    if torch.device(options.device).type != "cuda":
        return f"CPU, {torch.get_num_threads()} threads", options.peak_tflops
    name = torch.cuda.get_device_name(options.device)
    known = [peak for part, peak in PEAK_TFLOPS.items() if part in name and options.dtype == "bfloat16"]
    return name, options.peak_tflops or next(iter(known), None)


def in_own_process(
    shape: str, logits: str, options: argparse.Namespace, *, recompute: bool, peak: float | None
) -> dict[str, float]:
    """`measure`, in a process that has held nothing else."""
    spawn = multiprocessing.get_context("spawn")
    # It keeps freed memory, as our ranks do.
    with ProcessPoolExecutor(1, spawn, keep_freed_memory, (torch.device(options.device),)) as process:
        return process.submit(measure, shape, logits, options, recompute=recompute, peak=peak).result()


def measure(
    shape: str, logits: str, options: argparse.Namespace, *, recompute: bool, peak: float | None
) -> dict[str, float]:
    """One row: the median update, and the memory that this process has needed so far.

    Args:
        peak: TFLOP/s of the device; None measures them.
    """
    device = torch.device(options.device)
    if logits == PLAIN:
        critic.token_logprobs_and_entropy = plain_logprobs_and_entropy
    config = Qwen3Config(**SHAPES[shape], tie_word_embeddings=True)
    learner = create_learner(config, options, recompute=recompute)
    experience = random_experience(learner, options)
    learner.update(experience, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for step in range(1, options.rounds + 1):
        synchronise(device)
        started = time.perf_counter()
        learner.update(experience, step)
        synchronise(device)
        times.append(time.perf_counter() - started)
    memory = peak_memory(device)
    if peak is None:
        peak = product_flops_per_s(device, options.dtype) / 1e12
    seconds, tflop = median(times), update_flops(config, experience.sequences) / 1e12
    tokens = sum(sequence.num_tokens for sequence in experience.sequences)
    return {
        "tokens": tokens,
        "response_tokens": experience.num_response_tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "tflop": tflop,
        "tflops_per_s": tflop / seconds,
        "device_tflops_per_s": peak,
        "mfu": tflop / seconds / peak,
        "floor_seconds": tflop / peak,
        "peak_gib": memory.get("memory/device_peak_gib", memory["memory/rank_peak_gib"]),
        "floor_gib": 16 * sum(p.numel() for p in learner.engine.module.parameters()) / 2**30,
    }


def plain_logprobs_and_entropy(
    hidden: torch.Tensor,
    lm_head: nn.Module,
    token_ids: torch.Tensor,
    *,
    temperature: float,
    most_positions: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs_and_entropy`, with the logits of all positions in float32 at once."""
    logprobs = (lm_head(hidden).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def create_learner(config: Qwen3Config, options: argparse.Namespace, *, recompute: bool) -> PPOLearner:
    """With a random policy, which is its own reference: an update asks for none."""
    alignment = AlignmentConfig(
        num_steps=options.rounds + 1,
        prompts_per_step=options.responses,
        max_prompt_tokens=options.prompt_tokens,
        max_response_tokens=options.response_tokens,
        ppo=PPOConfig(
            mini_batch_size=options.responses,
            critic="value_head",
            critic_learning_rate=1e-6,
            policy=OptimiserConfig(learning_rate=1e-6),
        ),
        max_tokens_per_micro_batch=options.micro_batch_tokens,
        gradient_checkpointing=recompute,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        policy = with_onednn(AutoModelForCausalLM.from_config(config))
        if recompute:
            policy.gradient_checkpointing_enable()
        model = PolicyWithCritic(policy, None)
    optimiser = alignment.ppo.policy
    engine = TorchEngine(
        model,
        policy_parameter_groups(model, alignment.ppo),
        betas=optimiser.betas,
        max_grad_norm=optimiser.max_grad_norm,
        dtype=options.dtype,
        device=options.device,
    )
    return PPOLearner(
        engine,
        reference_without_adapters(engine),
        config=alignment,
        model_config=config,
        tokenizer=build_tokenizer(),
        probes=(),
        publish_directory="nothing is published",
        seed=0,
    )


def random_experience(learner: PPOLearner, options: argparse.Namespace) -> Experience:
    """Random tokens and rewards, and what the learner says of them."""
    dice = torch.Generator().manual_seed(0)

    def tokens(most: int) -> tuple[int, ...]:
        length = int(torch.randint((most + 1) // 2, most + 1, (), generator=dice))
        return tuple(torch.randint(learner.model_config.vocab_size, (length,), generator=dice).tolist())

    records = []
    for n in range(options.responses):
        prompt = Prompt(
            id=str(n), messages=({"role": "user", "content": "-"},), token_ids=tokens(options.prompt_tokens)
        )
        response = tokens(options.response_tokens)
        records.append(
            Rollout(
                prompt=prompt,
                sample_index=0,
                response_ids=response,
                response_text="-",
                logprobs=(0.0,) * len(response),
                policy_version=0,
                finish_reason="stop",
            )
        )
    rollouts = Rollouts.of(records)
    scores = [
        RewardScore(mean=mean, std=0.0, objective_weights=(), objective_scores=())
        for mean in torch.randn(options.responses, generator=dice).tolist()
    ]
    rewarded, _ = reward_rows(rollouts, scores, learner.config, RewardScale(mean=0.0, std=1.0))
    evaluated, _ = learner.evaluate(rollouts)
    return learner.build_experience(evaluated, rewarded, kl_coefficient=learner.config.kl.coefficient)[0]


def update_flops(config: Qwen3Config, sequences: Sequence[PromptGroup]) -> float:
    """Of one pass over the sequences, forward and backward, by the formula above."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    weights = config.num_hidden_layers * layer * sum(s.num_tokens for s in sequences)
    weights += config.hidden_size * config.vocab_size * sum(s.num_response_tokens for s in sequences)
    attention = config.num_hidden_layers * queries * sum(s.num_tokens**2 for s in sequences)
    return 6.0 * (weights + attention)


def product_flops_per_s(device: torch.device, dtype: str) -> float:
    """The best of a few large products, by the layers that our models multiply with."""
    size = 8192 if device.type == "cuda" else 2048
    layer = with_onednn(nn.Linear(size, size, bias=False, device=device, dtype=DTYPES[dtype]))
    best = float("inf")
    with torch.no_grad():
        x = layer(torch.randn(size, size, device=device, dtype=DTYPES[dtype]))
        for _ in range(10):
            synchronise(device)
            started = time.perf_counter()
            layer(x)
            synchronise(device)
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
