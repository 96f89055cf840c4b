"""The reward model: a decoder backbone, a head, and the card that describes them.

A checkpoint is a directory: `model.safetensors` (backbone.* and head.*), `reward_model.json` (the card),
`config.json` (the backbone's architecture) and the tokenizer's files. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from pipeline.config.reward import EnsembleConfig, VRMHeadConfig
from pipeline.errors import CheckpointError
from pipeline.models.backbone import load_config, load_tokenizer
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
from pipeline.models.transformers_auto import AutoModel

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
    state_dict: dict[str, torch.Tensor],
    backbone_config: dict,
    tokenizer: PreTrainedTokenizerBase,
    card: RewardModelCard,
) -> None:
    """Writes a reward-model checkpoint; `state_dict` holds backbone.* and head.*."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, path / REWARD_MODEL_FILE)
    (path / "config.json").write_text(json.dumps(backbone_config, indent=2, sort_keys=True))
    (path / CARD_FILE).write_text(card.model_dump_json(indent=2))
    tokenizer.save_pretrained(directory)


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
    config = load_config(directory)
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
    try:
        # Before `RewardModel(...)`, which runs the backbone on a few tokens to prove that it can be packed.
        nn.ModuleDict({"backbone": backbone, "head": head}).load_state_dict(load_file(weights))
    except FileNotFoundError as error:
        raise CheckpointError(f"{weights} is missing: the checkpoint is incomplete. Export it again.") from error
    except SafetensorError as error:
        raise CheckpointError(f"{weights} cannot be read: {error}. It was cut short; export it again.") from error
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights} does not fit the architecture in {directory}/config.json and {CARD_FILE} (a {card.head!r} head "
            f"for {len(card.objectives)} objectives, {', '.join(card.objectives)}): {error}"
        ) from error
    return RewardModel(with_onednn(backbone), head, card.pooling).eval(), load_tokenizer(directory), card
