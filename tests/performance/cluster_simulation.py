"""Step time and idle share of an alignment on 1 to 128 nodes, simulated.

    python -m tests.performance.cluster_simulation --data ../shared/data
    python -m tests.performance.cluster_simulation --data ../shared/data --scaling strong --driver-us-per-token 0.035

A node has eight H100: seven GPUs that ranks and engines use in turns, and one that scores (`paper_qwen3_8b`). No such
cluster was at hand. What a GPU does comes from the plan's roofline (`cluster/planning`). What driver and first rank do
alone is measured here and now, as by `driver_speed`, unless --driver-us-per-token says it; what a restart and a
prefetched step cost was measured on two cores (docs/LOG.md, docs/speed.md). So the curves show where the design stops
scaling and why, not what a real cluster will reach.

Simulated, event by event: the queue of chunks, from which an engine takes the next when it is free; a chunk, which ends
with its longest response; the loss of nodes, at random times with a mean distance of --hours-between-losses. A lost
node holds a rank, so the group starts again from the last commit, on a new node. By formula: scoring, evaluation,
update, what driver and first rank do alone, weights, snapshots.

Lengths of responses are drawn from the answers of a preference data set, in words times 1.3, cut at the recipe's limit.
`weak` gives every node the batch of the recipe, and each optimiser step as many more rows; `strong` divides eight times
that batch among all nodes. `--network file` sends a policy to each node in turn, from the node of the first rank;
`nccl` broadcasts it.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from cluster.planning.accelerators import ACCELERATORS, HOST_BYTES_PER_S_PER_CORE, NETWORK_BYTES_PER_S
from cluster.planning.decoder_shape import DecoderShape, checkpoint_shape
from cluster.planning.memory import BYTES, CHECKPOINT_BYTES
from cluster.planning.roofline import LAYER_LAUNCH_S, Processor
from pipeline.config.load import load_recipe
from tests.performance.driver_speed import cost_of_step

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
TOKENS_PER_WORD = 1.3
RESTART_S = 85.0
"""Until the first step of PPO after a start, measured on two cores (docs/LOG.md); loading from disk comes on top."""
DISK_BYTES_PER_S = 5e9
"""Of a node that reads a checkpoint: a shared file system or an object store. An estimate."""
TRANSFER_BYTES_PER_S = 2e9
"""Of an object between two nodes by Ray: one TCP connection. An estimate."""
MEASURED_RESPONSES = 10_000
"""Of the step by which the work of driver and first rank is measured, where no number is given."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node does, in the units of the simulation."""

    engines: int
    chunk: int
    """Responses that an engine takes at a time, and decodes together."""
    decode_step_s: float
    """Of a decoding step with no sequence: weights and launches."""
    sequence_step_s: float
    """What every sequence adds to it."""
    score_s_per_token: float
    learn_s_per_token: float
    """Evaluation and update, were there no links."""
    gather_s: float
    """Of ZeRO-3 within an optimiser step, over the network where there are several nodes."""
    publish_s: float
    policy_bytes: float
    state_bytes: float
    rows_per_optimiser_step: int
    ranks: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One simulated step, seconds."""

    rollout: float
    waiting_for_longest: float
    """Share of the engines' time in which they were out of work."""
    score: float
    learn: float
    gathered: float
    """Part of `learn` in which ZeRO-3 moves parameters and gradients."""
    driver: float
    """Driver and first rank, one after the other, while all others wait."""
    weights: float

    @property
    def synchronous(self) -> float:
        return self.rollout + self.score + self.driver + self.learn + self.weights

    @property
    def prefetched(self) -> float:
        """Engines sample the next step while the learner works on this one (on GPUs of their own)."""
        return max(self.rollout, self.score + self.driver + self.learn) + self.weights

    @property
    def serial(self) -> str:
        """The largest part that more nodes do not shorten."""
        parts = {"driver": self.driver, "longest response": self.rollout * self.waiting_for_longest}
        parts |= {"weights": self.weights, "gathered parameters": self.gathered}
        return max(parts, key=lambda name: parts[name])


def response_lengths(data: Path, *, limit: int) -> np.ndarray:
    """Tokens of real answers, about.

    Raises:
        FileNotFoundError: the data set is not there.
    """
    file = data / "helpsteer2" / "helpsteer2.parquet"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: lengths are those of its responses. Give --data.")
    pairs = parquet.read_table(file, columns=["responses"])["responses"].to_pylist()
    words = [len(response.split()) for pair in pairs for response in pair]
    return np.clip(TOKENS_PER_WORD * np.array(words), 1, limit).astype(int)


