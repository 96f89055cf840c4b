"""Seconds of each phase by a roofline: work over what a processor reaches of its peak.

Symbols: F peak FLOP/s, B bandwidth of memory, P weights of matrix products, t tokens, l tokens of a sequence, n ranks.
Nothing overlaps unless a formula says so: DeepSpeed runs here without overlapping communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.planning.accelerators import HOST_BYTES_PER_S_PER_CORE, NETWORK_BYTES_PER_S, Accelerator
from cluster.planning.decoder_shape import DecoderShape
from cluster.planning.memory import BYTES, TrainedDecoder, TrainingLoad, exchange_width
from pipeline.config.cluster import CPU, RanksConfig

Bound = Literal["compute", "memory bandwidth", "the longest response", "links", "optimiser on the host", "host copies"]

LAYER_LAUNCH_S = {"eager": 2.5e-4, "graphs": 2e-5, CPU: 1e-4}
"""What a layer costs a decoding step beside its arithmetic: launches of kernels, Python. An estimate."""

SQUARE_OF_LENGTHS = 4 / 3
"""E[l^2] / E[l]^2 of lengths between 0 and the limit, all equally likely."""

OPTIMISER_BYTES = 28
"""AdamW reads weight, gradient and both moments, and writes three of them: 7 float32 a parameter."""


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What one actor computes with: a GPU, or some cores."""

    accelerator: Accelerator
    share: float
    """1 of a GPU, or the number of cores."""

    def flops_per_s(self, dtype: str, *, decoding: bool = False) -> float:
        reached = self.accelerator.decoding_share if decoding else self.accelerator.training_share
        return self.peak_flops_per_s(dtype) * reached

    def peak_flops_per_s(self, dtype: str) -> float:
        return self.accelerator.flops_per_s[dtype] * self.share

    @property
    def bytes_per_s(self) -> float:
        return self.accelerator.memory_bytes_per_s * self.accelerator.bandwidth_share * self.share


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with their responses, as many as a phase handles over all actors."""

    count: float
    prompt_tokens: float
    """Mean of one."""
    response_tokens: float
    """Mean of one."""
    longest_response: float

    @property
    def tokens(self) -> float:
        return self.count * (self.prompt_tokens + self.response_tokens)

    @property
    def squares(self) -> float:
        """sum l^2."""
        return self.count * SQUARE_OF_LENGTHS * (self.prompt_tokens + self.response_tokens) ** 2


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of a step."""

    name: str
    seconds: float
    binds: Bound
    gpus: float = 0.0
    """GPUs that work in it."""
    model_flops: float = 0.0
    """What the mathematics needs, over all actors; nothing that is computed again."""
    peak_flops_per_s: float = 0.0
    """Of the actors that work."""

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.seconds * self.peak_flops_per_s) if self.peak_flops_per_s else 0.0


def forward_flops(shape: DecoderShape, batch: Sequences, *, head_tokens: float) -> float:
    """2 (P t + H V N + L A sum l^2): N tokens pass the language-model head; causal attention needs half its square."""
    weights = shape.num_layers * shape.layer_matrix_parameters * batch.tokens
    head = shape.vocabulary_parameters * head_tokens
    return 2.0 * (weights + head + shape.num_layers * shape.query_width * batch.squares)


def update_flops(decoder: TrainedDecoder, batch: Sequences, *, recompute: bool) -> tuple[float, float]:
    """What one pass of training needs, and what the learner computes: 6 P t, and 8 P t with recomputation.

    A weight costs a token 2 forward and 4 backward: 2 for the gradient of its input, 2 for its own. A frozen layer
    before the first trained one has no backward pass; under adapters no weight has a gradient of its own. The states
    of a decoder that does not train at all are computed once, before the first step.
    """
    if decoder.backward_layers == 0:
        return 0.0, 0.0
    head_tokens = batch.count * batch.response_tokens if decoder.has_language_head else 0.0
    forward = forward_flops(decoder.shape, batch, head_tokens=head_tokens)
    share = decoder.backward_layers / decoder.shape.num_layers
    backward = share * forward * (1.0 if decoder.adapter_parameters else 2.0)
    return forward + backward, forward + backward + (share * forward if recompute else 0.0)


