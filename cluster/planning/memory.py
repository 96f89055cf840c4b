"""Bytes that a role needs: parameters, gradients, optimiser, activations, logits, KV cache. Arithmetic, no tensors.

Symbols: P parameters of the models of a rank and T of them that train, n ranks, H hidden size, A query width, K key
width, F intermediate size, F' = k F that of the k experts of a token together, V vocabulary, L layers, t tokens of a
micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.planning.decoder_shape import DecoderShape
from pipeline.config.cluster import RanksConfig

Bytes = Mapping[str, float]
"""What needs memory -> bytes, in the order in which a person wants to read it."""

BYTES = {"float32": 4, "bfloat16": 2}
ADAM_BYTES = 8
"""First and second moment, float32, of a trained parameter."""
CHECKPOINT_BYTES = 12
"""Weight and both moments, float32, of a trained parameter (docs/checkpoints.md)."""

PROCESS_BYTES = 0.65e9
"""Resident size of a process that has imported torch, transformers and DeepSpeed and computed nothing (measured)."""
LOGITS_CHUNK = 2048
"""`chunk_size` of `pipeline/objectives/logprobs.py`."""
BUCKET_PARAMETERS = 5e8
"""DeepSpeed's reduce_bucket_size, at its default: gradients on their way between ranks."""
LIVE_PARAMETERS = 1e9
"""DeepSpeed's stage3_max_live_parameters, at its default: gathered for a layer, ahead of it, or until it is reused."""
ENGINE_WORK_BYTES = 2e9
"""What an engine on a GPU takes beside weights and cache: activations of a prompt, graphs, the sampler. An estimate."""


@dataclass(frozen=True, kw_only=True)
class TrainedDecoder:
    """A decoder that a rank trains, in whole or in part."""

    shape: DecoderShape
    has_language_head: bool
    """False for a reward model's backbone and a critic of its own."""
    trainable_layers: int | None = None
    """As `alignment.ppo.trainable_layers`; None trains all, or the adapters alone."""
    adapter_parameters: int = 0
    """Of LoRA; 0 trains without."""

    @property
    def num_parameters(self) -> int:
        whole = self.shape.num_parameters if self.has_language_head else self.shape.trunk_parameters
        return whole + self.adapter_parameters

    @property
    def num_trained(self) -> int:
        """T. The final norm trains with the last layers; embedding and head do not."""
        if self.adapter_parameters:
            return self.adapter_parameters
        if self.trainable_layers is None:
            return self.num_parameters
        return min(self.trainable_layers, self.shape.num_layers) * self.shape.layer_parameters + self.shape.hidden_size

    @property
    def trains_head(self) -> bool:
        return self.has_language_head and self.num_trained == self.num_parameters

    @property
    def backward_layers(self) -> int:
        """Layers whose activations the backward pass reads."""
        if self.trainable_layers is None:
            return self.shape.num_layers
        return min(self.trainable_layers, self.shape.num_layers)


@dataclass(frozen=True, kw_only=True)
class TrainingLoad:
    """What one training rank holds and computes."""

    decoders: tuple[TrainedDecoder, ...]
    head_parameters: int
    """Of reward heads or the value head, trained in float32."""
    reference: DecoderShape | None
    """A frozen second model in the dtype of the policy; None where there is none, or it is the policy without
    adapters."""
    dtype: str
    recompute: bool
    """`gradient_checkpointing`."""
    micro_batch_tokens: float
    """Tokens of the largest micro-batch."""
    micro_batches: float
    """Micro-batches of a rank in an optimiser step, at the longest lengths."""

    @property
    def num_parameters(self) -> int:
        return sum(decoder.num_parameters for decoder in self.decoders) + self.head_parameters

    @property
    def num_trained(self) -> int:
        return sum(decoder.num_trained for decoder in self.decoders) + self.head_parameters


