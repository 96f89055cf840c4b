"""A reward model, or what a policy implies, on RewardBench, RewardBench 2, RM-Bench or your pairs.

    python jobs/evaluate_reward_model.py --model runs/tiny/stages/train_reward_model-.../result \\
        --pairs pairs.jsonl --out runs/eval-vrm
    python jobs/evaluate_reward_model.py --model .../other/result --pairs pairs.jsonl --out runs/eval-bt \\
        --compare runs/eval-vrm/rows.jsonl
    python jobs/evaluate_reward_model.py --model .../result --recipe tiny --out runs/eval-heldout
    python jobs/evaluate_reward_model.py --policy runs/dpo/.../result --reference runs/sft/.../result --form dpo \\
        --benchmark rewardbench --pairs reward-bench.parquet --out runs/eval-dpo

With --policy the reward is the one that a policy of direct alignment implies: beta times the log-probability of the
response minus that of the reference, summed over its tokens, or what the method compares instead (--form). The default
beta of 1 is RewardBench's; accuracies do not depend on it.

A row is {"prompt": text | messages, "chosen": ..., "rejected": ..., "subset", "id"}. Chosen and rejected are a text, a
conversation that ends with the response, or a list of texts. With "scores_chosen" and "scores_rejected", mappings from
objective to score, the reasons of the model are held against the annotations. --recipe takes the recipe's held-out
pairs instead of files. Writes rows.jsonl (the scores) and metrics.json, with `accuracy`, `nll`, `ece` and `reasons/...`
beside the estimates; the same command again continues where it stopped. One process, no Ray.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jobs.command_line import Command, add_overrides, complete_with
from pipeline.config.cluster import ScoringConfig
from pipeline.config.implicit_reward import ImplicitRewardName
from pipeline.config.load import load_recipe, recipe_names
from pipeline.data.evaluation_examples import examples_of_pairs, read_examples
from pipeline.data.files import content_fingerprint
from pipeline.data.preferences import LeftOut, left_out_counts, require_few_faults
from pipeline.errors import ConfigError
from pipeline.evaluation.reward_evaluation import (
    REWARD_BENCHMARKS,
    as_json,
    evaluate,
    evaluation_table,
    headline_metrics,
    metric_differences,
    survey,
)
from pipeline.models.checkpoint_files import check_checkpoint, check_reward_model
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.tracking.progress import as_clock

if TYPE_CHECKING:
    from pipeline.data.evaluation_examples import EvaluationExample
    from pipeline.data.planted import GoldAnnotator
    from pipeline.evaluation.scored_rows_file import ComparisonScorer

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """What scores: a reward model, or a policy that implies one."""

    identity: str
    """Written into every scored row: rows of two sources never mix in one file."""
    record: Mapping[str, Any]
    """What metrics.json says of it."""
    load: Callable[[], ComparisonScorer]
    objectives: tuple[str, ...]
    """Those of the reward model; a policy has none."""
    answer_threshold: float | None
    """Of the reward model's calibration; a policy has none."""


