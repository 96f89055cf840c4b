"""The reward model: a decoder backbone, a head, and the card that describes them.

A checkpoint is a directory: `model.safetensors` (backbone.* and head.*), `reward_model.json` (the card), `config.json`
(the backbone's architecture, under `backbone`), the tokenizer's files, and a Python file for transformers alone
(`pipeline/models/transformers_form.py`). Nothing in it is a pickle, and this project runs none of its code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from pipeline.config.reward import EnsembleConfig, VRMHeadConfig
from pipeline.errors import CheckpointError
from pipeline.models.backbone import load_tokenizer, require_decoder
from pipeline.models.frozen_states import FrozenStates
from pipeline.models.onednn_linear import with_onednn
from pipeline.models.packing import PackedTokens, packed_states, prompt_and_response_states, use_packed_attention
from pipeline.models.reward_heads import (
    BradleyTerryAuxiliaryHead,
    BradleyTerryHead,
    EnsembleHead,
    GateHead,
    RegressionHead,
    RewardHead,
    RewardOutput,
    VRMHead,
)
from pipeline.models.reward_model_card import CARD_FILE, HeadKind, RewardModelCard, read_card
from pipeline.models.sharded_loading import Shards, WeightFiles, fill_in_shards, without_numbers
from pipeline.models.tensor_stream import TensorStream
from pipeline.models.transformers_auto import AutoConfig, AutoModel
from pipeline.models.transformers_form import MODEL_TYPE, MODELING_FILE, modeling_source, transformers_config

REWARD_MODEL_FILE = "model.safetensors"
STANDARD_ENSEMBLE = EnsembleConfig()


class RewardModel(nn.Module):
    """r(x, y) and its posterior from one causal pass over prompt and response (docs/method.md section 2)."""

    def __init__(self, backbone: PreTrainedModel, head: RewardHead, pooling: Literal["last", "mean"] = "last") -> None:
        """
        Args:
            pooling: the state of a response is that of its last token, or the mean over its tokens.
        """
        super().__init__()
        use_packed_attention(backbone)
        self.backbone = backbone
        self.head = head
        self.pooling: Literal["last", "mean"] = pooling
        self.frozen_states: FrozenStates | None = None
        """States of a backbone that does not train. Known states are not computed again."""

    def forward(self, packed: PackedTokens, noise_seeds: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Scores the R responses of packed groups; the weights of a response are those of its prompt.

        Args:
            packed: R responses, on the model's device.
            noise_seeds: [B] with R = 2B for one posterior sample per pair, or None for the posterior mean.

        Returns:
            The fields of `RewardOutput`, a row per response, as a plain tuple for the sake of ZeRO-3's hooks.
        """
        return tuple(self.head(*self.encode(packed), noise_seeds))

    def encode(self, packed: PackedTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, H] states at the last prompt token and of each response: what the head sees."""
        known = self.frozen_states.look_up(packed) if self.frozen_states else None
        if known is not None:
            return known
        return prompt_and_response_states(packed_states(self.backbone, packed), packed, self.pooling)


def make_head(
    kind: HeadKind,
    hidden_size: int,
    num_objectives: int,
    config: VRMHeadConfig,
    *,
    reward_weights: tuple[float, ...] = (),
    ensemble: EnsembleConfig = STANDARD_ENSEMBLE,
) -> RewardHead:
    """A new head; `reward_weights` are the regression head's."""
    match kind:
        case "vrm":
            return VRMHead(hidden_size, num_objectives, config)
        case "gate":
            return GateHead(hidden_size, num_objectives, config)
        case "regression":
            return RegressionHead(hidden_size, num_objectives, reward_weights)
        case "bt":
            return BradleyTerryHead(hidden_size)
        case "bt_aux":
            return BradleyTerryAuxiliaryHead(hidden_size, num_objectives)
        case "ensemble":
            return EnsembleHead(hidden_size, ensemble)


def score_packed(model: RewardModel, packed: PackedTokens) -> RewardOutput:
    """Posterior-mean scores of R responses, without gradient."""
    with torch.inference_mode():
        return RewardOutput(*model(packed))


def save_reward_model(
    directory: str,
    *,
    state_dict: Mapping[str, torch.Tensor],
    backbone_config: dict,
    tokenizer: PreTrainedTokenizerBase,
    card: RewardModelCard,
) -> None:
    """Writes a reward-model checkpoint; `state_dict` holds backbone.* and head.*."""
    write_reward_weights(directory, TensorStream.of(state_dict))
    describe_reward_model(directory, backbone_config=backbone_config, tokenizer=tokenizer, card=card)


