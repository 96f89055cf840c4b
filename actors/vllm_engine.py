"""One vLLM engine: load weights, recompute probes, sample.

Of all files only this one, its two neighbours `engine_*.py` and the two ends of a weight transfer import vllm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams, TokensPrompt
from vllm.logprobs import Logprob
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason as EngineFinishReason

from actors.engine_processes import ShardProcesses
from actors.weight_transfer import register_all, transfer_config
from cluster.engine_build import ResolvedRolloutConfig
from cluster.rollout_plan import RolloutPlan
from pipeline.config.cluster import RolloutConfig
from pipeline.errors import StaleEngineError, WorkerError
from pipeline.learning.memory import resident_peak_gib
from pipeline.models.backbone import kv_bytes_per_token, load_config
from pipeline.records import ProbeSequence
from pipeline.records import SamplingParams as Sampling
from pipeline.rollouts.engine_sampler import Sample
from pipeline.rollouts.policy_files import PolicyFiles

PROMPT_TOKENS_AT_ONCE = 4096
"""How many prompt tokens a CPU engine reads in one forward pass: vLLM's own number."""
TOKENS_PER_BLOCK = 128
"""The size of a block of a CPU engine's KV cache."""

SHARD = "actors.engine_weights.EngineShard"
"""What every process of an engine has beside vLLM's worker."""

TokenLogprobs = list[dict[int, Logprob]]
"""Token -> log-probability, at every place. vLLM's other form, FlatLogprobs, must be asked for."""


class VLLMEngine:
    """An engine without weights of its own: it starts with dummies and must be given a policy.

    Implements `SamplingEngine` (`pipeline/rollouts/engine_sampler.py`).
    """

    def __init__(
        self,
        model_directory: str,
        config: ResolvedRolloutConfig,
        *,
        plan: RolloutPlan,
        dtype: str,
        max_model_len: int,
        stop_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        """
        Args:
            stop_token_ids: a response ends with any of them.
        """
        device_options: dict[str, Any] = {}
        if config.gpus_per_worker < 1:
            # An engine that finds out how much is free takes the others' share of a GPU, or of the node's memory.
            device_options["kv_cache_memory_bytes"] = kv_cache_bytes(model_directory, config, dtype, max_model_len)
        if config.gpus_per_worker == 0:
            # A CPU generator cannot be set back, which vLLM does to seeded requests whose prompt it reads in parts.
            device_options["enable_chunked_prefill"] = False
            device_options["max_num_batched_tokens"] = max(PROMPT_TOKENS_AT_ONCE, max_model_len)
        register_all()
        if config.shards > 1:
            device_options["tensor_parallel_size"] = config.shards
            # Processes of this node alone: the actor holds the GPUs of all of them.
            device_options["distributed_executor_backend"] = ShardProcesses
        self._llm = LLM(
            model=model_directory,
            dtype=cast(Literal["float32", "bfloat16"], dtype),  # the recipe allows no other
            max_model_len=max_model_len,
            max_num_seqs=config.max_sequences,
            gpu_memory_utilization=config.memory_fraction(plan.placement),
            enforce_eager=config.enforce_eager,
            seed=seed,
            load_format="dummy",
            # With tied embeddings a CPU engine keeps a packed copy of lm_head that updates do not reach.
            hf_overrides={"tie_word_embeddings": False},
            worker_extension_cls=SHARD,
            weight_transfer_config=transfer_config(plan.weight_transfer),
            enable_sleep_mode=plan.placement == "colocated",
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            **device_options,
        )
        self._shards = config.shards
        self._stop_token_ids = [*stop_token_ids]
        self._files = PolicyFiles()
        self._on_cpu = config.gpus_per_worker == 0
        self._layout: dict[str, tuple[torch.Size, torch.dtype]] | None = None
        """Names, shapes and dtypes of the last policy that vLLM's loader took on a CPU."""
        self._replaceable = False
        """Whether policies of this layout may pass vLLM's loader by (`replace_weights`)."""
        self._is_updating = False
        self._is_asleep = False

    def sleep(self) -> None:
        """Frees the GPU's memory, weights and cache; the next update wakes the engine."""
        if not self._is_asleep:
            # Level 2: level 1 would keep a copy of weights that are replaced before they are used again.
            self._llm.sleep(level=2)
            self._is_asleep = True

    def load_weights(self, location: str) -> int:
        """Loads a published policy from its file. Returns the bytes read."""
        published = self._files.read(location)
        layout = {name: (tensor.shape, tensor.dtype) for name, tensor in published.items()}
        if self._replaceable and layout == self._layout:
            self._end_update()
            self._in_shards("replace_by_published", location)
            self._forget_prefixes()
        else:
            self.start_update()
            self.receive({"location": location})
            self.finish_update()
            if self._on_cpu and layout != self._layout:
                self._replaceable = all(self._in_shards("holds_published", location))
                self._layout = layout
        return sum(tensor.nbytes for tensor in published.values())

    def meet_learner(self, init_info: dict[str, Any]) -> None:
        """Agrees with the learner's ranks on how they will send; `init_info` is theirs."""
        self._in_shards("init_weight_transfer_engine", init_info)

    def start_update(self) -> None:
        """Begins to replace the weights. An update that began earlier and was not finished ends here."""
        if self._is_asleep:
            # The cache wakes last: until the update is over, the learner may need the memory.
            self._llm.wake_up(tags=["weights"])
        self._end_update()
        if self._on_cpu:
            self._in_shards("pack_experts_again")
        self._in_shards("start_weight_update")
        self._is_updating = True

    def receive(self, update_info: dict[str, Any]) -> None:
        """Takes all of the weights or a part of them, from where `update_info` says."""
        # Set again only after success: an update that fails is over.
        self._is_updating = False
        self._in_shards("update_weights", update_info)
        self._is_updating = True

    def finish_update(self) -> None:
        """Ends an update and forgets the cached prefixes of the previous policy."""
        self._end_update()
        if self._is_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._is_asleep = False
        self._forget_prefixes()

    def _in_shards(self, method: str, *arguments: Any) -> list[Any]:
        """Calls vLLM's worker, or what `EngineShard` adds to it, in every process of the engine.

        Raises:
            WorkerError: one of several shards raised an error, whose text alone travels between them.
        """
        try:
            return self._llm.collective_rpc(method, args=arguments)
        except RuntimeError as error:
            if self._shards == 1:
                raise
            raise WorkerError(f"{method} failed in a shard of the engine: {error}") from error

    def _end_update(self) -> None:
        if self._is_updating:
            self._in_shards("finish_weight_update")
            self._is_updating = False

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise StaleEngineError(
                "the engine did not forget the prefixes that it cached before this update: a request is still running. "
                "Interrupt the request first."
            )

    def copy_gb_per_s(self, num_bytes: int) -> float:
        """The speed of copying `num_bytes` in the memory that holds the engine's weights; of the slowest shard."""
        return min(self._in_shards("copy_speed", num_bytes))

    def peak_gib(self) -> float:
        """The largest resident sizes of the engine's processes, added up."""
        # The one shard of an engine without others is in this process.
        others = self._in_shards("peak_gib") if self._shards > 1 else []
        return resident_peak_gib() + sum(others)

    def probe_logprobs(self, probes: Sequence[ProbeSequence]) -> list[list[float]]:
        """Log-probabilities of the probes' response tokens at temperature 1."""
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=[*p.prompt_ids, *p.response_ids]) for p in probes],
            SamplingParams(
                temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
            ),
            use_tqdm=False,
        )
        return [
            [
                # Only the entry of the first prompt token is None, and a probe has a prompt.
                cast(TokenLogprobs, output.prompt_logprobs)[len(probe.prompt_ids) + t][token].logprob
                for t, token in enumerate(probe.response_ids)
            ]
            for probe, output in zip(probes, outputs, strict=True)
        ]

    def submit(self, number: int, prompt: tuple[int, ...], seed: int, sampling: Sampling) -> None:
        """Queues one request, whose response `step` will return under this number."""
        self._llm.llm_engine.add_request(
            str(number),
            TokensPrompt(prompt_token_ids=list(prompt)),
            _sampling_params(sampling, seed, self._stop_token_ids),
        )

    def step(self) -> dict[int, Sample]:
        """Decodes one token of as many requests as there is room for. Returns what finished, by number."""
        outputs = map(_request_output, self._llm.llm_engine.step())
        return {int(output.request_id): _as_sample(output.outputs[0]) for output in outputs if output.finished}

    @property
    def is_busy(self) -> bool:
        """Whether some request has no response yet."""
        return self._llm.llm_engine.has_unfinished_requests()

    def abort(self, numbers: Sequence[int]) -> dict[int, Sample]:
        """Forgets these requests, finished ones among them. Returns the others that finished meanwhile, by number."""
        self._llm.llm_engine.abort_request([str(number) for number in numbers])
        # vLLM computes ahead of its answers. This step ends that work before new weights are written.
        return self.step()

    def interrupt(self) -> dict[int, Sample]:
        """Forgets all requests. Returns the tokens they have so far, by number."""
        # vLLM makes the same output of an aborted request, but only for an asynchronous caller.
        states = [*self._llm.llm_engine.output_processor.request_states.values()]
        outputs = [
            _request_output(state.make_request_output([], None, EngineFinishReason.ABORT, None)) for state in states
        ]
        if outputs:
            self.abort([int(output.request_id) for output in outputs])
        return {int(output.request_id): _as_sample(output.outputs[0]) for output in outputs}

    def differing_groups(self, location: str) -> dict[str, float]:
        """Parameter group -> largest relative difference from the published file, for groups that differ."""
        found: dict[str, float] = {}
        for shard in self._in_shards("differing_groups", location):
            for group, gap in shard.items():
                found[group] = max(gap, found.get(group, 0.0))
        return found


