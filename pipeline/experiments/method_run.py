"""One cell of a comparison of methods, in this process: a policy aligned by one method, measured as all others are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.config.comparison import ComparisonConfig
from pipeline.config.recipe import Recipe
from pipeline.data.planted import GoldAnnotator
from pipeline.data.preferences import normalised_prompt
from pipeline.data.run_data import RunData, pairs_of_the_reward_model
from pipeline.evaluation.implicit_reward_scorer import ImplicitRewardScorer
from pipeline.evaluation.scored_rows_file import ComparisonScorer
from pipeline.experiments.local_run import LocalRun, scorer_in_process
from pipeline.experiments.method_measurements import evaluate_reward, kl_to_start, training_budget
from pipeline.experiments.reward_run import RunResult
from pipeline.experiments.shared_stages import SECONDS, from_root_or_computed
from pipeline.learning.builders import DirectTrainerSpec, build_direct_trainer, engine_in_process
from pipeline.loops.benchmark import ALIGNED, BASE, answers_file, benchmark_prompts
from pipeline.loops.direct_alignment import align_directly
from pipeline.loops.policy_pairs import OwnPairs, RankingPorts
from pipeline.objectives.implicit_rewards import form_of_method
from pipeline.ports import DirectLearner
from pipeline.records import Metrics, Prompt, StageResult
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

METHOD_CURVE_METRICS = (
    "eval/accuracy",
    "eval/loss",
    "eval/margin",
    "eval/change_rms",
    "reward/zscore",
    "gold/mean",
    "kl/per_response",
    "response/tokens",
)
"""Those of a training that its method logs."""


@dataclass(frozen=True, kw_only=True)
class CellInputs:
    """What the cells of one seed share."""

    policy: StageResult
    """Fine-tuned; every method starts from it, and it is the reference."""
    judge: StageResult
    """The reward model that scores all answers."""
    reward_model: StageResult
    """What the policy is aligned against; the judge, where a method reads pairs alone."""
    reward_model_seconds: float
    """Time of the training of `reward_model`; 0 where the method does not use it."""


def align_by_method(
    recipe: Recipe, data: RunData, inputs: CellInputs, *, shared: str, directory: str, device: str
) -> RunResult:
    """Aligns by the method of the recipe, lets the policy answer held-out prompts, and evaluates the method's reward.

    Args:
        shared: where results lie that several cells may read: difficulties, log-probabilities of the reference.
        directory: where the stages of this cell lie; an interrupted cell goes on there.

    Returns:
        metrics: `compare_answers` on held-out prompts, `kl/*`, `response/*`, `budget/*`, `table2/*`.
        margins: [prompts] aligned minus base, by "reward" and, where the truth is known, by "gold".
        seconds: of the alignment, the reward model it needs included, without the evaluation.
    """
    # Prompts that do not fit are found before the alignment, not after it.
    benchmark_prompts(recipe, data, inputs.policy.location)
    run = LocalRun.open(recipe, data, inputs.policy, directory=directory, device=device)
    stages, aligned = _align(run, inputs, shared)
    answers = run.answer(aligned, inputs.judge, scorer_in_process(recipe, inputs.judge.location, device))
    measured = measure_policy(run, inputs, aligned, recipe.comparison)
    return cell_result(recipe, data, inputs, stages, answers, measured)


def measure_policy(run: LocalRun, inputs: CellInputs, aligned: StageResult, comparison: ComparisonConfig) -> Metrics:
    """`kl/*` and `response/*` of the aligned policy, and `table2/*` of its reward. Removes what was published."""
    prompts = benchmark_prompts(run.experiment, run.data, run.policy.location)[0]
    run.load(aligned)
    moved = kl_to_start(run.rollouts, prompts, run.policy.location, run.experiment, comparison, device=run.device)
    storage.delete_directory(run.publish_directory)
    return moved | evaluate_reward(
        _reward_of(run, inputs, aligned),
        run.data,
        comparison,
        run.directory,
        identity=aligned.fingerprint,
        seed=run.experiment.seed,
    )


def cell_result(
    recipe: Recipe,
    data: RunData,
    inputs: CellInputs,
    stages: Sequence[StageDirectory],
    answers: StageResult,
    measured: Metrics,
) -> RunResult:
    """What the finished stages of a cell and its measurements say together; see `align_by_method`.

    Args:
        stages: those of the method, the last one the alignment.
        answers: the stage that answered the held-out prompts.
        measured: of `measure_policy`.
    """
    prompts = benchmark_prompts(recipe, data, inputs.policy.location)[0]
    manifests = [stage.manifest() for stage in stages]
    rows = [stage.metrics_rows() for stage in stages]
    num_pairs = len(pairs_of_the_reward_model(data, recipe.judge).train_pairs)
    budget = training_budget(
        recipe, [row for stage in rows for row in stage], [m["metrics"] for m in manifests], num_pairs
    )
    seconds = sum(manifest[SECONDS] for manifest in manifests) + inputs.reward_model_seconds
    return RunResult(
        metrics=dict(answers.metrics) | measured | budget | {"budget/seconds": seconds},
        curve=_curve(rows[-1]),
        prompts=[normalised_prompt(prompt.messages) for prompt in prompts],
        margins=_margins(answers.location, prompts, data.gold),
        seconds=seconds,
    )


def _align(run: LocalRun, inputs: CellInputs, shared: str) -> tuple[list[StageDirectory], StageResult]:
    """The finished stages of the method, of which the last one is the alignment, and its result."""
    if not run.experiment.alignment.is_direct:
        scorer = scorer_in_process(run.experiment, inputs.reward_model.location, run.device)
        stage, aligned = run.align(inputs.reward_model, scorer)
        return [stage], aligned
    stages: list[StageDirectory] = []

    def run_stage(spec: StageSpec, compute: Callable[[StageDirectory], Metrics]) -> StageResult:
        # Difficulties do not depend on the settings of the alignment, so other cells read them.
        root = shared if spec.name == "measure_difficulty" else run.directory
        stages.append(StageDirectory.shared(root, spec))
        return from_root_or_computed(spec, root, compute)

    def open_trainer(spec: DirectTrainerSpec) -> AbstractContextManager[DirectLearner]:
        return nullcontext(build_direct_trainer(spec, engine_in_process(run.device)))

    if run.experiment.alignment.pairs == "data":
        aligned = align_directly(
            run.experiment,
            lambda: run.data,
            run.policy,
            workspace=shared,
            run_stage=run_stage,
            open_trainer=open_trainer,
        )
        return stages, aligned
    scorer = scorer_in_process(run.experiment, inputs.reward_model.location, run.device)
    own = OwnPairs(
        experiment=run.experiment,
        start=run.policy,
        reward_model=inputs.reward_model,
        workspace=shared,
        publish_directory=run.publish_directory,
        open_trainer=open_trainer,
        open_ranking=lambda: nullcontext(RankingPorts(rollouts=run.rollouts, scorer=scorer)),
    )
    aligned = own.align(lambda: run.data, run_stage)
    return stages, aligned


def _reward_of(run: LocalRun, inputs: CellInputs, aligned: StageResult) -> ComparisonScorer:
    """What Table 2 evaluates: the reward that the policy implies, or the reward model it was aligned against."""
    config = run.experiment.alignment
    if not config.is_direct:
        return scorer_in_process(run.experiment, inputs.reward_model.location, run.device)
    form = form_of_method(config.direct)
    reference = config.direct.reference_checkpoint or run.policy.location
    return ImplicitRewardScorer.load(
        aligned.location,
        reference if form.needs_reference else None,
        form,
        beta=config.direct.beta,
        max_tokens_per_batch=config.max_tokens_per_micro_batch,
        device=run.device,
    )


def _curve(rows: Sequence[Mapping[str, float]]) -> list[Metrics]:
    """A point a step that measured something. The last step is logged twice: as an update, and as an evaluation."""
    points: dict[int, Metrics] = {}
    for row in rows:
        point = points.setdefault(int(row["step"]), {"step": float(row["step"] + 1)})
        point |= {name: row[name] for name in METHOD_CURVE_METRICS if name in row}
    return [point for point in points.values() if len(point) > 1]


def _margins(result: str, prompts: Sequence[Prompt], gold: GoldAnnotator | None) -> dict[str, list[float]]:
    """What alignment changed on each prompt."""
    answers = {name: read_scored_answers(answers_file(result, name)) for name in (BASE, ALIGNED)}
    values = {"reward": {name: [answer.score.mean for answer in scored] for name, scored in answers.items()}}
    if gold is not None:
        values["gold"] = {
            name: [gold.reward(prompt.messages, a.output) for prompt, a in zip(prompts, scored, strict=True)]
            for name, scored in answers.items()
        }
    return {
        reading: [after - before for after, before in zip(by_policy[ALIGNED], by_policy[BASE], strict=True)]
        for reading, by_policy in values.items()
    }