def write_reward_weights(directory: str, weights: TensorStream) -> None:
    """The tensors of a reward-model checkpoint, backbone.* and head.*, in one file."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    weights.write(directory, file_bytes=math.inf)


def describe_reward_model(
    directory: str, *, backbone_config: dict, tokenizer: PreTrainedTokenizerBase, card: RewardModelCard
) -> None:
    """All files of a reward-model checkpoint but its tensors."""
    path = Path(directory)
    head = card.model_dump(mode="json", include={"vrm", "reward_weights", "ensemble", "pooling"})
    head |= {"kind": card.head, "num_objectives": len(card.objectives)}
    config = transformers_config(backbone=backbone_config, head=head, tokenizer=tokenizer)
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    (path / MODELING_FILE).write_text(modeling_source())
    (path / CARD_FILE).write_text(card.model_dump_json(indent=2))
    tokenizer.save_pretrained(directory)


def read_backbone_config(directory: str) -> PretrainedConfig:
    """The architecture of a reward model's decoder.

    Raises:
        CheckpointError: config.json is missing, cannot be read, or is that of another kind of model.
    """
    path = Path(directory) / "config.json"
    try:
        written = json.loads(path.read_text())
        if not isinstance(written, dict) or written.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{path} does not have the model_type {MODEL_TYPE!r}, so it is no reward model's. Give the result "
                "directory of train_reward_model; one that an earlier version wrote must be trained again."
            )
        config = AutoConfig.for_model(**written["backbone"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error!r}. The checkpoint is incomplete, or edited; export it again."
        ) from error
    require_decoder(config, directory)
    return config


def load_reward_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model.

    Raises:
        CheckpointError: as `load_tokenizer` and `read_backbone_config`.
    """
    return load_tokenizer(directory, config=read_backbone_config(directory))


def load_reward_model(
    directory: str, *, dtype: torch.dtype = torch.float32
) -> tuple[RewardModel, PreTrainedTokenizerBase, RewardModelCard]:
    """The model in eval mode, its tokenizer and its card; no hub is asked.

    Args:
        dtype: dtype of the backbone; the head is always float32.

    Raises:
        CheckpointError: files are missing or damaged, or the weights belong to another architecture.
    """
    card = read_card(directory)
    config = read_backbone_config(directory)
    # Every weight is read below: drawing random ones first would take a minute for four billion.
    with no_init_weights():
        backbone = AutoModel.from_config(config, dtype=dtype)
    head = make_head(
        card.head,
        config.hidden_size,
        len(card.objectives),
        card.vrm,
        reward_weights=card.reward_weights,
        ensemble=card.ensemble,
    )
    weights = Path(directory) / REWARD_MODEL_FILE
    architecture = (
        f"the architecture in {directory}/config.json and {CARD_FILE} (a {card.head!r} head for "
        f"{len(card.objectives)} objectives, {', '.join(card.objectives)})"
    )
    with _explained(weights, architecture):
        # Before `RewardModel(...)`, which runs the backbone on a few tokens to prove that it can be packed.
        nn.ModuleDict({"backbone": backbone, "head": head}).load_state_dict(load_file(weights))
    return RewardModel(with_onednn(backbone), head, card.pooling).eval(), load_reward_tokenizer(directory), card


def load_reward_backbone(directory: str, *, shards: Shards | None = None) -> PreTrainedModel:
    """The decoder of a reward model, float32: what a critic starts from.

    Args:
        shards: as for `load_backbone`.

    Raises:
        CheckpointError: as `load_reward_model`.
    """
    if shards is None:
        return load_reward_model(directory)[0].backbone
    config, weights = read_backbone_config(directory), Path(directory) / REWARD_MODEL_FILE
    backbone = without_numbers(lambda: AutoModel.from_config(config, dtype=torch.float32))
    with _explained(weights, f"the architecture in {directory}/config.json"), WeightFiles([str(weights)]) as files:
        sources = {name: [f"backbone.{name}"] for name in backbone.state_dict() if f"backbone.{name}" in files.names}
        missing = fill_in_shards(backbone, files, sources, shards)
        if missing:
            raise ValueError(f"it lacks {len(missing)} tensors, backbone.{missing[0]} first")
    with shards.gathering(backbone):
        use_packed_attention(backbone)
    return with_onednn(backbone)


@contextmanager
def _explained(weights: Path, architecture: str) -> Iterator[None]:
    """Says of a file of weights why it could not be loaded.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not those of the architecture.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{weights} is missing: the checkpoint is incomplete. Export it again.") from error
    except SafetensorError as error:
        raise CheckpointError(f"{weights} cannot be read: {error}. It was cut short; export it again.") from error
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{weights} does not fit {architecture}: {error}") from error