def require_one_source(options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the options contradict each other.
    """
    if (options.model is None) == (options.policy is None):
        raise ConfigError("give --model (a reward model), or --policy (what the policy implies), and not both")
    given = [name for name in ("reference", "form", "beta") if getattr(options, name) is not None]
    if given and options.policy is None:
        raise ConfigError(
            f"--{given[0]} belongs to --policy. A reward model has no reference and no form: leave it out."
        )


def reward_source(options: argparse.Namespace, device: str) -> RewardSource:
    """The source that the options name, checked without reading weights.

    Raises:
        CheckpointError: a directory does not hold what its option says.
        ConfigError: the options do not fit the form, or policy and reference read different tokens.
    """
    if options.policy is not None:
        return _implied_by_policy(options, device)
    from pipeline.evaluation.reward_scorer import RewardModelScorer
    from pipeline.models.reward_model_card import read_card

    card = read_card(options.model)
    return RewardSource(
        identity=f"{directory_fingerprint(options.model)[:16]}/{device}",
        record={"model": options.model},
        load=lambda: RewardModelScorer.load(
            options.model, max_tokens_per_batch=options.max_tokens_per_batch, device=device
        ),
        objectives=card.objectives,
        answer_threshold=card.calibration.answer_threshold,
    )


def _implied_by_policy(options: argparse.Namespace, device: str) -> RewardSource:
    from pipeline.evaluation.implicit_reward_scorer import ImplicitRewardScorer, require_scorable
    from pipeline.objectives.implicit_rewards import IMPLICIT_FORMS

    if options.form is None:
        raise ConfigError(f"--policy needs --form, the method it was aligned with: {', '.join(IMPLICIT_FORMS)}")
    form, beta = IMPLICIT_FORMS[options.form], 1.0 if options.beta is None else options.beta
    if form.needs_reference and options.reference is None:
        raise ConfigError(
            f"--form {options.form} is {form.formula}, where lr comes from the reference. Give --reference, the "
            "checkpoint from which the policy was aligned."
        )
    if options.reference is not None and not form.needs_reference:
        raise ConfigError(f"--form {options.form} is {form.formula}, which reads no reference. Leave --reference out.")
    if not (math.isfinite(beta) and beta > 0.0):
        raise ConfigError(f"--beta {beta:g}: beta is > 0. At 0 all rewards are equal; below 0 their order is reversed.")
    require_scorable(options.policy, options.reference)
    read = [options.policy, *([] if options.reference is None else [options.reference])]
    return RewardSource(
        identity=f"{'+'.join(map(_checkpoint_identity, read))}/{options.form}/{beta:g}/{device}",
        record={"policy": options.policy, "reference": options.reference, "form": options.form, "beta": beta},
        load=lambda: ImplicitRewardScorer.load(
            options.policy,
            options.reference,
            form,
            beta=beta,
            max_tokens_per_batch=options.max_tokens_per_batch,
            device=device,
        ),
        objectives=(),
        answer_threshold=None,
    )


def _checkpoint_identity(checkpoint: str) -> str:
    """The contents of a directory, else the name of a hub or of a wheel."""
    return directory_fingerprint(checkpoint)[:16] if Path(checkpoint).is_dir() else checkpoint


def evaluate_reward_model(options: argparse.Namespace) -> str:
    """Scores, aggregates, writes; returns the table of results. Checks all input before a model is loaded."""
    require_one_source(options)
    if options.model is not None:
        check_reward_model(options.model)
    for checkpoint in filter(None, (options.policy, options.reference)):
        check_checkpoint(checkpoint)
    comparisons = comparisons_of(options)
    left_out: Counter[LeftOut] = Counter()
    found = survey(comparisons.read(left_out), options.benchmark)
    require_few_faults(
        len(found.content_key), left_out, ", ".join(comparisons.files), options.max_left_out, setting="--max-left-out"
    )
    # torch is imported behind --help, and behind what is wrong with the input.
    from pipeline.evaluation.annotated_reasons import annotated_reasons
    from pipeline.evaluation.scored_rows_file import (
        read_pair_scores,
        read_scored_rows,
        shared_prompts_note,
        write_scored_rows,
    )

    source = reward_source(options, scoring_device(options.device))
    notes = list(found.notes)
    if left_out:
        notes.append(f"left out of the comparisons: {left_out_counts(left_out)}")
    if options.trained_on:
        notes.append(shared_prompts_note(found.prompt_keys, options.trained_on))
    other = None
    if options.compare:
        other_rows, other = read_scored_rows(options.compare)
        other_rows = other_rows.in_order_of(found.content_key, place=str(options.compare))

    options.out.mkdir(parents=True, exist_ok=True)
    rows_file, metrics_file = options.out / "rows.jsonl", options.out / "metrics.json"
    write_scored_rows(
        comparisons.read(None),
        rows_file,
        scored_by=source.identity,
        load_scorer=source.load,
        report=progress(len(found.content_key)),
    )
    rows, _ = read_scored_rows(rows_file)
    evaluation = evaluate(rows, options.benchmark, seed=options.seed, answer_threshold=source.answer_threshold)
    reasons = (
        annotated_reasons(read_pair_scores(rows_file), comparisons.read(None), source.objectives, comparisons.gold)
        if rows.are_pairs
        else {}
    )
    differences = {} if other is None else metric_differences(rows, other_rows, options.benchmark, seed=options.seed)
    record = {
        **source.record,
        "scored_by": source.identity,
        "benchmark": options.benchmark,
        "recipe": options.recipe,
        "files": comparisons.files,
        "seed": options.seed,
        "notes": notes,
        "left_out": dict(left_out),
        **headline_metrics(evaluation, reasons),
        **as_json(evaluation),
        "compared_with": other,
        "differences": as_json(differences),
    }
    metrics_file.write_text(json.dumps(record, indent=1) + "\n")
    return "\n".join([evaluation_table(evaluation, differences, reasons), "", *notes, f"{rows_file}, {metrics_file}"])


@dataclass(frozen=True, kw_only=True)
class Comparisons:
    """What a model is evaluated on."""

    read: Callable[[Counter[LeftOut] | None], Iterable[EvaluationExample]]
    """The examples from the first on; counts what is left out, by reason."""
    files: Mapping[str, str]
    """File -> fingerprint of its content."""
    gold: GoldAnnotator | None
    """The truth, where it is known."""


def comparisons_of(options: argparse.Namespace) -> Comparisons:
    """The rows of the files, or the held-out pairs of the recipe.

    Raises:
        ConfigError, DataError: as `load_data`.
    """
    from pipeline.data.run_data import load_data

    if options.recipe:
        data = load_data(load_recipe(options.recipe, options.overrides))
        examples = examples_of_pairs(data.heldout_pairs)
        return Comparisons(read=lambda left_out: examples, files={}, gold=data.gold)
    subset_field = options.subset_field or ("domain" if options.benchmark == "rm_bench" else None)
    return Comparisons(
        read=lambda left_out: read_examples(options.pairs, subset_field=subset_field, left_out=left_out),
        files={file: content_fingerprint(file) for file in options.pairs},
        gold=None,
    )


def scoring_device(name: str | None) -> str:
    """The device of that name, or the best there is.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    from pipeline.learning.memory import keep_freed_memory

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU. Leave it out to score on the CPU.")
    keep_freed_memory(torch.device(device))
    return device


def progress(total: int) -> Callable[[int, int], None]:
    """Prints a line every few seconds."""
    started = printed = time.monotonic()

    def report(done: int, kept: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed < SECONDS_BETWEEN_LINES and done < total:
            return
        printed, left = now, (now - started) * (total - done) / (done - kept)
        print(f"evaluate_reward_model  {done:,}/{total:,} rows  {as_clock(left)} left", flush=True)

    return report


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="result directory of train_reward_model")
    parser.add_argument("--policy", metavar="DIR", help="in place of --model: a policy, scored by what it implies")
    parser.add_argument("--reference", metavar="DIR", help="the checkpoint from which the policy was aligned")
    forms = get_args(ImplicitRewardName)
    parser.add_argument("--form", choices=forms, metavar="METHOD", help="its method, as in alignment.algorithm")
    parser.add_argument("--beta", type=float, metavar="B", help="scale of implied rewards (1)")
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--pairs", nargs="+", metavar="FILE", help=".jsonl or .parquet, or directories")
    complete_with(rows.add_argument("--recipe", metavar="NAME", help="its held-out pairs"), recipe_names)
    add_overrides(parser, "of the recipe")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for rows.jsonl and metrics.json")
    benchmarks = sorted(REWARD_BENCHMARKS)
    parser.add_argument(
        "--benchmark", choices=benchmarks, default="pairs", metavar="NAME", help=f"one of {', '.join(benchmarks)}"
    )
    parser.add_argument("--subset-field", metavar="NAME", help="names the subset")
    parser.add_argument("--compare", type=Path, metavar="ROWS", help="rows.jsonl of another model on the same rows")
    parser.add_argument("--trained-on", nargs="+", default=(), metavar="FILE", help="count prompts shared with these")
    parser.add_argument(
        "--max-left-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of rows with an empty response, or one on both sides (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    default_tokens = ScoringConfig().max_tokens_per_batch
    parser.add_argument("--max-tokens-per-batch", type=int, default=default_tokens, metavar="N", help="(%(default)s)")


evaluate_reward_model_command = Command(
    documentation=__doc__,
    add_options=_add_options,
    run=lambda options: print("\n" + evaluate_reward_model(options)),
)

if __name__ == "__main__":
    evaluate_reward_model_command()
