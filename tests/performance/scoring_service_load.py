"""Load on the scoring service over loopback, against a direct batched forward of the same model in the same run.

    python -m tests.performance.scoring_service_load --model runs/tiny/stages/train_reward_model-.../result
    python -m tests.performance.scoring_service_load --model runs/tiny/stages/train_reward_model-.../result --rows 32

Batch requests, in a closed loop: a few callers who wait for their answers give responses per second over HTTP and over
the handle; the direct forward, in a process of its own with as many threads, takes turns with them. Small requests
(one comparison), in an open loop: they arrive at random (Poisson) at 50% and 90% of what many callers got answered in a
closed one, and a latency runs from the moment a request was due, not from when a slow service let it in. No text is
asked twice, so no cache helps. Prints what it has as it comes, and the floor: FLOPs of the matrix products, and the
seconds they take at the speed of a large product on as many threads. CPU time per response says where time goes, and
holds on a machine that others use too. `--json` keeps all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from multiprocessing.connection import Connection

import torch

from actors.reward_service import leave_service, start_service
from cluster.session import open_cluster
from pipeline.config.cluster import ClusterConfig, ScoringConfig
from pipeline.config.models import TinyModelConfig
from pipeline.config.reward import VRMHeadConfig
from pipeline.data.planted import OBJECTIVES, build_tokenizer
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.learning.memory import keep_freed_memory
from pipeline.models.backbone import create_tiny_causal_lm, load_config, load_tokenizer
from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head, save_reward_model
from pipeline.records import Message
from pipeline.serving.client import AsyncClient, Client
from tests.performance.processor import processor
from tests.support.nodes import ray_processes

NAME = "load"
LOADS = (0.5, 0.9)
QUANTILES = (0.5, 0.95, 0.99)

Rows = tuple[list[tuple[Message, ...]], list[str]]
Road = Callable[["Texts"], Awaitable[None]]
"""Asks once."""


@dataclass(frozen=True)
class Latencies:
    """Of one open loop."""

    road: str
    load: float
    """Share of the measured capacity."""
    per_s: float
    """Requests that arrived."""
    requests: int
    """Of them, because too many waited already; the client over HTTP asks again instead."""
    p50_ms: float
    p95_ms: float
    p99_ms: float


class Texts:
    """Requests of `rows` responses, `per_prompt` to each prompt; words are drawn at random, so none comes twice."""

    def __init__(self, words: Sequence[str], options: argparse.Namespace, rows: int, seed: int) -> None:
        self.rows_per_request = rows
        self._words = words
        self._options = options
        self._random = random.Random(seed)

    def rows(self) -> Rows:
        options = self._options
        prompts: list[tuple[Message, ...]] = []
        while len(prompts) < self.rows_per_request:
            prompt: tuple[Message, ...] = ({"role": "user", "content": self._text(options.prompt_words)},)
            prompts += [prompt] * min(options.per_prompt, self.rows_per_request - len(prompts))
        return prompts, [self._text(options.response_words) for _ in prompts]

    def _text(self, mean_words: int) -> str:
        return " ".join(self._random.choices(self._words, k=self._random.randint(mean_words // 2, 3 * mean_words // 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="result directory of train_reward_model; default: a random one")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each contestant and round")
    parser.add_argument("--rounds", type=int, default=9, help="shares are taken within each: a machine's speed drifts")
    parser.add_argument("--rows", type=int, default=128, help="responses per batch request")
    parser.add_argument("--per-prompt", type=int, default=4, help="responses per prompt")
    parser.add_argument("--prompt-words", type=int, default=100, help="on average; uniform between half and 3/2 of it")
    parser.add_argument("--response-words", type=int, default=150)
    parser.add_argument("--callers", type=int, default=2, help="of the closed loop of batch requests")
    parser.add_argument("--requests", type=int, default=1000, help="small ones, at each load and on each road")
    parser.add_argument("--small-rows", type=int, default=2, help="responses per small request, to one prompt")
    parser.add_argument(
        "--small-callers", type=int, default=32, help="who find out how many small ones a second can be"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the replica, and of the direct forward")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--json", help="file for the measurements")
    options = parser.parse_args()
    keep_freed_memory(torch.device("cpu"))  # as our ranks and replicas do; the peer gains as well
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory:
        model = options.model or random_model(directory)
        result = measure(model, options)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as stream:
            json.dump({"options": vars(options), **result}, stream, indent=2)


def measure(model: str, options: argparse.Namespace) -> dict:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    direct = context.Process(target=score_directly, args=(theirs, model, options), daemon=True)
    config = ScoringConfig(port=options.port, threads_per_replica=options.threads)
    with open_cluster(ClusterConfig(object_store_gib=0.5), ()):
        try:
            scorer = start_service(model, config, start_s=300, deadline_s=600, name=NAME)
            direct.start()
            with scorer.client(rows=options.rows) as by_handle:
                return asyncio.run(take_turns(model, by_handle, ours, options))
        finally:
            leave_service(NAME)


async def take_turns(model: str, by_handle: Client, direct: Connection, options: argparse.Namespace) -> dict:
    words = words_of(model)
    batches = Texts(words, options, options.rows, seed=1)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(256))  # callers by the handle block
    async with AsyncClient(f"http://127.0.0.1:{options.port}", batch_size=options.rows, concurrency=4096) as client:

        async def over_http(texts: Texts) -> None:
            answer = await client.score_rows(*texts.rows())
            assert len(answer.scores) == texts.rows_per_request

        async def over_handle(texts: Texts) -> None:
            answer = await asyncio.to_thread(by_handle.score_rows, *texts.rows())
            assert len(answer.scores) == texts.rows_per_request

        roads: dict[str, Road] = {"HTTP": over_http, "handle": over_handle}
        for road in roads.values():
            await closed_loop(road, batches, options.callers, seconds=2.0)
        throughput = await measure_throughput(roads, batches, direct, options)
        direct.send(None)
        latencies = await measure_latencies(roads, words, options)
    return {**throughput, "latencies": [asdict(row) for row in latencies]}


async def measure_throughput(
    roads: dict[str, Road], batches: Texts, direct: Connection, options: argparse.Namespace
) -> dict:
    """Rounds in which the direct forward and every road take their turns."""
    rates: dict[str, list[float]] = {"direct": [], **{name: [] for name in roads}}
    cpu_ms: dict[str, dict[str, list[float]]] = {"direct": {"model": []}, **{name: {} for name in roads}}
    floor = {}
    print(processor())
    print(f"{options.rows} responses a request, {options.per_prompt} a prompt, {options.callers} callers, ", end="")
    print(f"{options.threads} threads; {options.rounds} rounds of {options.seconds:g} s\n", flush=True)
    for number in range(options.rounds):
        direct.send(options.seconds)
        floor = await asyncio.to_thread(direct.recv)
        rates["direct"].append(floor.pop("responses_per_s"))
        cpu_ms["direct"]["model"].append(floor.pop("cpu_ms"))
        for name, road in roads.items():
            before = cpu_seconds()
            rate, answered = await closed_loop(road, batches, options.callers, options.seconds)
            rates[name].append(rate)
            for role, seconds in cpu_seconds().items():
                cpu_ms[name].setdefault(role, []).append(1e3 * (seconds - before[role]) / answered)
        measured = ", ".join(f"{name} {values[-1]:.1f}" for name, values in rates.items())
        print(f"round {number + 1}: {measured} responses/s", flush=True)
    result = {"responses_per_s": rates, "cpu_ms_per_response": cpu_ms, "floor": floor}
    report_throughput(result)
    return result


async def measure_latencies(
    roads: dict[str, Road], words: Sequence[str], options: argparse.Namespace
) -> list[Latencies]:
    print(
        f"\n{options.small_rows} responses a request; the load is a share of what {options.small_callers} callers got\n"
    )
    print(
        f"{'':<10}{'load':>6}{'per s':>8}{'requests':>10}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}",
        flush=True,
    )
    small = Texts(words, options, options.small_rows, seed=2)
    rows = []
    for name, road in roads.items():
        await closed_loop(road, small, options.small_callers, seconds=1.0)
        capacity, _ = await closed_loop(road, small, options.small_callers, options.seconds)
        for load in LOADS:
            per_s = load * capacity / options.small_rows
            taken = await open_loop(road, small, arrivals(per_s, options.requests))
            points = [1e3 * percentile(taken, q) for q in QUANTILES]
            row = Latencies(name, load, per_s, options.requests, *points)
            print(f"{row.road:<10}{row.load:>6.0%}{row.per_s:>8.1f}{row.requests:>10}", end="")
            print("".join(f"{ms:>10.1f}" for ms in points), flush=True)
            rows.append(row)
    return rows


async def closed_loop(road: Road, texts: Texts, callers: int, seconds: float) -> tuple[float, int]:
    """Responses per second, and responses, when every caller asks again as soon as it was answered."""
    began = time.perf_counter()
    answered = 0

    async def caller() -> None:
        nonlocal answered
        while time.perf_counter() - began < seconds:
            await road(texts)
            answered += texts.rows_per_request

    await asyncio.gather(*(caller() for _ in range(callers)))
    return answered / (time.perf_counter() - began), answered


def cpu_seconds() -> dict[str, float]:
    """Used so far by the replica, the HTTP proxy and this process, which asks."""
    used = {"model": 0.0, "proxy": 0.0, "caller": time.process_time()}
    for role, title in (("model", "ServeRepli"), ("proxy", "ProxyActor")):
        for process in ray_processes(title):
            used[role] += process.cpu_times().user + process.cpu_times().system
    return used


async def open_loop(road: Road, texts: Texts, due_after_s: Sequence[float]) -> list[float]:
    """Seconds from when each request was due to its answer; one that is refused is asked again by the client."""
    taken: list[float] = []
    began = time.perf_counter()

    async def ask(due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await road(texts)
        taken.append(time.perf_counter() - due)

    await asyncio.gather(*(ask(began + after_s) for after_s in due_after_s))
    return taken


def arrivals(per_s: float, requests: int) -> list[float]:
    """A Poisson process, always the same but for its pace: seconds from its beginning."""
    chance = random.Random(2)
    return list(accumulate(chance.expovariate(per_s) for _ in range(requests)))


def score_directly(pipe: Connection, model: str, options: argparse.Namespace) -> None:
    """In a process of its own: scores for as long as it is told, and sends what it measured, until told None."""
    torch.set_num_threads(options.threads)
    scorer = RewardModelScorer.load(model, max_tokens_per_batch=ScoringConfig().max_tokens_per_batch)
    texts = Texts(words_of(model), options, options.rows, seed=3)
    scorer.score(*texts.rows())
    config = load_config(model)
    width = config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    weights = config.num_hidden_layers * config.hidden_size * (2 * width + 3 * config.intermediate_size)
    per_request = options.prompt_words * -(-options.rows // options.per_prompt) + options.response_words * options.rows
    peak = product_flops_per_s()
    for seconds in iter(pipe.recv, None):
        answered, began, cpu_began = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - began < seconds:
            answered += len(scorer.score(*texts.rows()))
        cpu_ms = 1e3 * (time.process_time() - cpu_began) / answered
        rate = answered / (time.perf_counter() - began)
        gflop = 2 * weights * per_request / options.rows / 1e9
        measured = {"gflop_per_response": gflop, "gflop_per_s": gflop * rate, "product_gflop_per_s": peak / 1e9}
        pipe.send({"responses_per_s": rate, "cpu_ms": cpu_ms, **measured})


def product_flops_per_s(size: int = 1024) -> float:
    """The best of a few large float32 products on this process's threads."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    taken = []
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / min(taken)


