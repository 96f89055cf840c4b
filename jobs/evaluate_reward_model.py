"""A reward model on comparisons: RewardBench, RewardBench 2, RM-Bench, or pairs of your own.

    python jobs/evaluate_reward_model.py --model runs/tiny/stages/train_reward_model-.../result \\
        --pairs pairs.jsonl --out runs/eval-vrm
    python jobs/evaluate_reward_model.py --model .../other/result --pairs pairs.jsonl --out runs/eval-bt \\
        --compare runs/eval-vrm/rows.jsonl

A row is {"prompt": text | messages, "chosen": ..., "rejected": ..., "subset", "id"}. Chosen and rejected are a text, a
conversation that ends with the response, or a list of texts. Writes rows.jsonl (the scores) and metrics.json; the same
command again continues where it stopped. One process, no Ray.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from jobs.command_line import Command
from pipeline.config.cluster import ScoringConfig
from pipeline.errors import ConfigError
from pipeline.evaluation.reward_evaluation import (
    REWARD_BENCHMARKS,
    as_json,
    evaluate,
    evaluation_table,
    metric_differences,
    survey,
)
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.stages.metrics_log import as_clock

SECONDS_BETWEEN_LINES = 5.0


def evaluate_reward_model(options: argparse.Namespace) -> str:
    """Scores, aggregates, writes; returns the table of results. Checks all input before a model is loaded."""
    # torch is imported behind --help.
    from pipeline.data.evaluation_examples import read_examples
    from pipeline.data.files import content_fingerprint
    from pipeline.data.preferences import LeftOut, left_out_counts, require_few_faults
    from pipeline.evaluation.reward_scorer import RewardModelScorer
    from pipeline.evaluation.scored_rows_file import read_scored_rows, shared_prompts_note, write_scored_rows
    from pipeline.models.reward_model import read_card

    device = scoring_device(options.device)
    read_card(options.model)
    subset_field = options.subset_field or ("domain" if options.benchmark == "rm_bench" else None)
    left_out: Counter[LeftOut] = Counter()
    examples = read_examples(options.pairs, subset_field=subset_field, left_out=left_out)
    found = survey(examples, options.benchmark)
    require_few_faults(
        len(found.content_key), left_out, ", ".join(options.pairs), options.max_left_out, setting="--max-left-out"
    )
    notes = list(found.notes)
    if left_out:
        notes.append(f"left out of the comparisons: {left_out_counts(left_out)}")
    if options.trained_on:
        notes.append(shared_prompts_note(found.prompt_keys, options.trained_on))
    other = None
    if options.compare:
        other_rows, other = read_scored_rows(options.compare)
        other_rows = other_rows.in_order_of(found.content_key, place=str(options.compare))

    scored_by = f"{directory_fingerprint(options.model)[:16]}/{device}"
    options.out.mkdir(parents=True, exist_ok=True)
    rows_file, metrics_file = options.out / "rows.jsonl", options.out / "metrics.json"
    write_scored_rows(
        read_examples(options.pairs, subset_field=subset_field),
        rows_file,
        scored_by=scored_by,
        load_scorer=lambda: RewardModelScorer.load(
            options.model, max_tokens_per_batch=options.max_tokens_per_batch, device=device
        ),
        report=progress(len(found.content_key)),
    )
    rows, _ = read_scored_rows(rows_file)
    evaluation = evaluate(rows, options.benchmark, seed=options.seed)
    differences = {} if other is None else metric_differences(rows, other_rows, options.benchmark, seed=options.seed)
    record = {
        "model": options.model,
        "scored_by": scored_by,
        "benchmark": options.benchmark,
        "files": {file: content_fingerprint(file) for file in options.pairs},
        "seed": options.seed,
        "notes": notes,
        "left_out": dict(left_out),
        **as_json(evaluation),
        "compared_with": other,
        "differences": as_json(differences),
    }
    metrics_file.write_text(json.dumps(record, indent=1) + "\n")
    return "\n".join([evaluation_table(evaluation, differences), "", *notes, f"{rows_file}, {metrics_file}"])


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
    parser.add_argument("--model", required=True, metavar="DIR", help="result directory of train_reward_model")
    parser.add_argument("--pairs", required=True, nargs="+", metavar="FILE", help=".jsonl or .parquet, or directories")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="for rows.jsonl and metrics.json")
    parser.add_argument(
        "--benchmark", choices=sorted(REWARD_BENCHMARKS), default="pairs", help="how rows are aggregated"
    )
    parser.add_argument("--subset-field", metavar="NAME", help="names the subset (subset, for rm_bench domain)")
    parser.add_argument("--compare", type=Path, metavar="ROWS", help="rows.jsonl of another model on the same rows")
    parser.add_argument("--trained-on", nargs="+", default=(), metavar="FILE", help="count prompts shared with these")
    parser.add_argument(
        "--max-left-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the rows, that may have an empty response or the same on both sides (%(default)s)",
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