def _sampling_params(sampling: Sampling, seed: int, stop_token_ids: list[int]) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_response_tokens,
        seed=seed,
        stop_token_ids=stop_token_ids,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _request_output(output: object) -> RequestOutput:
    """vLLM's types allow outputs of pooling models too, and none for requests that are not finished."""
    assert isinstance(output, RequestOutput), f"a generating engine returned {output!r}"
    return output


def _as_sample(completion: CompletionOutput) -> Sample:
    token_ids = tuple(completion.token_ids)
    logprobs = cast(TokenLogprobs, completion.logprobs)  # every request asks for them
    return Sample(
        token_ids=token_ids,
        logprobs=tuple(entry[token].logprob for entry, token in zip(logprobs, token_ids, strict=True)),
        finish_reason="stop" if completion.finish_reason == "stop" else "length",
    )


def kv_cache_bytes(model_directory: str, config: RolloutConfig, dtype: str, max_model_len: int) -> int:
    """What one shard keeps of `max_sequences` of full length, its part of `kv_cache_gib` at most.

    A CPU engine touches all of it as it starts.
    """
    # One block more than the sequences fill: vLLM never uses the first.
    tokens = TOKENS_PER_BLOCK * (1 + config.max_sequences * -(-max_model_len // TOKENS_PER_BLOCK))
    model = load_config(model_directory)
    return min(
        config.kv_cache_gib * 2**30 // config.shards, tokens * kv_bytes_per_token(model, dtype, shards=config.shards)
    )
