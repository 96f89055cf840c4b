"""Stage 4: answers of the base and the aligned policy on held-out prompts, scored, and their win rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.benchmark.scored_answers import write_scored_answers
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.planted import GoldAnnotator
from pipeline.data.prompts import PromptColumns, read_prompts, read_prompts_with_columns, tokenise_prompts
from pipeline.data.recipe_files import resolve
from pipeline.data.run_data import RunData, data_fingerprints
from pipeline.evaluation.win_rate import compare_answers, win_rate
from pipeline.loops.generation import answer_prompts
from pipeline.models.backbone import load_tokenizer, require_context
from pipeline.ports import RewardScorer, RewardSources, RolloutSource
from pipeline.records import Answer, Message, Metrics, Prompt, PromptGroup
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.publishing import publish_checkpoint
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

VERSION = 4
BASE, ALIGNED = "base", "aligned"


@dataclass(frozen=True, kw_only=True)
class BenchmarkPorts:
    """What a benchmark needs from the outside world."""

    rollouts: RolloutSource
    rewards: RewardSources
    """The reward model of the run; the rewards of its alignment where it has none."""
    judge: RewardScorer | None = None
    """Scores the finished answers once more, and chooses none of them."""


def benchmark_stage(
    experiment: ExperimentConfig, policy: str, aligned: str, reward_model: str | None, judge: str | None = None
) -> StageSpec:
    """The identity of the benchmark stage.

    Args:
        policy, aligned, reward_model, judge: fingerprints of the stages whose results it reads. Without a reward model
            the answers are scored by the rewards of the alignment, whose identity holds them.
    """
    return StageSpec(
        name="generate_benchmark",
        version=VERSION,
        config=experiment.model_dump(mode="json", include={"seed", "data", "benchmark"}),
        inputs=tuple(stage for stage in (policy, aligned, reward_model, judge) if stage is not None),
        data=tuple(data_fingerprints(experiment)),
    )


def run_benchmark(
    stage: StageDirectory,
    experiment: ExperimentConfig,
    data: RunData,
    *,
    policy_uri: str,
    aligned_uri: str,
    publish_directory: str,
    open_ports: Callable[[Mapping[str, PromptColumns]], BenchmarkPorts],
) -> Metrics:
    """Writes the answers of each policy; where the truth is known, also `planted.json` with what the prompts ask for.

    Args:
        policy_uri, aligned_uri: the policy before and after alignment.
        publish_directory: where the rollout engines read weights.
        open_ports: engines of the policy's architecture, and rewards; given the other columns of each prompt, by id.

    Raises:
        ConfigError: prompts and answers exceed the policy's context.
        DataError: a prompt file cannot be used, or a prompt is not of the planted world.
        Preempted: the process is about to be ended.
    """
    prompts, probes = benchmark_prompts(experiment, data, policy_uri)
    ports = open_ports(benchmark_columns(experiment, data))
    answers: dict[str, list[Answer]] = {}
    with storage.writing(stage.result_uri) as result:
        for version, (name, uri) in enumerate({BASE: policy_uri, ALIGNED: aligned_uri}.items()):
            stage.leave_if_preempted()
            location = storage.join(publish_directory, f"benchmark-{name}")
            with storage.reading(uri) as checkpoint:
                weights = publish_checkpoint(
                    checkpoint, location, probes, dtype=experiment.policy.dtype, version=version
                )
            ports.rollouts.load_weights(weights)
            answers[name] = answer_prompts(
                ports.rollouts,
                ports.rewards,
                prompts,
                experiment.benchmark,
                generator=f"{experiment.name}-{name}",
                seed=experiment.seed,
            )
            write_scored_answers(answers_file(result, name), answers[name], dataset=experiment.name)
        if data.gold is not None:
            (Path(result) / "planted.json").write_text(json.dumps(planted_truth(prompts, data.gold)))
    metrics = compare_answers(answers[ALIGNED], answers[BASE], prompts, data.gold)
    return metrics | (judge_answers(ports.judge, prompts, answers[ALIGNED], answers[BASE]) if ports.judge else {})


def judge_answers(
    judge: RewardScorer, prompts: Sequence[Prompt], aligned: Sequence[Answer], base: Sequence[Answer]
) -> Metrics:
    """The win rate of aligned against base by the judge, over all prompts and over those of each source of pairs."""
    conversations = [prompt.messages for prompt in prompts]
    scores = [
        [score.mean for score in judge.score(conversations, [answer.output for answer in answers])]
        for answers in (aligned, base)
    ]
    metrics = {f"judge/{name}": value for name, value in win_rate(*scores).items()}
    sources = [prompt.id.partition("/")[0] for prompt in prompts]
    for source in sorted({*sources}) if len({*sources}) < len(prompts) else ():
        of_source = [[score for score, name in zip(each, sources, strict=True) if name == source] for each in scores]
        metrics |= {f"judge/{source}/{name}": value for name, value in win_rate(*of_source).items()}
        metrics[f"judge/{source}/prompts"] = float(len(of_source[0]))
    return metrics


def benchmark_prompts(
    experiment: ExperimentConfig, data: RunData, policy_uri: str
) -> tuple[list[Prompt], list[PromptGroup]]:
    """The prompts as the policy's tokens, and probes of the numerics gate from them. Raises as `run_benchmark`."""
    config = experiment.benchmark
    with storage.reading(policy_uri) as directory:
        tokenizer = load_tokenizer(directory)
        require_context(directory, config.max_prompt_tokens + config.max_response_tokens, "benchmark")
    named = named_prompts(experiment, data)
    fitting = tokenise_prompts(
        named,
        tokenizer,
        max_prompt_tokens=config.max_prompt_tokens,
        max_too_long=experiment.data.max_too_long,
        section="benchmark",
    )
    print(f"benchmark  {len(fitting)} of {len(named)} prompts fit in {config.max_prompt_tokens} tokens", flush=True)
    prompts = drawn(fitting, config.num_prompts, experiment.seed)
    return prompts, choose_probes(prompts, vocabulary_size=len(tokenizer), seed=experiment.seed)


