"""A reward model on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.checkpoint_files import HUB_NAME, check_reward_model, find_reward_model
from pipeline.reporting.model_card import PublishedModel, model_card
from pipeline.stages.workspace import MANIFEST_FILE

PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "modeling_*.py")
"""The files of a checkpoint that are uploaded; modeling_vrm_reward.py makes it readable for transformers."""
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CARD_PAGE = "README.md"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What an upload would put into a repository."""

    repo: str
    page: str
    """The model card, Markdown."""
    files: tuple[Path, ...]


def prepare_publication(directory: str, repo: str, *, licence: str | None = None) -> Publication:
    """Checks a checkpoint and writes its model card; sends nothing.

    Args:
        directory: a checkpoint, or a workspace whose newest finished reward model is taken.
        repo: the repository, owner/name or name.
        licence: an identifier of the hub, such as apache-2.0.

    Raises:
        ConfigError: `repo` is no name of a repository.
        CheckpointError: the directory is no whole reward model, or holds pickled weights.
    """
    if not HUB_NAME.fullmatch(repo) or len(repo) > 96 or ".." in repo or "--" in repo or repo.endswith((".", "-")):
        raise ConfigError(f"{repo!r} is no repository of the hub. Write owner/name, as in acme/safety-reward.")
    found = Path(find_reward_model(directory))
    card = check_reward_model(str(found))
    pickled = sorted(file.name for file in found.iterdir() if file.suffix in PICKLED)
    if pickled:
        raise CheckpointError(
            f"{found} holds {', '.join(pickled)}: pickled files run code when they are loaded. Only safetensors are "
            "published; move the others away."
        )
    manifest = found.parent / MANIFEST_FILE
    known = json.loads(manifest.read_text()) if manifest.is_file() else {}
    model = PublishedModel(
        repo=repo,
        card=card,
        config=known.get("config", {}),
        metrics=card.metrics | known.get("metrics", {}),
        licence=licence,
    )
    files = sorted({file for pattern in PUBLISHED for file in found.glob(pattern)})
    return Publication(repo=repo, page=model_card(model), files=tuple(files))


def publish(publication: Publication, *, public: bool = False) -> str:
    """Uploads a publication in one commit; returns its address.

    Args:
        public: everybody may read it. Otherwise a new repository is private, and an existing public one is refused.

    Raises:
        ConfigError: there is no token, the hub refuses it or cannot be reached, or the repository is public already.
    """
    from httpx import TransportError
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = get_token()
    if not token:
        raise ConfigError("there is no token of the hub. Set HF_TOKEN to one that may write, or run `hf auth login`.")
    api = HfApi(token=token, library_name="vrm-pipeline")
    try:
        url = api.create_repo(publication.repo, private=not public, exist_ok=True)
        if not public and not api.model_info(url.repo_id).private:
            raise ConfigError(
                f"{url.repo_id} exists and everybody may read it. Pass --public to publish there, or name another."
            )
        operations = [
            CommitOperationAdd(CARD_PAGE, publication.page.encode()),
            *(CommitOperationAdd(file.name, str(file)) for file in publication.files),
        ]
        api.create_commit(url.repo_id, operations, commit_message="Upload a reward model with its card")
    except OfflineModeIsEnabled as error:
        raise ConfigError("HF_HUB_OFFLINE keeps this process off the hub. Unset it to push.") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"{constants.ENDPOINT} refuses {publication.repo}: {error}") from error
    except ValueError as error:  # the hub has looked at the metadata of the card
        raise ConfigError(
            f"{constants.ENDPOINT} refuses the card: {error}. Is the licence one that it knows?"
        ) from error
    except TransportError as error:
        raise ConfigError(
            f"{constants.ENDPOINT} cannot be reached: {error}. Check HF_ENDPOINT and the network."
        ) from error
    return str(url)


def push_reward_model(
    directory: str | os.PathLike[str], repo: str, *, licence: str | None = None, public: bool = False
) -> str:
    """Puts a reward model on the hub with a card written from its own; returns its address. HF_TOKEN is its token.

    Raises:
        ConfigError, CheckpointError: as `prepare_publication` and `publish`.
    """
    return publish(prepare_publication(os.fspath(directory), repo, licence=licence), public=public)
