"""Memory of a rank that builds a PPO learner, publishes and exports: ZeRO-3, models split while they load, or after.

    OMP_NUM_THREADS=1 python -m tests.performance.sharded_loading                  # 1, 2 and 4 ranks
    OMP_NUM_THREADS=1 python -m tests.performance.sharded_loading --ranks 2 --tied

The learner has a policy, a critic of its own from a reward model, and a frozen reference, all of one random Qwen3
shape, float32 in memory and bfloat16 in their files. "whole" reads every model whole on every rank, and DeepSpeed
splits it afterwards; "shards" is the learner as it is. Each rank is a process, over gloo, with the settings that
`RankGroup` gives it.

Memory is anonymous memory, `RssAnon` of /proc/<pid>/status, read every 2 ms by another process: the pages of a mapped
file are not in it, and the kernel can drop those. MB are 1e6 bytes, beyond those of a process that has loaded a tiny
model before, the largest of all ranks. "loaded" is the peak until the last model is loaded, "built" the peak until
optimiser and engine are there, "published" and "exported" those of `publish_weights` and `export`, beyond the memory at
their start. "shard" is what a rank holds of the three models. Freed memory stays with the process and is used again, so
a later phase can take less than it needs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.config.alignment import PPOConfig
from pipeline.config.cluster import RanksConfig
from pipeline.data.planted import OBJECTIVES, build_tokenizer
from pipeline.learning.builders import PPOLearnerSpec, build_ppo_learner
from pipeline.learning.memory import keep_freed_memory
from pipeline.models.backbone import load_causal_lm, save_causal_lm
from pipeline.models.reward_model import make_head, save_reward_model
from pipeline.records import PromptGroup
from tests.performance.storage_speed import processor_name
from tests.support.learners import ALIGNMENT, HEAD, reward_card

WAYS = ("whole", "shards")
TINY = {"hidden_size": 64, "layers": 1, "vocabulary": 0}
PHASES = ("loaded", "built", "published", "exported")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tied", action="store_true", help="one matrix for embedding and head")
    parser.add_argument("--json", type=Path, help="writes the rows there, too")
    options = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory) / "warm up", argparse.Namespace(**vars(options) | TINY))
        sizes = write_models(Path(directory), options)
        million, largest = sizes["numbers"] / 1e6, 4 * sizes["largest"] / 1e6
        print(f"{processor_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; float32, gloo, ZeRO-3")
        print(f"{million:.0f}M parameters in policy, critic and reference; the largest {largest:.0f} MB")
        print(f"{'ranks':>5} {'way':>7} {'shard':>7}" + "".join(f"{phase:>11}" for phase in PHASES) + f"{'seconds':>9}")
        for num_ranks in options.ranks:
            for way in options.ways:
                peaks = measure(Path(directory), way, num_ranks)
                rows.append({"ranks": num_ranks, "way": way, "shard": 4 * sizes["numbers"] / num_ranks / 1e6, **peaks})
                cells = "".join(f"{peaks[phase]:11.0f}" for phase in PHASES)
                print(f"{num_ranks:5} {way:>7} {rows[-1]['shard']:7.0f}{cells}{peaks['seconds']:9.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def write_models(directory: Path, options: Any) -> dict[str, int]:
    """A policy, and a reward model of the same decoder, with random weights; how many numbers the learner then has."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=max(options.vocabulary, len(tokenizer)),
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=max(1, options.hidden_size // 128),
        head_dim=64,
        tie_word_embeddings=options.tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).bfloat16()
    save_causal_lm(model.state_dict(), model.config, tokenizer, str(directory / "policy"))
    unknown = (0.0,) * len(OBJECTIVES)
    backbone = {f"backbone.{name}": tensor for name, tensor in model.model.state_dict().items()}
    head = make_head("bt", config.hidden_size, len(OBJECTIVES), HEAD).state_dict()
    save_reward_model(
        str(directory / "reward model"),
        state_dict=backbone | {f"head.{name}": tensor for name, tensor in head.items()},
        backbone_config=model.config.to_dict(),
        tokenizer=tokenizer,
        card=reward_card("bt", SimpleNamespace(mean=unknown, std=unknown)),
    )
    policy = sum(parameter.numel() for parameter in model.parameters())
    critic = sum(parameter.numel() for parameter in model.model.parameters())
    return {"numbers": 2 * policy + critic, "largest": max(parameter.numel() for parameter in model.parameters())}