def update_phase(
    load: TrainingLoad,
    batch: Sequences,
    ranks: RanksConfig,
    processor: Processor,
    *,
    optimiser_steps: float,
    spans_nodes: bool,
) -> Phase:
    """One step of a stage that trains.

    seconds = FLOPs / (n F) + micro-batches * gathered bytes / link + steps * optimiser

    ZeRO-3 gathers 4 P bytes in the forward and in the backward pass, and once more where activations are computed
    again; it scatters 4 T of gradients. ZeRO-2 scatters gradients at every micro-batch, ZeRO-1 once a step. A sequence
    group exchanges heads in every pass over a layer.

    Args:
        batch: sequences of the whole step, all epochs together.
        optimiser_steps: in the step.
    """
    needed = computed = 0.0
    for decoder in load.decoders:
        model, all_of_it = update_flops(decoder, batch, recompute=load.recompute)
        needed, computed = needed + model, computed + all_of_it
    n = ranks.ranks
    compute_s = computed / (n * processor.flops_per_s(load.dtype))
    micro_batches = max(optimiser_steps, batch.tokens / n / load.micro_batch_tokens)
    weights, gradients = 4.0 * load.num_parameters, 4.0 * load.num_trained
    if ranks.zero_stage == 3:
        moved = micro_batches * ((3 if load.recompute else 2) * weights + gradients)
    else:
        moved = (micro_batches if ranks.zero_stage == 2 else optimiser_steps) * gradients + optimiser_steps * gradients
    link_s = moved * (n - 1) / n / link_bytes_per_s(processor, spans_nodes=spans_nodes)
    passes = 3 if load.recompute else 2
    link_s += passes * _exchange_s([decoder.shape for decoder in load.decoders], load, batch, ranks, processor)
    trained = load.num_trained / n
    if ranks.offload_optimiser:
        cores = max(1, int(ranks.cpus_per_rank))
        per_step = OPTIMISER_BYTES * trained / (cores * HOST_BYTES_PER_S_PER_CORE)
        per_step += 8.0 * trained / processor.accelerator.host_link_bytes_per_s
    else:
        per_step = OPTIMISER_BYTES * trained / processor.bytes_per_s
    optimiser_s = optimiser_steps * per_step
    parts: dict[Bound, float] = {"compute": compute_s, "links": link_s}
    parts["optimiser on the host" if ranks.offload_optimiser else "memory bandwidth"] = optimiser_s
    return Phase(
        name="update",
        seconds=sum(parts.values()),
        binds=max(parts, key=lambda name: parts[name]),
        gpus=_gpus(n, processor),
        model_flops=needed,
        peak_flops_per_s=n * processor.peak_flops_per_s(load.dtype),
    )


def evaluate_phase(load: TrainingLoad, batch: Sequences, ranks: RanksConfig, processor: Processor) -> Phase:
    """Log-probabilities of policy and reference, and values: a forward pass of each model."""
    response_tokens = batch.count * batch.response_tokens
    flops = sum(
        forward_flops(d.shape, batch, head_tokens=response_tokens if d.has_language_head else 0.0)
        for d in load.decoders
    )
    policy = load.decoders[0].shape
    flops += forward_flops(load.reference or policy, batch, head_tokens=response_tokens)
    seconds = flops / (ranks.ranks * processor.flops_per_s(load.dtype))
    shapes = [*(decoder.shape for decoder in load.decoders), load.reference or policy]
    seconds += _exchange_s(shapes, load, batch, ranks, processor)
    return Phase(
        name="evaluate",
        seconds=seconds,
        binds="compute",
        gpus=_gpus(ranks.ranks, processor),
        model_flops=flops,
        peak_flops_per_s=ranks.ranks * processor.peak_flops_per_s(load.dtype),
    )


