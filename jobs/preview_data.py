"""The data of a recipe as its models will see it: sources, scores, lengths, overlap with evaluation files, and rows.

    python jobs/preview_data.py smollm2_cpu
    vrm preview smollm2_cpu --rows 5 data.heldout_fraction=0.1

Reads all files that a run would read, and refuses what the run would refuse. No Ray, no model: the tokenizer alone.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jobs.command_line import Command, add_overrides, add_recipe
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview_data(recipe: Recipe, *, rows: int) -> str:
    """The text of the preview.

    Raises:
        DataError: a file cannot be used.
        CheckpointError: a tokenizer cannot be loaded.
    """
    # torch is imported behind --help.
    from pipeline.data.chat_rendering import require_chat_template
    from pipeline.data.preview import Preview
    from pipeline.data.run_data import load_data

    data = load_data(recipe)
    policy = _tokenizer(recipe.policy.checkpoint)
    reward = policy if recipe.reward.backbone is None else _tokenizer(recipe.reward.backbone)
    for tokenizer in (policy, reward):
        require_chat_template(tokenizer)
    return Preview(experiment=recipe, data=data, reward_tokenizer=reward, policy_tokenizer=policy, rows=rows).text()


def _tokenizer(checkpoint: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, or that of the tiny policy that is made from scratch."""
    from pipeline.data.planted import build_tokenizer
    from pipeline.models.backbone import load_tokenizer
    from pipeline.stages import storage

    if checkpoint is None:
        return build_tokenizer()
    with storage.reading(checkpoint) as directory:
        return load_tokenizer(directory)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, "recipe", help="a name (`vrm recipes` lists them), or a path to a .yaml file")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="training pairs of each source to show (2)")
    add_overrides(parser, "of the recipe, as in data.heldout_fraction=0.1")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.rows < 0:
        raise ConfigError(f"--rows {options.rows}: give 0 or more")


preview_command = Command(
    documentation=__doc__,
    add_options=_add_options,
    check_options=_check_options,
    run=lambda options: print(preview_data(load_recipe(options.recipe, options.overrides), rows=options.rows)),
)

if __name__ == "__main__":
    preview_command()