def measure(directory: Path, way: str, num_ranks: int) -> dict[str, float]:
    """The largest peak of each phase over the ranks, MB, and the seconds that the build took."""
    context = multiprocessing.get_context("spawn")
    address = f"127.0.0.1:{free_port()}"
    with context.Manager() as manager, watched(manager, num_ranks) as (pids, phases, peaks):
        processes = [
            context.Process(target=run_rank, args=(rank, num_ranks, address, str(directory), way, pids, phases))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
        seconds = max(phases[f"seconds {rank}"] for rank in range(num_ranks))
    return {phase: max(peaks[rank, phase] for rank in range(num_ranks)) / 1e6 for phase in PHASES} | {
        "seconds": seconds
    }


@contextmanager
def watched(manager: Any, num_ranks: int) -> Iterator[tuple[Any, Any, dict[tuple[int, str], float]]]:
    """Reads the memory of the ranks while the block runs: their pids by rank, what each is doing, and the peaks."""
    pids, phases, peaks = manager.dict(), manager.dict(), {}
    ended = threading.Event()

    def watch() -> None:
        starts: dict[tuple[int, str], float] = {}
        base: dict[int, float] = {}
        while not ended.is_set():
            processes, doing = dict(pids), dict(phases)  # in this order: a rank says first what it does
            for rank, pid in processes.items():
                phase, memory = doing[rank], anonymous_bytes(pid)
                if phase is None or memory is None:
                    continue
                if phase in ("loaded", "built"):
                    start = base.setdefault(rank, memory)
                else:
                    start = starts.setdefault((rank, phase), memory)
                peaks[rank, phase] = max(peaks.get((rank, phase), 0.0), memory - start)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield pids, phases, peaks
    finally:
        ended.set()
        watcher.join()


def anonymous_bytes(pid: int) -> float | None:
    """None where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), None)


def run_rank(
    rank: int, num_ranks: int, address: str, directory: str, way: str, pids: dict[int, int], phases: dict[Any, Any]
) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    from actors.deepspeed_engine import DeepSpeedEngine, ZeroShards, join_process_group, sharded_reference, shards_of

    torch.set_num_threads(1)
    device = join_process_group(rank, num_ranks, address)
    keep_freed_memory(device)
    config = RanksConfig(ranks=num_ranks, zero_stage=3, cpus_per_rank=1)
    ppo = PPOConfig(mini_batch_size=4, critic="separate", critic_learning_rate=1e-6)
    spec = PPOLearnerSpec(
        config=ALIGNMENT.model_copy(update={"ppo": ppo}),
        policy_uri=f"{directory}/policy",
        reward_model_uri=f"{directory}/reward model",
        dtype="float32",
        probes=(PromptGroup(prompt_ids=(1, 2, 3), response_ids=((4, 5),)),),
        publish_directory=f"{directory}/published",
        seed=0,
    )

    def make_engine(*arguments: Any, **named: Any) -> DeepSpeedEngine:
        phases[rank] = "built"
        return DeepSpeedEngine(*arguments, ranks=config, device=device, **named)

    load_causal_lm(f"{directory}/warm up/policy", dtype="float32", shards=ZeroShards(device))  # imports what it needs
    phases[rank] = "loaded"
    pids[rank] = os.getpid()
    time.sleep(0.05)  # the other process sees the memory before
    started = time.perf_counter()
    learner = build_ppo_learner(
        spec,
        make_engine,
        partial(sharded_reference, ranks=config, dtype=spec.dtype, device=device),
        shards_of(config, device) if way == "shards" else None,
    )
    phases[f"seconds {rank}"] = time.perf_counter() - started
    for phase, work in (
        ("published", lambda: learner.publish_weights(0)),
        ("exported", lambda: learner.export(f"{directory}/exported")),
    ):
        phases[rank] = None
        learner.engine.sum_over_ranks(torch.zeros(()))
        phases[rank] = phase
        time.sleep(0.05)
        work()
    del pids[rank]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