def gpu_node(*, several: bool) -> Node:
    """The paper's recipe on a node of eight H100, by the roofline."""
    recipe = load_recipe("paper_qwen3_8b")
    policy, backbone = _shape("Qwen/Qwen3-8B"), _shape("Qwen/Qwen3-4B-Instruct-2507")
    gpu = Processor(accelerator=ACCELERATORS["h100"], share=1.0)
    ranks, alignment = recipe.cluster.alignment, recipe.alignment
    decoding, training = gpu.flops_per_s("bfloat16", decoding=True), gpu.flops_per_s("bfloat16")
    cache_bytes = 700 * policy.kv_bytes_per_token(2)  # of a sequence half-way
    weights, critic = policy.num_parameters, backbone.trunk_parameters
    # Evaluation 2 flops a weight of policy, reference and critic; update 8 of policy and critic with recomputation.
    learn = (2 * (2 * weights + critic) + 8 * (weights + critic)) / training / ranks.ranks
    link = NETWORK_BYTES_PER_S if several else ACCELERATORS["h100"].link_bytes_per_s
    return Node(
        engines=recipe.cluster.rollout.workers,
        chunk=recipe.cluster.rollout.max_sequences,
        decode_step_s=2 * weights / gpu.bytes_per_s + policy.num_layers * LAYER_LAUNCH_S["graphs"],
        sequence_step_s=2 * weights / decoding + cache_bytes / gpu.bytes_per_s,
        score_s_per_token=2 * critic / training,
        learn_s_per_token=learn,
        gather_s=4 * 4.0 * (weights + critic) / (0.7 * link),
        publish_s=BYTES["bfloat16"] * weights * 2 / HOST_BYTES_PER_S_PER_CORE,
        policy_bytes=float(BYTES["bfloat16"] * weights),
        state_bytes=float(CHECKPOINT_BYTES * (weights + critic)),
        rows_per_optimiser_step=alignment.ppo.mini_batch_size,
        ranks=ranks.ranks,
    )


def _shape(checkpoint: str) -> DecoderShape:
    shape = checkpoint_shape(checkpoint)
    assert shape is not None  # both are known by name
    return shape


def chunk_seconds(lengths: np.ndarray, node: Node) -> float:
    """A chunk ends with its longest response: step t decodes the responses that are longer than t."""
    return float(node.decode_step_s * lengths.max() + node.sequence_step_s * lengths.sum())


