"""A reward model on comparisons: RewardBench, RewardBench 2, RM-Bench, or pairs of your own.

    python jobs/evaluate_reward_model.py --model runs/tiny/stages/train_reward_model-.../result \\
        --pairs pairs.jsonl --out runs/eval-vrm
    python jobs/evaluate_reward_model.py --model .../other/result --pairs pairs.jsonl --out runs/eval-bt \\
        --compare runs/eval-vrm/rows.jsonl

A row is {"prompt": text | messages, "chosen": ..., "rejected": ..., "subset", "id"}; chosen and rejected are a text, a
conversation that ends with the response, or a list of texts. Writes rows.jsonl (the scores) and metrics.json; the same
command again goes on where it stopped. One process, no Ray.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.config.cluster import ScoringConfig
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.reward_evaluation import (
    REWARD_BENCHMARKS,
    as_json,
    evaluate,
    evaluation_table,
    metric_differences,
    survey,
)
from pipeline.stages.metrics_log import as_clock

SECONDS_BETWEEN_LINES = 5.0


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="result directory of train_reward_model")
    parser.add_argument("--pairs", required=True, nargs="+", metavar="FILE", help=".jsonl or .parquet, or directories")
    parser.add_argument("--out", required=True, type=Path, help="directory for rows.jsonl and metrics.json")
    parser.add_argument(
        "--benchmark", choices=sorted(REWARD_BENCHMARKS), default="pairs", help="how rows are aggregated"
    )
    parser.add_argument("--subset-field", help="field that names the subset; default subset, for rm_bench domain")
    parser.add_argument("--compare", type=Path, metavar="ROWS", help="rows.jsonl of another model on the same rows")
    parser.add_argument("--trained-on", nargs="+", default=(), metavar="FILE", help="count prompts shared with these")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    parser.add_argument("--max-tokens-per-batch", type=int, default=ScoringConfig().max_tokens_per_batch)
    return parser.parse_args(arguments)


def evaluate_reward_model(asked: argparse.Namespace) -> str:
    """Scores, aggregates, writes; the table of results. All that can be wrong with the input is found before a model
    is loaded."""
    # torch is imported behind --help.
    import numpy as np
    import torch

    from pipeline.data.evaluation_examples import prompt_key, read_comparisons
    from pipeline.data.files import content_fingerprint
    from pipeline.data.prompts import read_prompts
    from pipeline.evaluation.reward_scorer import RewardModelScorer
    from pipeline.evaluation.scored_rows import key_column
    from pipeline.evaluation.scored_rows_file import read_scored_rows, write_scored_rows
    from pipeline.learning.memory import keep_freed_memory
    from pipeline.models.reward_model import read_card

    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU. Leave it out to score on the CPU.")
    keep_freed_memory(torch.device(device))
    read_card(asked.model)
    subset_field = asked.subset_field or ("domain" if asked.benchmark == "rm_bench" else None)
    seen = survey(read_comparisons(asked.pairs, subset_field=subset_field), asked.benchmark)
    notes = list(seen.notes)
    if asked.trained_on:
        trained_on = key_column(prompt_key(messages) for _, messages in read_prompts(asked.trained_on))
        shared = np.intersect1d(seen.prompt_keys, trained_on)
        notes.append(f"{len(shared)} of {len(seen.prompt_keys)} prompts also stand in the training files")
    other = None
    if asked.compare:
        other_rows, other = read_scored_rows(asked.compare)
        other_rows = other_rows.in_order_of(seen.content_key, place=str(asked.compare))

    scored_by = f"{content_fingerprint(asked.model)[:16]}/{device}"
    asked.out.mkdir(parents=True, exist_ok=True)
    rows_file, metrics_file = asked.out / "rows.jsonl", asked.out / "metrics.json"
    write_scored_rows(
        read_comparisons(asked.pairs, subset_field=subset_field),
        rows_file,
        scored_by=scored_by,
        load_scorer=lambda: RewardModelScorer.load(
            asked.model, max_tokens_per_batch=asked.max_tokens_per_batch, device=device
        ),
        report=progress(len(seen.content_key)),
    )
    rows, _ = read_scored_rows(rows_file)
    evaluation = evaluate(rows, asked.benchmark, seed=asked.seed)
    differences = {} if other is None else metric_differences(rows, other_rows, asked.benchmark, seed=asked.seed)
    record = {
        "model": asked.model,
        "scored_by": scored_by,
        "benchmark": asked.benchmark,
        "files": {file: content_fingerprint(file) for file in asked.pairs},
        "seed": asked.seed,
        "notes": notes,
        **as_json(evaluation),
        "compared_with": other,
        "differences": as_json(differences),
    }
    metrics_file.write_text(json.dumps(record, indent=1) + "\n")
    return "\n".join([evaluation_table(evaluation, differences), "", *notes, f"{rows_file}, {metrics_file}"])


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


def main(arguments: Sequence[str] | None = None) -> None:
    asked = options(arguments)
    try:
        print("\n" + evaluate_reward_model(asked))
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