def _exchange_s(
    shapes: Sequence[DecoderShape], load: TrainingLoad, batch: Sequences, ranks: RanksConfig, processor: Processor
) -> float:
    """Seconds in which sequence groups of n exchange heads, in one pass over the layers of all these decoders.

    A group's ranks are neighbours, so their links are those inside a node.
    """
    n = ranks.sequence_parallel
    width = sum(shape.num_layers * exchange_width(shape, n) for shape in shapes)
    moved = BYTES[load.dtype] * width * batch.tokens / ranks.ranks * (n - 1) / n
    return moved / link_bytes_per_s(processor, spans_nodes=False)


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The pool of rollout engines, as far as time depends on it."""

    shape: DecoderShape
    dtype: str
    workers: int
    shards: int
    processor: Processor
    """Of one shard."""
    sequences: int
    """That one engine decodes at a time: its limit, and what its cache holds."""
    eager: bool


def rollout_phase(engines: Engines, batch: Sequences) -> Phase:
    """Reading the prompts and decoding the responses.

    An engine with R responses of mean m and longest M on C places decodes about  m R / C + (M - m)  steps, at least M:
    places are filled again as responses end, until only the longest are left. A step reads all weights, and the cache
    of each sequence; it multiplies the weights with as many tokens as are decoded together:

        seconds = steps (W / B + launches) + R m cache(l) / B + 2 P R (m / F_decode + p / F_prompt)
    """
    responses = batch.count / engines.workers
    mean, longest = batch.response_tokens, batch.longest_response
    places = min(responses, engines.sequences)
    steps = max(longest, mean * responses / places + longest - mean)
    shape, processor, shards = engines.shape, engines.processor, engines.shards
    b = BYTES[engines.dtype]
    launch_kind = CPU if processor.accelerator.name == CPU else "eager" if engines.eager else "graphs"
    launches_s = steps * shape.num_layers * LAYER_LAUNCH_S[launch_kind]
    weights_s = steps * b * shape.num_parameters / shards / processor.bytes_per_s
    context = batch.prompt_tokens + mean / 2
    cache_s = responses * mean * context * shape.kv_bytes_per_token(b, shards=shards) / processor.bytes_per_s
    products = shape.num_layers * shape.layer_matrix_parameters + shape.vocabulary_parameters
    decode_s = 2.0 * products * responses * mean / shards / processor.flops_per_s(engines.dtype, decoding=True)
    prompt_s = 2.0 * products * responses * batch.prompt_tokens / shards / processor.flops_per_s(engines.dtype)
    parts: dict[Bound, float] = {"memory bandwidth": weights_s + cache_s, "compute": decode_s + prompt_s}
    tail = (longest - mean) / steps
    binds: Bound = max(parts, key=lambda name: parts[name])
    return Phase(
        name="rollout",
        seconds=launches_s + sum(parts.values()),
        binds="the longest response" if tail > 0.5 and binds == "memory bandwidth" else binds,
        gpus=_gpus(engines.workers * shards, processor),
        model_flops=2.0 * products * batch.tokens,
        peak_flops_per_s=engines.workers * shards * processor.peak_flops_per_s(engines.dtype),
    )


def score_phase(shape: DecoderShape, dtype: str, batch: Sequences, processor: Processor, *, replicas: int) -> Phase:
    """One forward pass of the reward model over all responses."""
    flops = forward_flops(shape, batch, head_tokens=0.0)
    return Phase(
        name="score",
        seconds=flops / (replicas * processor.flops_per_s(dtype)),
        binds="compute",
        gpus=_gpus(replicas, processor),
        model_flops=flops,
        peak_flops_per_s=replicas * processor.peak_flops_per_s(dtype),
    )


def weights_phase(engines: Engines, ranks: RanksConfig, processor: Processor, *, way: str) -> Phase:
    """Publishing a policy of W bytes: a file in shared memory, and from there or by the GPUs' links into the engines.

    The first rank gathers and writes alone, so more ranks do not help. Where GPUs send, it copies to host memory as it
    sends, and writes the file later: nobody waits for that.
    """
    size = BYTES[engines.dtype] * engines.shape.num_parameters
    gathered_s = 4.0 * engines.shape.num_parameters / link_bytes_per_s(processor, spans_nodes=False)
    written_s = size / HOST_BYTES_PER_S_PER_CORE
    loaded_s = size / engines.shards / HOST_BYTES_PER_S_PER_CORE
    if way != "shm":
        loaded_s = size / engines.shards / link_bytes_per_s(processor, spans_nodes=False)
    gathers = ranks.zero_stage == 3 and ranks.ranks > 1
    return Phase(name="weights", seconds=written_s + loaded_s + (gathered_s if gathers else 0.0), binds="host copies")


def _gpus(actors: int, processor: Processor) -> float:
    return 0.0 if processor.accelerator.name == CPU else actors * processor.share


def link_bytes_per_s(processor: Processor, *, spans_nodes: bool) -> float:
    """Between two ranks; over nodes the network is slower than what lies inside."""
    inside = processor.accelerator.link_bytes_per_s
    across = NETWORK_BYTES_PER_S if spans_nodes else inside
    return min(inside, across) * processor.accelerator.bandwidth_share
