"""The plan's memory and time beside what the same work takes here, on one core.

    OMP_NUM_THREADS=1 python -m tests.performance.plan_accuracy

The work is `learner_speed`'s: an update of `PPOLearner` in one process, float32, policy with a value head, and an
evaluation of the same rollouts. Memory is the resident size that the process gains over its imports; the plan's is that
of `cluster/planning/memory.py`. Seconds are the median of the updates by the clock; the plan's are those of
`cluster/planning/roofline.py` at the speed that it measures of this core. On a busy machine the clock is late, so the
processor's time stands beside it.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from transformers import Qwen3Config

from cluster.planning.accelerators import this_cpu
from cluster.planning.decoder_shape import shape_from_config
from cluster.planning.memory import TrainedDecoder, TrainingLoad, training_memory
from cluster.planning.roofline import Processor, Sequences, evaluate_phase, update_phase
from pipeline.config.cluster import RanksConfig
from pipeline.learning.memory import resident_peak_gib
from tests.performance.learner_speed import SHAPES, create_learner, random_experience


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.device, options.dtype = "cpu", "float32"
    torch.set_num_threads(1)

    config = Qwen3Config(**SHAPES[options.shape], tie_word_embeddings=True)
    before = resident_peak_gib()
    learner = create_learner(config, options, recompute=False)
    experience = random_experience(learner, options)
    learner.update(experience, 0)
    clock, processor = [], []
    for step in range(1, options.rounds + 1):
        started, busy = time.perf_counter(), time.process_time()
        learner.update(experience, step)
        clock.append(time.perf_counter() - started)
        processor.append(time.process_time() - busy)
    gained_gb = (resident_peak_gib() - before) * 2**30 / 1e9

    batch = Sequences(
        count=options.responses,
        prompt_tokens=0.75 * options.prompt_tokens,  # lengths lie between half of the limit and the limit
        response_tokens=0.75 * options.response_tokens,
        longest_response=options.response_tokens,
    )
    load = TrainingLoad(
        decoders=(TrainedDecoder(shape=shape_from_config(config.to_dict(), source="here"), has_language_head=True),),
        head_parameters=config.hidden_size + 1,
        reference=None,
        dtype="float32",
        recompute=False,
        micro_batch_tokens=min(options.micro_batch_tokens, batch.tokens),
        micro_batches=batch.tokens / options.micro_batch_tokens,
    )
    core = Processor(accelerator=this_cpu(), share=1.0)
    ranks = RanksConfig(ranks=1, zero_stage=1)
    update = update_phase(load, batch, ranks, core, optimiser_steps=1, spans_nodes=False)
    planned_gb = sum(training_memory(load, None)[0].values()) / 1e9
    evaluate = evaluate_phase(load, batch, ranks, core)
    flops = core.peak_flops_per_s("float32") / 1e9
    print(processor())
    print(f"{options.shape}, {batch.tokens:.0f} tokens, one core, {flops:.0f} GFLOP/s measured")
    print(f"memory, GB:        planned {planned_gb:.3f}, measured {gained_gb:.3f}, {planned_gb / gained_gb:.2f}")
    for name, seconds in (("clock", clock), ("processor", processor)):
        ratio = update.seconds / median(seconds)
        print(f"update, s ({name}): planned {update.seconds:.2f}, measured {median(seconds):.2f}, {ratio:.2f}")
    print(f"evaluate, s: planned {evaluate.seconds:.2f}")


if __name__ == "__main__":
    main()