def layer_activation_bytes(shape: DecoderShape, dtype: str) -> float:
    """Bytes that autograd keeps of one layer for one token.

    With b the bytes of a number under autocast:

        two norms        2 (4 H + 4 H + b' H)     input and normalised input float32; what the products read
        query, key       (A + K) (4 c + b)        norms of their own (Qwen3): a float32 input, cast or not, and a result
        attention        5 b A                    query, repeated key and value, output, and its copy for o_proj
        feed-forward     4 b F'                   gate, its SiLU, up, and their product
        experts          3 k b H                  of a mixture: input and output of each of k experts, and its share

    b' and b are 4 in float32, where the normalised input of a norm is the product's too and no cast is kept.
    """
    hidden, query, key, wide = shape.hidden_size, shape.query_width, shape.key_width, shape.active_width
    b = BYTES[dtype]
    norms = 2 * hidden * (4 + 4 + b)
    head_norms = (query + key) * (4 + b) if shape.head_norms else 0
    experts = 3 * shape.experts_per_token * b * hidden if shape.num_experts > 1 else 0
    return norms + head_norms + 5 * b * query + 4 * b * wide + experts


def activation_bytes(load: TrainingLoad) -> tuple[float, float]:
    """Bytes that autograd keeps of a micro-batch, and those of a layer that is computed again in the backward pass.

    Without recomputation the first are t L activations and the second 0. With it the first are the layers' inputs,
    4 t L H.
    """
    kept = again = 0.0
    for decoder in load.decoders:
        per_layer = load.micro_batch_tokens * layer_activation_bytes(decoder.shape, load.dtype)
        inputs = load.micro_batch_tokens * 4 * decoder.shape.hidden_size
        kept += decoder.backward_layers * (inputs if load.recompute else per_layer)
        kept += 3 * inputs  # embedding, final norm, the states that the head reads
        again = max(again, per_layer if load.recompute and decoder.backward_layers else 0.0)
    return kept, again


def cast_bytes(load: TrainingLoad) -> float:
    """Weights in the dtype of the forward pass, as autograd keeps them for the backward pass; 0 in float32.

    A product needs its weight to give a gradient to its input, whether the weight trains or not. With recomputation a
    cast lives as long as its layer, or the last chunk of logits.
    """
    if load.dtype == "float32":
        return 0.0
    kept = largest = 0.0
    for decoder in load.decoders:
        shape = decoder.shape
        head = shape.vocabulary_parameters if decoder.has_language_head else 0
        kept += decoder.backward_layers * shape.layer_parameters + decoder.adapter_parameters + head
        largest = max(largest, shape.layer_parameters if decoder.backward_layers else 0, head)
    return BYTES[load.dtype] * (largest if load.recompute else kept)


def logit_bytes(load: TrainingLoad) -> float:
    """A chunk of [n, V] logits in float32, their gradient in the dtype of the product, and the gradient of the head.

    A float32 product by oneDNN copies the gradient, because it reads it transposed. The gradient of the head is as
    large as the head. It exists before the activations are freed.
    """
    total = 0.0
    for decoder in load.decoders:
        if not decoder.has_language_head:
            continue
        chunks = max(1, math.ceil(load.micro_batch_tokens / LOGITS_CHUNK))
        per_logit = 4 + BYTES[load.dtype]
        total += load.micro_batch_tokens / chunks * decoder.shape.vocabulary_size * per_logit
        if decoder.trains_head:
            total += 4 * decoder.shape.vocabulary_parameters
    return total


