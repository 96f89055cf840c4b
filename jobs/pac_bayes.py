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
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import CheckpointError, ConfigError, PipelineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.models.reward_model import RewardModelCard
    from pipeline.records import PreferencePair


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options that make sense together.

    Raises:
        ConfigError: no data or twice data, or a number outside its range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="result directory of train_reward_model, or a pyarrow.fs URI")
    parser.add_argument("--recipe", help="the data of this recipe: a name in jobs/recipes, or a path to a .yaml file")
    parser.add_argument("--train", nargs="+", default=[], metavar="FILE", help="JSONL or Parquet of training pairs")
    parser.add_argument("--heldout", nargs="+", default=[], metavar="FILE", help="JSONL or Parquet of held-out pairs")
    parser.add_argument("--format", choices=("pairs", "helpsteer2", "ultrafeedback"), help="of the files; pairs")
    parser.add_argument("--delta", type=float, default=0.05, help="each bound holds with probability 1 - delta")
    parser.add_argument("--samples", type=int, default=8, help="posterior draws a pair, at least 2")
    parser.add_argument("--seed", type=int, default=0, help="of the posterior draws")
    parser.add_argument("--max-tokens-per-batch", type=int, default=16384)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default="pac_bayes.json")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the recipe")
    options = parser.parse_intermixed_args(arguments)
    has_files = bool(options.train and options.heldout) and not options.overrides
    if (options.train or options.heldout or options.format) if options.recipe else not has_files:
        raise ConfigError(
            "name the data once: either --recipe NAME with its overrides, or --train FILE and --heldout FILE"
        )
    if not 0.0 < options.delta < 1.0:
        raise ConfigError(f"--delta {options.delta}: the bounds hold with probability 1 - delta; give 0 < delta < 1")
    if options.samples < 2:
        raise ConfigError(f"--samples {options.samples}: the standard error of the Gibbs risk needs at least 2 draws")
    return options


def load_pairs(
    options: argparse.Namespace, recipe: Recipe | None, card: RewardModelCard
) -> tuple[Sequence[PreferencePair], Sequence[PreferencePair]]:
    """(training, held-out) pairs."""
    from pipeline.data.preferences import read_pairs
    from pipeline.data.run_data import load_data

    if recipe is None:
        train, heldout = (
            read_pairs(files, options.format or "pairs", card.objectives, hub=False, seed=options.seed)
            for files in (options.train, options.heldout)
        )
        return train, heldout
    if recipe.objectives != card.objectives:
        raise ConfigError(
            f"{options.model} was trained on the objectives {', '.join(card.objectives)}, recipe {recipe.name} has "
            f"{', '.join(recipe.objectives)}: it is not the recipe of this model."
        )
    data = load_data(recipe)
    return data.train_pairs, data.heldout_pairs


def measure(options: argparse.Namespace, recipe: Recipe | None) -> str:
    """Writes the report, returns it in words."""
    import torch

    from pipeline.data.collate import tokenise_pairs
    from pipeline.data.files import content_fingerprint
    from pipeline.data.preferences import first_of_each_prompt, shared_prompts
    from pipeline.data.score_statistics import ScoreStatistics
    from pipeline.evaluation.pac_bayes_report import pac_bayes_report, pac_bayes_text
    from pipeline.evaluation.posterior_risk import posterior_risk
    from pipeline.models.reward_model import load_reward_model, read_card
    from pipeline.stages import storage
    from pipeline.stages.runner import installed_versions

    with storage.reading(options.model) as directory:
        card = read_card(directory)
        if card.head != "vrm":
            raise CheckpointError(
                f"{options.model} has a {card.head!r} head, and no posterior to bound. "
                "Give the result of a run with reward.head=vrm."
            )
        pairs, heldout_pairs = load_pairs(options, recipe, card)
        ScoreStatistics.of(pairs, card.objectives).require_scale_of(
            card.score_mean, card.score_std, place=", ".join(options.train) or f"the data of recipe {options.recipe}"
        )
        dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
        model, tokenizer, _ = load_reward_model(directory, dtype=dtype)
        model_fingerprint = content_fingerprint(directory)
    # As in training: pairs that are too long were not trained on, while held-out ones lose the start of their prompt.
    training = tokenise_pairs(pairs, tokenizer, max_length=card.max_length, drop_too_long=True)
    heldout = tokenise_pairs(
        first_of_each_prompt(heldout_pairs), tokenizer, max_length=card.max_length, drop_too_long=False
    )
    print(
        f"measuring {len(training):,} of {len(pairs):,} training pairs, "
        f"and one of the {len(heldout_pairs):,} held-out pairs for each of {len(heldout):,} prompts\n",
        flush=True,
    )
    risks = [
        posterior_risk(
            model,
            side,
            prior=card.vrm,
            samples=options.samples,
            seed=options.seed,
            max_tokens_per_batch=options.max_tokens_per_batch,
            device=options.device,
        )
        for side in (training, heldout)
    ]
    shared = shared_prompts((p.pair.prompt for p in training), (p.pair.prompt for p in heldout))
    report = pac_bayes_report(*risks, delta=options.delta, shared_prompts=shared)
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


def main() -> None:
    try:
        options = parse()
        recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
        print(measure(options, recipe))
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"\nreport: {options.output}")


if __name__ == "__main__":
    main()
