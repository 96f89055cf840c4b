"""The PAC-Bayes bound of a trained VRM (VRM Eqs. 15-20), what it is worth, and a held-out bound that holds.

    python jobs/pac_bayes.py --model runs/tiny/stages/train_reward_model-.../result --recipe tiny
    python jobs/pac_bayes.py --model ... --train train.jsonl --heldout heldout.jsonl

A recipe names the data of a run, split as the run split it; overrides as in `data.max_pairs=1000` may follow.
Writes pac_bayes.json and prints what it says.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from jobs.command_line import Command, add_overrides, add_recipe
from pipeline.config.data import DataConfig, SourceConfig
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.data.recipe_files import check_data, pair_file
from pipeline.errors import ConfigError
from pipeline.models.checkpoint_files import check_reward_model
from pipeline.models.reward_model_card import require_posterior
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.tracking.progress import as_clock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.models.reward_model_card import RewardModelCard
    from pipeline.records import PreferencePair


SECONDS_BETWEEN_LINES = 5.0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="result directory of train_reward_model, or a pyarrow.fs URI")
    add_recipe(parser, help="the data of this recipe: a name, or a path to a .yaml file")
    parser.add_argument("--train", nargs="+", default=[], metavar="FILE", help="JSONL or Parquet of training pairs")
    parser.add_argument("--heldout", nargs="+", default=[], metavar="FILE", help="JSONL or Parquet of held-out pairs")
    parser.add_argument("--format", choices=("pairs", "helpsteer2", "ultrafeedback"), help="of the files; pairs")
    parser.add_argument(
        "--delta", type=float, default=0.05, metavar="P", help="each bound holds with probability 1 - delta"
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="posterior draws a pair, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="of the posterior draws")
    parser.add_argument("--max-tokens-per-batch", type=int, default=16384, metavar="N", help="(%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(%(default)s)")
    parser.add_argument("--output", default="pac_bayes.json", metavar="FILE", help="the report (%(default)s)")
    add_overrides(parser, "of the recipe")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: no data or twice data, or a number outside its range.
    """
    has_files = bool(options.train and options.heldout) and not options.overrides
    if (options.train or options.heldout or options.format) if options.recipe else not has_files:
        raise ConfigError(
            "name the data once: either --recipe NAME with its overrides, or --train FILE and --heldout FILE"
        )
    if not 0.0 < options.delta < 1.0:
        raise ConfigError(f"--delta {options.delta}: the bounds hold with probability 1 - delta; give 0 < delta < 1")
    if options.samples < 2:
        raise ConfigError(f"--samples {options.samples}: the standard error of the Gibbs risk needs at least 2 draws")


def check_pairs(options: argparse.Namespace, recipe: Recipe | None, card: RewardModelCard) -> None:
    """Looks at the first rows of each file.

    Raises:
        ConfigError: the recipe is not the model's.
        DataError: a file cannot be used.
    """
    if recipe is None:
        for file in (*options.train, *options.heldout):
            source = SourceConfig(name="pairs", path=file, format=options.format or "pairs")
            pair_file(file, source, card.objectives).look_at()
        return
    if card.objectives not in (recipe.objectives, recipe.factor_names):
        raise ConfigError(
            f"{options.model} was trained on the objectives {', '.join(card.objectives)}, recipe {recipe.name} has "
            f"{', '.join(recipe.objectives)}: it is not the recipe of this model."
        )
    check_data(recipe)