def words_of(model: str) -> list[str]:
    """Words the tokenizer knows as one token each."""
    return [word for word in sorted(load_tokenizer(model).get_vocab()) if word.isascii() and word.isalpha()]


def random_model(directory: str) -> str:
    tokenizer = build_tokenizer()
    shape = TinyModelConfig(max_positions=1024)
    language_model = create_tiny_causal_lm(shape, tokenizer, seed=0)
    model = RewardModel(
        language_model.base_model, make_head("vrm", shape.hidden_size, len(OBJECTIVES), VRMHeadConfig())
    )
    card = RewardModelCard(
        head="vrm",
        vrm=VRMHeadConfig(),
        objectives=OBJECTIVES,
        max_length=shape.max_positions,
        score_mean=(0.0,) * len(OBJECTIVES),
        score_std=(1.0,) * len(OBJECTIVES),
        reward_mean=0.0,
        reward_std=1.0,
        metrics={},
    )
    save_reward_model(
        directory,
        state_dict=model.state_dict(),
        backbone_config=language_model.config.to_dict(),
        tokenizer=tokenizer,
        card=card,
    )
    return directory


def percentile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share q of them does not exceed."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


def report_throughput(result: dict) -> None:
    floor = result["floor"]
    direct_rates = result["responses_per_s"]["direct"]
    direct = statistics.median(direct_rates)
    flops, peak = floor["gflop_per_response"], floor["product_gflop_per_s"]
    print(f"\nfloor: {flops:.3f} GFLOP a response (products with weights, prompts shared), {1e3 * flops / peak:.2f} ms")
    print(f"at the {peak:.0f} GFLOP/s of a large product; the direct forward takes {1e3 / direct:.2f} ms\n")
    print(f"{'median':<10}{'responses/s':>14}{'of direct':>12}   CPU ms a response")
    for name, rates in result["responses_per_s"].items():
        median = statistics.median(rates)
        share = statistics.median(rate / alone for rate, alone in zip(rates, direct_rates, strict=True))
        used = {role: statistics.median(all_ms) for role, all_ms in result["cpu_ms_per_response"][name].items()}
        print(f"{name:<10}{median:>14.1f}{share:>12.1%}   ", end="")
        print(", ".join(f"{role} {ms:.2f}" for role, ms in used.items()), flush=True)


if __name__ == "__main__":
    main()