def simulate_rollout(lengths: np.ndarray, node: Node, nodes: int) -> tuple[float, float]:
    """Seconds until the last chunk is done, and the share of the engines' time that they had none."""
    engines = node.engines * nodes
    size = min(node.chunk, max(1, -(-len(lengths) // (2 * engines))))  # two chunks an engine or more, as the pool cuts
    free = [0.0] * engines
    busy = 0.0
    for start in range(0, len(lengths), size):
        seconds = chunk_seconds(lengths[start : start + size], node)
        busy += seconds
        heapq.heappush(free, heapq.heappop(free) + seconds)
    end = max(free)
    return end, 1 - busy / (end * engines)


def simulate_step(
    lengths: np.ndarray, node: Node, nodes: int, *, driver_us_per_token: float, network: str, scaling: str
) -> Step:
    rollout, waiting = simulate_rollout(lengths, node, nodes)
    tokens = 1.5 * float(lengths.sum())  # with prompts, which are half as long in this data
    rows = node.rows_per_optimiser_step * (nodes if scaling == "weak" else 1)
    optimiser_steps = len(lengths) / rows
    # A rank without a row waits: of more ranks than rows only some work.
    working = min(1.0, rows / (node.ranks * nodes))
    learn = tokens * node.learn_s_per_token / (nodes * working) + optimiser_steps * node.gather_s
    if network == "file":
        sent = (nodes - 1) * node.policy_bytes / TRANSFER_BYTES_PER_S
    else:
        sent = min(1, nodes - 1) * node.policy_bytes / (0.7 * NETWORK_BYTES_PER_S)
    return Step(
        rollout=rollout,
        waiting_for_longest=waiting,
        score=tokens * node.score_s_per_token / nodes,
        learn=learn,
        gathered=optimiser_steps * node.gather_s,
        driver=tokens * driver_us_per_token / 1e6,
        weights=node.publish_s + sent,
    )


def with_losses(step_s: float, node: Node, nodes: int, *, hours: float, checkpoint_every: int, seed: int) -> float:
    """Seconds a step when nodes are lost at random: the steps since the last commit are done again."""
    dice = np.random.default_rng(seed)
    restart = RESTART_S + node.state_bytes / (nodes * DISK_BYTES_PER_S)
    snapshot = node.state_bytes / (nodes * 8 * HOST_BYTES_PER_S_PER_CORE)
    clock, done, goal = 0.0, 0, 2000
    loss = dice.exponential(hours * 3600)
    while done < goal:
        clock += step_s
        if loss <= clock:
            clock, done = loss + restart, done - done % checkpoint_every
            loss = clock + dice.exponential(hours * 3600)
            continue
        done += 1
        clock += snapshot if done % checkpoint_every == 0 else 0.0
    return clock / goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with helpsteer2/helpsteer2.parquet")
    parser.add_argument("--scaling", choices=["weak", "strong"], default="weak")
    parser.add_argument("--network", choices=["nccl", "file"], default="nccl")
    parser.add_argument("--driver-us-per-token", type=float, help="of driver and first rank; measured where left out")
    parser.add_argument("--hours-between-losses", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.driver_us_per_token is None:
        options.driver_us_per_token = cost_of_step(MEASURED_RESPONSES).us_per_token
    print_table(simulated(options), options)


def simulated(options: argparse.Namespace) -> list[tuple[int, Step, float]]:
    """Nodes, a step, and seconds a step with losses."""
    recipe = load_recipe("paper_qwen3_8b")
    pool = response_lengths(options.data, limit=recipe.alignment.max_response_tokens)
    dice = np.random.default_rng(options.seed)
    rows = []
    for nodes in NODES:
        count = recipe.alignment.prompts_per_step * (nodes if options.scaling == "weak" else 8)
        node = gpu_node(several=nodes > 1)
        step = simulate_step(
            dice.choice(pool, count),
            node,
            nodes,
            driver_us_per_token=options.driver_us_per_token,
            network=options.network,
            scaling=options.scaling,
        )
        disturbed = with_losses(
            step.synchronous,
            node,
            nodes,
            hours=options.hours_between_losses,
            checkpoint_every=recipe.alignment.checkpoint_every,
            seed=options.seed,
        )
        rows.append((nodes, step, disturbed))
    return rows


def efficiency(rows: Sequence[tuple[int, Step, float]], *, scaling: str) -> list[float]:
    """Responses a second and node, as a share of one node's."""
    first = rows[0][1].synchronous
    return [first / (step.synchronous * (1 if scaling == "weak" else nodes)) for nodes, step, _ in rows]


def print_table(rows: Sequence[tuple[int, Step, float]], options: argparse.Namespace) -> None:
    print(
        f"{options.scaling} scaling, weights by {options.network}, driver and first rank "
        f"{options.driver_us_per_token:.3g} us a token, a node lost every {options.hours_between_losses:g} h\n"
    )
    print(
        f"{'nodes':>5}{'rollout':>9}{'idle':>6}{'score':>7}{'learn':>7}{'driver':>8}{'weights':>9}{'step s':>8}"
        f"{'prefetch':>10}{'losses':>8}{'per node':>10}"
    )
    shares = efficiency(rows, scaling=options.scaling)
    for (nodes, step, disturbed), share in zip(rows, shares, strict=True):
        print(
            f"{nodes:>5}{step.rollout:>9.1f}{step.waiting_for_longest:>6.0%}{step.score:>7.1f}{step.learn:>7.1f}"
            f"{step.driver:>8.1f}{step.weights:>9.1f}{step.synchronous:>8.1f}{step.prefetched:>10.1f}{disturbed:>8.1f}"
            f"{share:>10.0%}"
        )
    stops = [(nodes, step) for (nodes, step, _), share in zip(rows, shares, strict=True) if share < 0.5]
    if stops:
        nodes, step = stops[0]
        print(f"\nBelow half of one node's rate from {nodes} nodes on; most of what does not divide: {step.serial}.")
    else:
        print(f"\nAt {rows[-1][0]} nodes a node still does at least half of what it does alone.")


if __name__ == "__main__":
    main()
