"""One long row on one process, and on n that share it: seconds, memory, and whether the gradients are the same.

    OMP_NUM_THREADS=1 python -m tests.performance.long_row --ranks 1 2

The work is a forward and a backward pass of `Policy`, a prompt and its responses, float32, gloo between the processes.
Memory is the peak of what torch's allocator gives out within the two passes: activations, logits, gradients. Beside it
stands what the plan says of the first two. The plan has no mask of a response that shares its prompt (`--responses 2`):
ranks do not divide it, and a GPU needs none. Seconds are the fastest of the rounds, by the clock and by a process's own
processor time; on a busy machine the clock is late.
"""

from __future__ import annotations

import argparse
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from transformers import Qwen3Config, Qwen3ForCausalLM

from actors.sequence_group import join_sequence_group
from cluster.planning.decoder_shape import shape_from_config
from cluster.planning.memory import TrainedDecoder, TrainingLoad, activation_bytes, logit_bytes
from pipeline.models.critic import Policy
from pipeline.models.onednn_linear import with_onednn
from pipeline.models.packing import pack
from pipeline.records import PromptGroup
from tests.performance.processor import processor
from tests.support.allocations import peak_tensor_bytes


def config_of(options: argparse.Namespace) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=8192,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=options.hidden_size // 8,
        max_position_embeddings=options.tokens,
        tie_word_embeddings=False,
    )


def run(rank: int, ranks: int, options: argparse.Namespace, answers) -> None:
    """One process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{options.port + ranks}", rank=rank, world_size=ranks)
    group = join_sequence_group(ranks, timeout=timedelta(minutes=10))
    torch.manual_seed(0)
    model = with_onednn(Policy(Qwen3ForCausalLM(config_of(options))))
    response = options.tokens * 3 // 4 // options.responses
    prompt, *responses = torch.randint(0, 8192, (options.tokens,)).split(
        [options.tokens - response * options.responses, *[response] * options.responses]
    )
    row = PromptGroup(prompt_ids=tuple(prompt.tolist()), response_ids=tuple(tuple(r.tolist()) for r in responses))
    packed = pack([row], sequence_group=group)

    def step() -> None:
        model.zero_grad()
        nll = -model(packed, response, 1.0).mean()
        (nll if rank == 0 else 0.0 * nll).backward()  # one rank of a group counts the loss

    seconds = []
    for _ in range(options.rounds):
        dist.barrier()
        started, busy = time.perf_counter(), time.process_time()
        step()
        seconds.append((time.perf_counter() - started, time.process_time() - busy))
    model.zero_grad()
    peak = peak_tensor_bytes(step)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    if rank == 0:
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        answers.put((*(min(times) for times in zip(*seconds, strict=True)), peak, gradients.numpy()))
    dist.barrier()
    dist.destroy_process_group()


def planned_bytes(ranks: int, options: argparse.Namespace) -> float:
    shape = shape_from_config(config_of(options).to_dict(), source="--layers and --hidden-size")
    load = TrainingLoad(
        decoders=(TrainedDecoder(shape=shape, has_language_head=True),),
        head_parameters=0,
        reference=None,
        dtype="float32",
        recompute=False,
        micro_batch_tokens=options.tokens / ranks,
        micro_batches=1,
    )
    return activation_bytes(load)[0] + logit_bytes(load)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--responses", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29600)
    options = parser.parse_args()
    print(processor())
    print(f"{'ranks':>5} {'clock s':>8} {'processor s':>12} {'peak MB':>8} {'planned MB':>11} {'gradient gap':>13}")
    context, first = multiprocessing.get_context("spawn"), None
    for ranks in options.ranks:
        answers = context.SimpleQueue()
        running = multiprocessing.start_processes(
            partial(run, ranks=ranks, options=options, answers=answers), nprocs=ranks, join=False
        )
        clock, busy, peak, gradients = answers.get()
        while not running.join():
            pass
        gradients = torch.from_numpy(gradients)
        first = gradients if first is None else first
        gap = float((gradients - first).norm() / first.norm())
        planned = planned_bytes(ranks, options)
        print(f"{ranks:>5} {clock:>8.2f} {busy:>12.2f} {peak / 1e6:>8.0f} {planned / 1e6:>11.0f} {gap:>13.1e}")


if __name__ == "__main__":
    main()