def named_prompts(experiment: ExperimentConfig, data: RunData) -> Sequence[tuple[str, tuple[Message, ...]]]:
    """(id, messages) of the prompts that `benchmark.prompts` names, else of the held-out ones."""
    files = experiment.benchmark.prompts
    return list(read_prompts([resolve(file) for file in files])) if files else data.heldout_prompts


def require_prompts_fit(experiment: ExperimentConfig, data: RunData, policy_uri: str) -> None:
    """Checks the token limits of alignment and benchmark on their prompts, before the stages in front of them run.

    Raises:
        DataError: more than `data.max_too_long` of the prompts exceed a limit.
    """
    with storage.reading(policy_uri) as directory:
        tokenizer = load_tokenizer(directory)
    limits = [("benchmark", named_prompts(experiment, data), experiment.benchmark.max_prompt_tokens)]
    if experiment.alignment.samples_prompts:  # else it reads pairs, which have a limit of their own
        limits.append(("alignment", data.train_prompts, experiment.alignment.max_prompt_tokens))
    for section, named, limit in limits:
        tokenise_prompts(
            named,
            tokenizer,
            max_prompt_tokens=limit,
            max_too_long=experiment.data.max_too_long,
            section=section,
        )


def benchmark_columns(experiment: ExperimentConfig, data: RunData) -> Mapping[str, PromptColumns]:
    """Id of a benchmark prompt -> the other columns of its row."""
    files = [resolve(file) for file in experiment.benchmark.prompts]
    if not files:
        return data.prompt_columns
    return {identity: columns for identity, _, columns in read_prompts_with_columns(files)}


def drawn(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """At most `count` of the prompts, in their order; drawn, since a mixture lies in the order of its sources."""
    chosen = np.random.default_rng([seed, len(prompts)]).permutation(len(prompts))[:count]
    return [prompts[i] for i in sorted(chosen)]


def answers_file(result: str, name: str) -> Path:
    """The file of a finished stage with the answers of a policy, `BASE` or `ALIGNED`."""
    return Path(result) / name / "model_outputs.json"


def planted_truth(prompts: Sequence[Prompt], gold: GoldAnnotator) -> Mapping[str, Mapping]:
    """Id of a prompt -> its kind, and kind -> the weights of the objectives."""
    kinds = {prompt.id: gold.kind(prompt.messages) for prompt in prompts}
    weights = {kinds[prompt.id]: gold.objective_weights(prompt.messages) for prompt in prompts}
    return {"kinds": kinds, "weights": weights}
