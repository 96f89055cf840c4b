"""The plan's memory and time beside what the same work takes here, on one core.

    OMP_NUM_THREADS=1 python -m tests.performance.plan_accuracy
    OMP_NUM_THREADS=1 python -m tests.performance.plan_accuracy --without-engine    # no vLLM here

The work is `learner_speed`'s: an update of `PPOLearner` in one process, float32, policy with a value head, and an
evaluation of the same rollouts. A reward model on a backbone of the same shape is trained on pairs of the planted
world, and scores responses. A vLLM engine of that shape samples responses of one length, in this process. Memory is
the resident size that the process gains over its imports; the plan's is that of `cluster/planning/memory.py`. Seconds
are medians by the clock; the plan's are those of `cluster/planning/roofline.py` at the speed that it measures of this
core. On a busy machine the clock is late, so the processor's time stands beside it.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import mean, median
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from actors.worker_handle import engine_environment
from cluster.engine_build import resolve_rollout
from cluster.planning.accelerators import this_cpu
from cluster.planning.decoder_shape import shape_from_config
from cluster.planning.memory import TrainedDecoder, TrainingLoad, training_memory
from cluster.planning.roofline import (
    Engines,
    Processor,
    Sequences,
    evaluate_phase,
    rollout_phase,
    score_phase,
    update_phase,
)
from cluster.rollout_plan import THROUGH_FILES
from pipeline.columns import Rollouts
from pipeline.config.cluster import RanksConfig, RolloutConfig
from pipeline.config.data import PlantedConfig
from pipeline.data.collate import PairCollator
from pipeline.data.planted import PlantedWorld, build_tokenizer
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.learning.memory import resident_peak_gib
from pipeline.models.backbone import save_causal_lm
from pipeline.records import Prompt, SamplingParams
from pipeline.rollouts.requests import RolloutRequest
from tests.performance.learner_speed import SHAPES, create_learner, random_experience
from tests.performance.processor import processor
from tests.support.learners import OBJECTIVES, reward_trainer, statistics_of, tokenised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=128)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=48, help="of the planted world, in a step of the reward model")
    parser.add_argument("--without-engine", action="store_true", help="leave the rollout out: it needs vLLM")
    options = parser.parse_args()
    options.device, options.dtype = "cpu", "float32"
    torch.set_num_threads(1)

    config = Qwen3Config(**SHAPES[options.shape], tie_word_embeddings=True)
    before = resident_peak_gib()
    learner = create_learner(config, options, recompute=False)
    experience = random_experience(learner, options)
    clock, busy = seconds_of(lambda step: learner.update(experience, step), options.rounds)
    gained_gb = (resident_peak_gib() - before) * 2**30 / 1e9

    batch = Sequences(
        count=options.responses,
        prompt_tokens=0.75 * options.prompt_tokens,  # lengths lie between half of the limit and the limit
        response_tokens=0.75 * options.response_tokens,
        longest_response=options.response_tokens,
    )
    shape = shape_from_config(config.to_dict(), source="here")
    load = TrainingLoad(
        decoders=(TrainedDecoder(shape=shape, has_language_head=True),),
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
    flops = core.peak_flops_per_s("float32") / 1e9
    print(processor())
    print(f"{options.shape}, {batch.tokens:.0f} tokens, one core, {flops:.0f} GFLOP/s measured")
    print(f"memory, GB:        planned {planned_gb:.3f}, measured {gained_gb:.3f}, {planned_gb / gained_gb:.2f}")
    print_phase("update", update, clock, busy)
    rollouts = rollouts_of(experience)
    evaluated = seconds_of(lambda step: learner.evaluate_tokens(rollouts), options.rounds)
    print_phase("evaluate", evaluate_phase(load, batch, ranks, core), *evaluated)
    with TemporaryDirectory() as directory:
        tokenizer = build_tokenizer()
        torch.manual_seed(0)
        policy = AutoModelForCausalLM.from_config(config)
        save_causal_lm(policy.state_dict(), config, tokenizer, directory)
        del policy
        check_reward_model(directory, shape, core, options)
        if not options.without_engine:
            check_rollout(directory, shape, core, options)


def seconds_of(work, rounds):
    """Seconds by the clock and by the processor of each round but the first, which warms up."""
    clock, busy = [], []
    for step in range(rounds + 1):
        started, worked = time.perf_counter(), time.process_time()
        work(step)
        clock.append(time.perf_counter() - started)
        busy.append(time.process_time() - worked)
    return clock[1:], busy[1:]


def print_phase(name, phase, clock, busy):
    for by, seconds in (("clock", median(clock)), ("processor", median(busy))):
        ratio = phase.seconds / seconds
        print(f"{name}, s ({by}): planned {phase.seconds:.2f}, measured {seconds:.2f}, {ratio:.2f}", flush=True)


def rollouts_of(experience):
    """The rollouts that an experience was made of, as far as an evaluation reads them."""
    sequences = experience.sequences
    count = len(sequences)
    return Rollouts(
        prompts=tuple(Prompt(id="-", messages=(), token_ids=tuple(sequence.prompt_ids)) for sequence in sequences),
        sample_indices=(0,) * count,
        response_ids=sequences.response_ids,
        response_texts=("",) * count,
        logprobs=sequences.response_ids,
        policy_versions=(0,) * count,
        finish_reasons=("stop",) * count,
        repetition=(0.0,) * count,
    )


def check_reward_model(directory, shape, core, options):
    """A step of `RewardTrainer`, and scores of as many texts as it saw."""
    world = PlantedWorld(PlantedConfig(num_train_pairs=options.pairs, num_heldout_pairs=16), OBJECTIVES, seed=0)
    tokenizer = build_tokenizer()
    trainer = reward_trainer(
        directory, world, tokenizer, num_steps=options.rounds + 1, max_tokens=options.micro_batch_tokens
    )
    pairs = tokenised(world, tokenizer)
    batch = PairCollator(statistics=statistics_of(world), temperature=1.0, seed=0)(pairs, 0)
    clock, busy = seconds_of(lambda step: trainer.update(batch, step), options.rounds)
    prompt = mean(len(pair.tokens.prompt_ids) for pair in pairs)
    response = mean(len(ids) for pair in pairs for ids in pair.tokens.response_ids)
    both = Sequences(
        count=2 * len(pairs), prompt_tokens=prompt / 2, response_tokens=response, longest_response=response
    )
    load = TrainingLoad(
        decoders=(TrainedDecoder(shape=shape, has_language_head=False),),
        head_parameters=sum(p.numel() for p in trainer.engine.module.head.parameters()),
        reference=None,
        dtype="float32",
        recompute=False,
        micro_batch_tokens=options.micro_batch_tokens,
        micro_batches=both.tokens / options.micro_batch_tokens,
    )
    ranks = RanksConfig(ranks=1, zero_stage=1)
    phase = update_phase(load, both, ranks, core, optimiser_steps=1, spans_nodes=False)
    print(f"reward model: {len(pairs)} pairs, {both.tokens:.0f} tokens")
    print_phase("train_reward_model", phase, clock, busy)
    scorer = RewardModelScorer(
        trainer.engine.module.eval(), tokenizer, trainer.card, max_tokens_per_batch=options.micro_batch_tokens
    )
    texts = world.train_pairs()
    clock, busy = seconds_of(
        lambda step: scorer.score([pair.prompt for pair in texts], [pair.chosen for pair in texts]), options.rounds
    )
    chosen = mean(len(pair.tokens.response_ids[0]) for pair in pairs)
    scored = Sequences(count=len(texts), prompt_tokens=prompt, response_tokens=chosen, longest_response=chosen)
    print_phase("score", score_phase(shape, "float32", scored, core, replicas=1), clock, busy)


def check_rollout(directory, shape, core, options):
    """Responses of one length from a vLLM engine with random weights, in this process."""
    config = resolve_rollout(RolloutConfig(workers=1, cpus_per_worker=1, max_sequences=options.responses))
    os.environ.update(engine_environment(config))
    from actors.rollout_worker import RolloutWorker

    worker = RolloutWorker("engine")
    length = options.prompt_tokens + options.response_tokens
    worker.start(directory, config, THROUGH_FILES, "float32", length, 0)
    worker._sampler.accept_policy(0)
    dice = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, (options.responses, options.prompt_tokens), generator=dice).tolist()
    sampling = SamplingParams(
        temperature=1.0, top_p=1.0, max_response_tokens=options.response_tokens, samples_per_prompt=1, seed=0
    )
    sampled = []

    def sample(step):
        # Other prompts in every round: an engine keeps the cache of those that it has read.
        requests = [
            RolloutRequest(
                prompt=Prompt(id=str(n), messages=(), token_ids=(100 + step, *ids[1:])), sample_index=0, seed=n
            )
            for n, ids in enumerate(prompts)
        ]
        sampled.append(worker.sample(requests, sampling).num_response_tokens)

    clock, busy = seconds_of(sample, options.rounds)
    batch = Sequences(
        count=options.responses,
        prompt_tokens=options.prompt_tokens,
        response_tokens=mean(sampled) / options.responses,
        longest_response=options.response_tokens,
    )
    engines = Engines(
        shape=shape,
        dtype="float32",
        workers=1,
        shards=1,
        processor=core,
        sequences=options.responses,
        eager=config.enforce_eager,
    )
    print(f"rollout: {options.responses} responses, {mean(sampled):.0f} tokens")
    print_phase("rollout", rollout_phase(engines, batch), clock, busy)


if __name__ == "__main__":
    main()
