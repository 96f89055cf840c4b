"""Over how many shards a model can be spread. Imports no torch: a recipe is refused before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError
from pipeline.models.checkpoint_files import decoder_config


def check_shards_of(checkpoint: str, shards: int) -> None:
    """As `check_tensor_parallel`, for a checkpoint whose config can be read here; a hub name is left to vLLM.

    Raises:
        ConfigError: as `check_tensor_parallel`.
        CheckpointError: the config is no JSON object.
    """
    if shards > 1:
        check_tensor_parallel(decoder_config(checkpoint), shards, model=checkpoint)


def check_tensor_parallel(config: Mapping[str, Any], shards: int, *, model: str) -> None:
    """Checks that the heads and the wide layers of a decoder can be divided among the shards of an engine.

    Every shard computes whole attention heads. Key-value heads are divided too; where there are fewer of them than
    shards, several shards hold the same one.

    Args:
        config: the decoder's, as its config.json has it. One that names no heads is left to vLLM.
        model: the decoder, for the message.

    Raises:
        ConfigError: the shards do not divide the decoder; the message names the numbers that would.
    """
    heads = config.get("num_attention_heads") or config.get("n_head")
    if heads is None or shards == 1:
        return
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("intermediate_size") or config.get("n_inner") or 4 * (config.get("n_embd") or heads)

    def divides(number: int) -> bool:
        return heads % number == 0 and width % number == 0 and (kv_heads % number == 0 or number % kv_heads == 0)

    if not divides(shards):
        possible = ", ".join(str(number) for number in range(1, heads + 1) if divides(number))
        raise ConfigError(
            f"cluster.rollout: an engine of {shards} shards (tensor_parallel_size, or gpus_per_worker) cannot divide "
            f"{model}: it has {heads} attention heads, {kv_heads} key-value heads and an intermediate_size of {width}. "
            f"Possible are {possible}."
        )
