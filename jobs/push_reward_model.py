"""Puts a trained reward model on the Hugging Face hub, with a model card that is written from its own numbers.

    vrm push runs/tiny acme/tiny-reward --dry-run            # prints the card
    HF_TOKEN=... vrm push runs/tiny acme/tiny-reward --licence apache-2.0

A new repository is private unless --public is given. Only safetensors, JSON and the tokenizer's files are uploaded.
"""

from __future__ import annotations

import argparse

from jobs.command_line import Command


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="result directory of train_reward_model, or a workspace")
    parser.add_argument("repo", help="owner/name on the hub")
    parser.add_argument("--licence", metavar="ID", help="an identifier of the hub, such as apache-2.0")
    parser.add_argument("--public", action="store_true", help="everybody may read it")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the files, and stop")


def push(options: argparse.Namespace) -> None:
    from pipeline.reporting.hub import prepare_publication, publish

    publication = prepare_publication(options.directory, options.repo, licence=options.licence)
    if options.dry_run:
        print(publication.page)
        for file in publication.files:
            print(f"{file.stat().st_size:>14,} bytes  {file.name}")
    else:
        print(publish(publication, public=options.public), flush=True)


push_reward_model_command = Command(documentation=__doc__, add_options=_add_options, run=push)

if __name__ == "__main__":
    push_reward_model_command()
