"""Stage 4: answers of the base and the aligned policy on held-out prompts, scored, and their win rate.

    python jobs/generate_benchmark.py --recipe tiny

Runs the stages before it when their results are not in the workspace. With --benchmark, any model answers the questions
of AlpacaEval, Arena-Hard or MT-Bench instead; see --benchmark alpaca_eval --help.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.align_policy import align_policy
from jobs.run_job import run_job
from jobs.sft import sft
from jobs.train_reward_model import train_reward_model
from pipeline.benchmark.scored_answers import write_scored_answers
from pipeline.data.prompts import read_prompts, tokenise_prompts
from pipeline.data.run_data import data_fingerprints, resolve
from pipeline.evaluation.win_rate import compare_answers
from pipeline.records import Answer, Metrics, StageResult
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.stages import storage
from pipeline.stages.workspace import StageDirectory

if TYPE_CHECKING:
    from jobs.job_context import JobContext

VERSION = 2
BASE, ALIGNED = "base", "aligned"


def generate_benchmark(
    job: JobContext, policy: StageResult, aligned: StageResult, reward_model: StageResult
) -> StageResult:
    recipe = job.recipe
    return job.stages.run(
        "generate_benchmark",
        VERSION,
        lambda stage: _generate(stage, job, {BASE: policy, ALIGNED: aligned}, reward_model),
        config=recipe.model_dump(mode="json", include={"seed", "data", "benchmark"}),
        inputs=[policy, aligned, reward_model],
        data=data_fingerprints(recipe),
    )


def _generate(
    stage: StageDirectory, job: JobContext, policies: dict[str, StageResult], reward_model: StageResult
) -> Metrics:
    from pipeline.loops.generation import answer_prompts
    from pipeline.models.backbone import load_tokenizer, require_context
    from pipeline.rollouts.publishing import publish_checkpoint

    recipe, config = job.recipe, job.recipe.benchmark
    data = job.data
    with storage.reading(policies[BASE].location) as directory:
        tokenizer = load_tokenizer(directory)
        require_context(directory, config.max_prompt_tokens + config.max_response_tokens, "benchmark")
    named = list(read_prompts([resolve(file) for file in config.prompts])) if config.prompts else data.heldout_prompts
    prompts = tokenise_prompts(named, tokenizer, max_prompt_tokens=config.max_prompt_tokens)[: config.num_prompts]
    probes = choose_probes(prompts, vocabulary_size=len(tokenizer), seed=recipe.seed)
    rollouts, scorer = job.rollouts(policies[BASE]), job.scorer(reward_model)
    answers: dict[str, list[Answer]] = {}
    with storage.writing(stage.result_uri) as result:
        for version, (generator, policy) in enumerate(policies.items()):
            stage.leave_if_preempted()
            location = os.path.join(job.publish_directory, f"benchmark-{generator}")
            with storage.reading(policy.location) as checkpoint:
                weights = publish_checkpoint(checkpoint, location, probes, dtype=recipe.policy.dtype, version=version)
            rollouts.load_weights(weights)
            answers[generator] = answer_prompts(
                rollouts, scorer, prompts, config, generator=f"{recipe.name}-{generator}", seed=recipe.seed
            )
            path = Path(result) / generator / "model_outputs.json"
            write_scored_answers(path, answers[generator], dataset=recipe.name)
        metrics = compare_answers(answers[ALIGNED], answers[BASE], prompts, data.gold)
        if data.gold is not None:
            kinds = {prompt.id: data.gold.kind(prompt.messages) for prompt in prompts}
            planted = {kinds[p.id]: data.gold.objective_weights(p.messages) for p in prompts}
            (Path(result) / "planted.json").write_text(json.dumps({"kinds": kinds, "weights": planted}))
    return metrics


def main(job: JobContext) -> None:
    policy = sft(job)
    reward_model = train_reward_model(job, policy)
    generate_benchmark(job, policy, align_policy(job, policy, reward_model), reward_model)


def command() -> None:
    """The stage over a workspace, or any model on an official benchmark."""
    if any(argument.split("=")[0] == "--benchmark" for argument in sys.argv[1:]):
        from jobs import benchmark_answers

        benchmark_answers.main()
    else:
        run_job(__doc__, main)


if __name__ == "__main__":
    command()