def training_memory(load: TrainingLoad, ranks: RanksConfig | None) -> tuple[Bytes, Bytes]:
    """Bytes of a rank on its device, and in the host's memory beside that.

    A single process holds 4 P of weights, 8 T of Adam and 4 T of gradients. Over n ranks DeepSpeed adds a copy of the
    weights that train, 4 T / n, and shards: ZeRO-1 Adam and the copy, ZeRO-2 the gradients too, ZeRO-3 the weights too.
    `offload_optimiser` moves copy, Adam and gradients to the host.

    Gradients are None before the first backward pass of a step. With one micro-batch a step the peak is therefore that
    of activations or of gradients, whichever is larger; with several, of both.

    Args:
        ranks: None is one process without DeepSpeed (`TorchEngine`).
    """
    n, stage = (1, 0) if ranks is None else (ranks.ranks, ranks.zero_stage)
    trained, frozen = load.num_trained, load.num_parameters - load.num_trained
    weights = 4.0 * (trained + frozen) / (n if stage == 3 else 1)
    gradients = 4.0 * trained / (n if stage >= 2 else 1)
    optimiser = (ADAM_BYTES + (0.0 if ranks is None else 4.0)) * trained / n
    activations, again = activation_bytes(load)
    logits = max(0.0, logit_bytes(load) - again)  # the logits are freed before a layer is computed again
    activations += again
    if load.micro_batches <= 1 and n == 1:
        gradients = max(0.0, gradients - activations - logits)
    device = {"parameters": weights, "optimiser": optimiser, "gradients": gradients}
    host: dict[str, float] = {}
    if ranks is not None and ranks.offload_optimiser:
        host = {"optimiser": device.pop("optimiser"), "gradients": device.pop("gradients")}
    if load.reference is not None:
        whole = BYTES[load.dtype] * load.reference.num_parameters
        device["reference"] = whole / (n if stage == 3 else 1)
    device |= {"activations": activations, "logits": logits}
    if load.dtype != "float32":
        device["casts of weights"] = cast_bytes(load)
    if ranks is not None and n > 1:
        device["communication"] = _communication_bytes(load, stage) + _exchanged_bytes(load, ranks.sequence_parallel)
    return device, host


def exchange_width(shape: DecoderShape, n: int) -> int:
    """Numbers that a rank of a sequence group of n sends around one attention, per own token: 2 (A + K').

    Query, key and value go before it, its result comes back. K' = K where n divides the key-value heads; else they are
    repeated until it does. 0 for a group of one.
    """
    heads = shape.num_heads + math.lcm(shape.num_kv_heads, n)
    return 2 * heads * shape.head_dim if n > 1 else 0


def _exchanged_bytes(load: TrainingLoad, n: int) -> float:
    """What one layer sends and receives around its attention."""
    widest = max(exchange_width(decoder.shape, n) for decoder in load.decoders)
    return 2 * BYTES[load.dtype] * load.micro_batch_tokens * widest


def _communication_bytes(load: TrainingLoad, stage: int) -> float:
    """A bucket of gradients; under ZeRO-3 also the parameters that are gathered at a time."""
    bucket = 4 * min(BUCKET_PARAMETERS, load.num_trained)
    if stage < 3:
        return bucket
    largest = max(max(d.shape.vocabulary_parameters, d.shape.layer_parameters) for d in load.decoders)
    return bucket + 4 * max(largest, min(LIVE_PARAMETERS, load.num_parameters))


def loading_bytes(load: TrainingLoad, ranks: RanksConfig) -> float:
    """Bytes of a rank while it loads its models, in the memory where they are split: the device's under ZeRO-3.

    Below ZeRO-3 every rank reads whole models into the host's memory. Under ZeRO-3 a parameter is split when it has
    been read. So a rank holds its part of the models, and the largest parameter whole.
    """
    reference = 0 if load.reference is None else BYTES[load.dtype] * load.reference.num_parameters
    whole = 4.0 * load.num_parameters + reference
    if ranks.zero_stage < 3:
        return whole
    return whole / ranks.ranks + 4.0 * max(decoder.shape.largest_matrix for decoder in load.decoders)


def engine_memory(
    shape: DecoderShape, *, dtype: str, shards: int, cache_bytes: float, on_gpu: bool
) -> dict[str, float]:
    """Bytes of one shard of a rollout engine.

    Args:
        cache_bytes: KV cache of the shard.
    """
    memory = {"parameters": BYTES[dtype] * shape.num_parameters / shards, "KV cache": cache_bytes}
    return memory | ({"work": ENGINE_WORK_BYTES} if on_gpu else {})


def scorer_memory(shape: DecoderShape, *, dtype: str, tokens: float) -> dict[str, float]:
    """Bytes of a scoring replica: the backbone, and a layer's activations of its largest batch, without gradient."""
    b = BYTES[dtype]
    per_token = 4 * 2 * shape.hidden_size + b * (5 * shape.query_width + 3 * shape.active_width)
    return {"parameters": b * shape.trunk_parameters, "activations": tokens * per_token}
