"""What every method of a comparison is measured by: its budget, its distance to the start, and its reward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.config.comparison import ComparisonConfig, RewardBenchmarkFiles
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.batching import plan_micro_batches, stable_seed
from pipeline.data.evaluation_examples import EvaluationExample, examples_of_pairs, read_examples
from pipeline.data.planted import GoldAnnotator
from pipeline.data.run_data import RunData, resolve
from pipeline.evaluation.reward_evaluation import Estimate, evaluate, survey
from pipeline.evaluation.scored_rows_file import ComparisonScorer, read_scored_rows, write_scored_rows
from pipeline.models.backbone import load_causal_lm
from pipeline.models.critic import Policy
from pipeline.models.packing import pack
from pipeline.ports import RolloutSource
from pipeline.records import Metrics, PreferencePair, Prompt, Rollout, SamplingParams
from pipeline.stages import storage

HELDOUT = "held-out pairs"
"""The benchmark of Table 2 that every data source has."""

TABLE2 = "table2/"
"""Prefix of the metrics of a method's reward: table2/<benchmark>/<metric>, with /low and /high."""

PRINTED_PAIR_METRIC = "accuracy_tie_half"


def kl_to_start(
    rollouts: RolloutSource,
    prompts: Sequence[Prompt],
    start_uri: str,
    experiment: ExperimentConfig,
    comparison: ComparisonConfig,
    *,
    device: str,
) -> Metrics:
    """KL(pi || pi_start) per response, from fresh samples of pi at temperature 1 on held-out prompts.

    KL = E_y~pi [ sum_t log pi(y_t) - log pi_start(y_t) ],  the k1 estimator, unbiased.

    Args:
        rollouts: hold pi.
        start_uri: the policy before alignment.

    Returns:
        `kl/to_start` with `kl/standard_error`, nats a response; `response/mean_tokens`; `response/finished`, the share
        of responses that ended by themselves.
    """
    repeats = max(1, math.ceil(comparison.kl_samples / len(prompts)))
    asked = prompts[: max(1, comparison.kl_samples // repeats)]
    sampling = SamplingParams(
        temperature=1.0,
        top_p=1.0,
        max_response_tokens=experiment.benchmark.max_response_tokens,
        samples_per_prompt=repeats,
        seed=stable_seed("kl to the start", experiment.seed),
    )
    samples = rollouts.generate(asked, sampling)
    with storage.reading(start_uri) as directory:
        start = Policy(load_causal_lm(directory, dtype=experiment.policy.dtype)[0].eval().to(device))
    reference = summed_logprobs(start, samples, experiment.alignment.max_tokens_per_micro_batch, device)
    ratios = np.array([sum(sample.logprobs) for sample in samples]) - reference
    return {
        "kl/to_start": float(ratios.mean()),
        "kl/standard_error": float(ratios.std(ddof=1) / math.sqrt(len(ratios))) if len(ratios) > 1 else 0.0,
        "response/mean_tokens": float(np.mean([len(sample.response_ids) for sample in samples])),
        "response/finished": float(np.mean([sample.finish_reason == "stop" for sample in samples])),
    }


@torch.inference_mode()
def summed_logprobs(policy: Policy, samples: Sequence[Rollout], max_tokens: int, device: str) -> np.ndarray:
    """[B] log-probabilities of the responses at temperature 1, nats."""
    logprobs = np.zeros(len(samples))
    lengths = [sample.tokens.num_tokens for sample in samples]
    for batch in plan_micro_batches(lengths, world_size=1, max_tokens=max_tokens)[0]:
        packed = pack([samples[row].tokens for row in batch]).to(device)
        logprobs[batch] = policy(packed, int(packed.response_lengths.max()), 1.0).sum(-1).cpu().numpy()
    return logprobs


def training_budget(
    experiment: ExperimentConfig, rows: Sequence[Mapping[str, float]], about_training: Sequence[Metrics], num_pairs: int
) -> Metrics:
    """What the alignment read, sampled and trained on, as its own log says.

    Args:
        rows: the metrics of every step of all stages of the method.
        about_training: the metrics of these stages, the last one the alignment.
        num_pairs: training pairs that are there, which a reward model reads before PPO does anything.

    Returns:
        `budget/pairs`: distinct preference pairs behind the method. `budget/pair_passes`: pairs times how often they
        were trained on. `budget/steps`: optimiser steps of the policy. `budget/trained_tokens`: tokens of its forward
        passes with gradient. `budget/sampled_tokens`: tokens that the method let the policy write.
    """
    config = experiment.alignment
    if config.is_direct:
        updates = [row for row in rows if "rows" in row]
        sampled = sum(stage.get("pairs/sampled_tokens", 0.0) for stage in about_training)
        with_pairs = about_training if config.pairs == "policy" else about_training[-1:]
        return {
            "budget/pairs": sum(stage["data/train_rows"] for stage in with_pairs),
            "budget/pair_passes": sum(row["rows"] for row in updates),
            "budget/steps": float(len(updates)),
            "budget/trained_tokens": sum(row["tokens"] for row in updates),
            "budget/sampled_tokens": sampled,
        }
    responses = config.prompts_per_step * config.samples_per_prompt
    sampled = sum(row["response/tokens"] * responses for row in rows)
    reward = experiment.reward
    reward_steps = reward.num_steps or max(1, num_pairs // reward.batch_pairs)
    return {
        "budget/pairs": float(num_pairs),
        "budget/pair_passes": float(reward_steps * reward.batch_pairs),
        "budget/steps": float(len(rows) * config.ppo.epochs * (responses // config.ppo.mini_batch_size)),
        "budget/trained_tokens": sampled * config.ppo.epochs,
        "budget/sampled_tokens": sampled,
    }


def heldout_examples(pairs: Sequence[PreferencePair], gold: GoldAnnotator | None) -> list[EvaluationExample]:
    """Held-out pairs as rows of an evaluation. The subset is the kind of the prompt if it is known, else the source."""
    examples = examples_of_pairs(pairs)
    if gold is None:
        return examples
    return [replace(example, subset=gold.kind(example.prompt)) for example in examples]


def evaluate_reward(
    scorer: ComparisonScorer, data: RunData, comparison: ComparisonConfig, directory: str, *, identity: str, seed: int
) -> Metrics:
    """`table2/*`: the held-out pairs, and every benchmark that the comparison names.

    Args:
        scorer: the reward of the method.
        directory: where the scores of single rows go; an interrupted evaluation goes on there.
        identity: of the scorer.
    """
    metrics: Metrics = {}
    place = storage.local_path(storage.join(directory, "table2"))
    Path(place).mkdir(parents=True, exist_ok=True)
    heldout = RewardBenchmarkFiles(name=HELDOUT, files=("held-out",))
    for benchmark in (heldout, *comparison.reward_benchmarks):

        def examples(benchmark: RewardBenchmarkFiles = benchmark) -> Iterator[EvaluationExample]:
            if benchmark is heldout:
                return iter(heldout_examples(data.heldout_pairs, data.gold))
            return read_examples([resolve(file) for file in benchmark.files], subset_field=benchmark.subset_field)

        survey(examples(), benchmark.benchmark)
        path = Path(place, f"{benchmark.name.replace(' ', '_')}.jsonl")
        write_scored_rows(
            examples(), path, scored_by=identity, load_scorer=lambda: scorer, report=lambda done, kept: None
        )
        evaluation = evaluate(read_scored_rows(path)[0], benchmark.benchmark, seed=seed, answer_threshold=None)
        found = dict(evaluation.accuracies)
        if benchmark.benchmark == "pairs":
            found = {"accuracy": evaluation.accuracies[PRINTED_PAIR_METRIC]} | {
                subset: Estimate(value=row["accuracy"], low=row["low"], high=row["high"])
                for subset, row in evaluation.subsets.items()
                if len(evaluation.subsets) > 1
            }
        for name, estimate in found.items():
            key = f"{TABLE2}{benchmark.name}/{name}"
            metrics |= {key: estimate.value}
            if not math.isnan(estimate.low):
                metrics |= {f"{key}/low": estimate.low, f"{key}/high": estimate.high}
    return metrics