def load_pairs(
    options: argparse.Namespace, recipe: Recipe | None, card: RewardModelCard
) -> tuple[Sequence[PreferencePair], Sequence[PreferencePair], Sequence[str]]:
    """(training pairs, held-out pairs, a sentence about every source)."""
    from pipeline.data.run_data import load_data
    from pipeline.data.sources import read_source

    if recipe is None:
        train, heldout = (
            [
                read_source(
                    SourceConfig(name=f"{side}_{number}", path=file, format=options.format or "pairs"),
                    file,
                    card.objectives,
                    seed=options.seed,
                    max_left_out=DataConfig().max_left_out,
                )
                for number, file in enumerate(files, start=1)
            ]
            for side, files in (("train", options.train), ("heldout", options.heldout))
        )
        training, tested = ([pair for source in side for pair in source.pairs] for side in (train, heldout))
        return training, tested, [source.note() for source in (*train, *heldout)]
    data = load_data(recipe)
    return data.train_pairs, data.heldout_pairs, data.source_notes


def measure_model(options: argparse.Namespace) -> str:
    """Writes the report, returns it in words."""
    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    with storage.reading(options.model) as directory:
        card = check_reward_model(directory)
        require_posterior(card, options.model)
        check_pairs(options, recipe, card)
        # torch is imported behind --help, and behind what is wrong with the input.
        import torch

        from pipeline.data.score_statistics import MixtureStatistics
        from pipeline.evaluation.pac_bayes_measurement import MeasuredPairs, measure_pac_bayes
        from pipeline.evaluation.pac_bayes_report import pac_bayes_text
        from pipeline.evaluation.posterior_risk import posterior_risk
        from pipeline.models.reward_model import load_reward_model
        from pipeline.stages.runner import installed_versions

        training, heldout, notes = load_pairs(options, recipe, card)
        for name, found in MixtureStatistics.of(training, card.objectives).sources.items():
            known = card.score_statistics.get(name)
            mean, std = (known.mean, known.std) if known else (card.score_mean, card.score_std)
            place = f"source {name} of recipe {options.recipe}" if recipe else ", ".join(options.train)
            found.require_scale_of(mean, std, place=place)
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        model, tokenizer, _ = load_reward_model(directory, dtype=dtype)
        model_fingerprint = directory_fingerprint(directory)
    pairs = MeasuredPairs.of(training, heldout, tokenizer, max_length=card.max_length)
    print(
        f"measuring {len(pairs.training):,} of {len(training):,} training pairs, "
        f"and one of the {len(heldout):,} held-out pairs for each of {len(pairs.heldout):,} prompts\n",
        flush=True,
    )
    for note in notes:
        print(note, flush=True)
    risk_of = partial(
        posterior_risk,
        model,
        prior=card.vrm,
        samples=options.samples,
        seed=options.seed,
        max_tokens_per_batch=options.max_tokens_per_batch,
        device=options.device,
        report=progress(len(pairs.training) + len(pairs.heldout)),
    )
    report = measure_pac_bayes(pairs, risk_of, delta=options.delta)
    record = {
        "model": options.model,
        "model_fingerprint": model_fingerprint,
        "versions": installed_versions(),
        "seed": options.seed,
        **asdict(report),
    }
    output = options.output if "://" in options.output else os.path.abspath(options.output)
    storage.write_text(output, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return pac_bayes_text(report)


def progress(total: int) -> Callable[[int], None]:
    """Prints a line every few seconds. The training pairs are counted first, then the held-out pairs from 1 again."""
    started = printed = time.monotonic()
    before = last = 0

    def report(num_measured: int) -> None:
        nonlocal printed, before, last
        if num_measured < last:
            before += last
        last, now = num_measured, time.monotonic()
        done = before + num_measured
        if now - printed >= SECONDS_BETWEEN_LINES or done == total:
            printed, left = now, (now - started) * (total - done) / done
            print(f"pac_bayes  {done:,}/{total:,} pairs  {as_clock(left)} left", flush=True)

    return report


def _measure_and_report(options: argparse.Namespace) -> None:
    print(measure_model(options))
    print(f"\nreport: {options.output}")


pac_bayes_command = Command(
    documentation=__doc__, add_options=_add_options, check_options=_check_options, run=_measure_and_report
)

if __name__ == "__main__":
    pac_bayes_command()
