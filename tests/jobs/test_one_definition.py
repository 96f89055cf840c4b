"""A stage is defined once: a job over actors and an experiment in one process compute the same from the same recipe."""

import json
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

import actors.deepspeed_learners
import jobs.align_policy
from actors.alignment_tasks import align_one, prepare_policy, train_shared_reward_model
from actors.deepspeed_learners import deepspeed_reward_trainer, deepspeed_sft_trainer
from actors.ray_tasks import ProcessResources
from cluster.rollout_plan import THROUGH_FILES
from cluster.rollout_room import RolloutRoom
from jobs.align_policy import align_policy
from jobs.full_pipeline import run_pipeline
from jobs.generate_benchmark import generate_benchmark
from jobs.open_job import Job
from jobs.run_report import write_report
from jobs.sft import sft
from jobs.shared_actors import SharedActors
from jobs.train_reward_model import train_judge, train_reward_model
from pipeline.config.load import load_recipe
from pipeline.data.run_data import load_data
from pipeline.errors import ConfigError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.experiments.grid import READS
from pipeline.learning.builders import build_ppo_learner, build_reward_trainer, build_sft_trainer, reference_in_process
from pipeline.learning.engine import TorchEngine
from pipeline.loops.align_policy import AlignmentPorts, alignment_stage
from pipeline.loops.benchmark import benchmark_stage
from pipeline.loops.reward import reward_stage
from pipeline.loops.sft import sft_stage
from pipeline.models.reward_model_card import read_card
from pipeline.rewards.in_process import FunctionInProcess
from pipeline.rewards.opened import open_sources
from pipeline.rollouts.torch_rollouts import TorchRollouts
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.runner import StageRunner
from pipeline.stages.workspace import Workspace
from tests.support.judge_server import completion, judge_server
from tests.support.metrics_page import undocumented

ONE_CORE = ProcessResources(cpus=1.0, gpus=0.0, data_root="")
SMALL = (
    *("data.planted.num_train_pairs=48", "data.planted.num_heldout_pairs=8", "data.planted.num_sft_texts=40"),
    *("data.planted.num_train_prompts=8", "data.planted.num_heldout_prompts=4"),
    *("policy.tiny.hidden_size=16", "policy.tiny.intermediate_size=16"),
    *("sft.num_steps=2", "sft.batch_size=8", "sft.eval_every=1"),
    *("reward.num_steps=2", "reward.batch_pairs=8", "reward.eval_every=1"),
    # The better of two models is the result, and it may be the first.
    *("reward.checkpoint_every=1", "reward.keep_best=eval/accuracy"),
    *("alignment.num_steps=2", "alignment.prompts_per_step=4", "alignment.ppo.mini_batch_size=4"),
    *("alignment.checkpoint_every=1", "alignment.keep_best=reward/mean"),
    *("alignment.eval_every=1", "alignment.eval_prompts=3"),
    *("alignment.max_response_tokens=8", "benchmark.max_response_tokens=8"),
)

MEASURED_ANEW = ("memory/", "seconds/", "tokens_per_s/", "weights/")
"""Metrics of where a stage ran, not of what it computed."""


def recipe_of(*settings):
    return load_recipe("experiments_alignment_tiny", (*SMALL, *settings))


def computed(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(MEASURED_ANEW)}


class OneProcess(SharedActors):
    """The engines and the scorer of a job, without actors."""

    def rollouts(self, policy):
        return TorchRollouts(policy.location, dtype="float32")

    def scorer(self, reward_model):
        budget = self._recipe.alignment.max_tokens_per_micro_batch
        return RewardModelScorer.load(reward_model.location, max_tokens_per_batch=budget)

    def judge(self, judge):
        return self.scorer(judge)

    def _function(self, spec):
        return FunctionInProcess(spec)


@pytest.fixture
def open_job(tmp_path, monkeypatch):
    """Opens the real job of a recipe on learners in this process."""
    builders = {deepspeed_sft_trainer: build_sft_trainer, deepspeed_reward_trainer: build_reward_trainer}

    def open_learner(name, build, ranks, deadlines, spec):
        return nullcontext(builders[build](spec, TorchEngine))

    @contextmanager
    def open_ports(recipe, actors, policy, reward_model, stage, spec):
        learner = build_ppo_learner(spec, TorchEngine, reference_in_process(spec.dtype, "cpu"))
        with ExitStack() as exits:
            sources = open_sources(recipe.alignment.rewards, actors.reward_openers(reward_model), exits)
            yield AlignmentPorts(rollouts=actors.rollouts(policy), sources=sources, learner=learner)

    monkeypatch.setattr(actors.deepspeed_learners, "open_ranked_learner", open_learner)
    monkeypatch.setattr(jobs.align_policy, "_open_ports", open_ports)
    with ExitStack() as exits:
        workspace = exits.enter_context(Workspace.open(str(tmp_path / "run"), job="test", needs_bytes=0))

        def opened(recipe):
            room = RolloutRoom(workers=1, reason="")
            engines = OneProcess(recipe, THROUGH_FILES, workspace.uri, exits, room=lambda: room)
            engines.publish_directory = str(tmp_path / "published")
            stages = StageRunner(workspace)
            return Job(recipe=recipe, stages=stages, read_data=lambda: load_data(recipe), actors=engines)

        yield opened


@pytest.fixture
def job(open_job):
    return open_job(recipe_of())


def test_job_and_experiment_have_the_same_stages_with_the_same_numbers(job, tmp_path):
    stages, recipe, read_data = job.stages, job.recipe, job.read_data
    policy = sft(stages, recipe, read_data)
    reward_model = train_reward_model(stages, recipe, read_data, policy)
    aligned = align_policy(stages, recipe, read_data, job.actors, policy, reward_model)
    judge = train_judge(stages, recipe, read_data, policy)
    benchmark = generate_benchmark(stages, recipe, read_data, job.actors, policy, aligned, reward_model, judge)

    shared = str(tmp_path / "shared")
    shared_policy = prepare_policy(recipe, shared, ONE_CORE)
    shared_reward_model = train_shared_reward_model(recipe, shared_policy, shared, ONE_CORE)
    for ours, theirs in ((policy, shared_policy), (reward_model, shared_reward_model)):
        assert (ours.name, ours.fingerprint) == (theirs.name, theirs.fingerprint)
        assert ours.metrics.keys() == theirs.metrics.keys()
        assert computed(ours.metrics) == pytest.approx(computed(theirs.metrics), rel=1e-6)

    run = align_one(recipe, shared_policy, shared_reward_model, ONE_CORE)["metrics"]
    of_the_stages = aligned.metrics | benchmark.metrics
    assert of_the_stages.keys() <= run.keys()
    assert {name: run[name] for name in computed(of_the_stages)} == pytest.approx(computed(of_the_stages), rel=1e-6)


def test_objectives_that_nobody_scored_and_the_package_named_are_factors_in_the_card(job):
    data = job.read_data()
    unscored = {
        side: [replace(pair, scores_chosen=None, scores_rejected=None) for pair in getattr(data, side)]
        for side in ("train_pairs", "heldout_pairs")
    }
    policy = sft(job.stages, job.recipe, job.read_data)
    for own, names in ((False, ("factor 1", "factor 2", "factor 3", "factor 4")), (True, job.recipe.objectives)):
        recipe = job.recipe.model_copy(update={"own_objectives": own})
        trained = train_reward_model(job.stages, recipe, lambda: replace(data, gold=None, **unscored), policy)
        assert read_card(trained.location).objectives == names
        scored = train_reward_model(job.stages, recipe.model_copy(update={"seed": 1}), job.read_data, policy)
        assert read_card(scored.location).objectives == job.recipe.objectives


def test_a_job_with_a_judge_ends_with_its_verdict_and_writes_no_metric_without_an_explanation(job, tmp_path):
    recipe = recipe_of("judge={head: gate, share: 0.3}")
    stages, data = job.stages, load_data(recipe)

    def read_data():
        return data

    policy = sft(stages, recipe, read_data)
    reward_model = train_reward_model(stages, recipe, read_data, policy)
    judge = train_judge(stages, recipe, read_data, policy)
    assert read_card(judge.location).head == "gate"
    sizes = [model.metrics["data/train_pairs"] for model in (reward_model, judge)]
    assert sum(sizes) == len(data.train_pairs)
    assert min(sizes) > 0
    aligned = align_policy(stages, recipe, read_data, job.actors, policy, reward_model)
    benchmark = generate_benchmark(stages, recipe, read_data, job.actors, policy, aligned, reward_model, judge)
    metrics = benchmark.metrics
    assert 0.0 <= metrics["judge/low"] <= metrics["judge/win_rate"] <= metrics["judge/high"] <= 1.0
    report = write_report(stages, recipe, policy, reward_model, aligned, benchmark, judge)
    assert "by the judge, trained on other prompts" in Path(report).read_text()
    rows = [row for file in tmp_path.rglob(METRICS_FILE) for row in read_metrics(str(file))]
    of_stages = [stage.metrics for stage in (policy, reward_model, judge, aligned, benchmark)]
    assert len(rows) > len(of_stages)
    assert undocumented(key for keys in (*rows, *of_stages) for key in keys) == []


def test_an_experiments_run_is_told_apart_by_all_that_its_stages_read():
    recipe = recipe_of()
    stages = (
        sft_stage(recipe),
        reward_stage(recipe, "policy"),
        alignment_stage(recipe, "policy", "reward model"),
        benchmark_stage(recipe, "policy", "aligned", "reward model"),
    )
    assert set().union(*(stage.config for stage in stages)) <= READS["policy"]
    assert set(stages[1].config) <= READS["reward_model"]


def test_an_experiment_refuses_what_a_job_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"sft\.lora\.targets: a qwen3 model has no linear layer named c_attn"):
        prepare_policy(recipe_of("sft.lora={targets: [c_attn]}"), str(tmp_path), ONE_CORE)
    policy = prepare_policy(recipe_of(), str(tmp_path), ONE_CORE)
    with pytest.raises(ConfigError, match=r"reward\.lora\.targets: .* no linear layer named c_attn"):
        train_shared_reward_model(recipe_of("reward.lora={targets: [c_attn]}"), policy, str(tmp_path), ONE_CORE)
    reward_model = train_shared_reward_model(recipe_of(), policy, str(tmp_path), ONE_CORE)
    for section in ("alignment", "benchmark"):
        too_long = recipe_of(f"{section}.max_response_tokens=400")
        with pytest.raises(ConfigError, match=rf"{section}\.max_prompt_tokens .* exceeds the model's context of 256"):
            align_one(too_long, policy, reward_model, ONE_CORE)


PYTHON_REWARD = """
def knows(prompt, response, columns):
    if "raise" in prompt[-1]["content"]:
        raise ValueError("this prompt has no answer")
    return float(columns["answer"] in response) - 0.01 * len(response.split())
"""


def longer_wins(body, n):
    """Of the pairwise judge."""
    text = body["messages"][-1]["content"]
    a = text.partition("[Response A]\n")[2].partition("\n\n[Response B]")[0]
    b = text.partition("[Response B]\n")[2].partition("\n\n[Your task]")[0]
    return completion("[[A]]" if len(a) > len(b) else "[[B]]")


@pytest.mark.parametrize("rewards", ["sum", "critic", "gdpo"])
def test_a_run_with_rewards_of_its_own_needs_no_pairs_and_no_reward_model(rewards, open_job, tmp_path, capsys):
    """The whole job: fine-tuning, alignment, benchmark, report. PPO's critic starts from the policy."""
    with judge_server(longer_wins) as server:
        run_with_rewards(rewards, server.url, open_job, tmp_path)
    aligned, benchmark, fine_tuned = (
        json.loads(next((tmp_path / "run" / "stages").glob(f"{stage}-*/manifest.json")).read_text())["metrics"]
        for stage in ("align_policy", "generate_benchmark", "sft")
    )
    assert fine_tuned == {}
    assert not list((tmp_path / "run" / "stages").glob("train_reward_model-*"))
    second = "judge" if rewards == "gdpo" else "length"
    assert {"reward/knows", f"reward/{second}", "reward/dropped"} <= aligned.keys()
    assert ("reward_scale/knows/std" in aligned) == (rewards != "gdpo")
    assert bool(server.seen) == (rewards == "gdpo")
    assert {"reward/win_rate", "reward/base", "reward/aligned"} <= benchmark.keys()
    assert "reward_scale/model/std" not in aligned
    output = capsys.readouterr().out
    assert "win rate over base, by the alignment's rewards" in output
    assert "reward knows, first to last step" in output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "reward model: fingerprint" not in page


def run_with_rewards(rewards, judge_url, open_job, tmp_path):
    """A function of the user's with a length, or with a pairwise judge."""
    algorithm, second, settings = {
        "sum": ("grpo", "length: {at_most: 4}", ()),
        "critic": ("ppo", "length: {at_most: 4}", ()),
        "gdpo": (
            "grpo",
            f"judge: {{url: '{judge_url}', model: m, form: pairwise}}",
            (
                *("alignment.combine_rewards=gdpo", "alignment.ppo.advantages=group_centred"),
                *("alignment.ppo.whiten_advantages=true", "alignment.keep_best=null"),
            ),
        ),
    }[rewards]
    world = load_data(recipe_of())
    asked = [(f"p{n}", messages) for n, (_, messages) in enumerate([*world.train_prompts, *world.heldout_prompts])]
    rows = [{"id": name, "messages": list(messages), "answer": "check"} for name, messages in asked]
    rows += [{"id": "bad", "prompt": "please raise the bread .", "answer": "check"}]
    prompts, reward = tmp_path / "prompts.jsonl", tmp_path / "reward.py"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text(PYTHON_REWARD)
    recipe = recipe_of(
        *(f"data.prompts=[{prompts}]", "data.heldout_fraction=0.3", "sft.num_steps=0"),
        *(f"alignment.algorithm={algorithm}", "alignment.samples_per_prompt=2", "alignment.num_steps=3"),
        # Every prompt in every step, so that the bad one is there too.
        *("alignment.prompts_per_step=8", "alignment.ppo.mini_batch_size=16", "alignment.checkpoint_every=10"),
        "alignment.rewards=[{python: {function: "
        + f"'{reward}:knows', columns: [answer]}}, name: knows, on_failure: drop}}, {{{second}}}]",
        *settings,
    )
    run_pipeline(open_job(recipe))


def test_the_text_of_a_reward_is_part_of_the_identity_of_the_alignment(tmp_path):
    reward = tmp_path / "reward.py"

    def identity(text):
        reward.write_text(text)
        recipe = recipe_of(f"alignment.rewards=[{{python: '{reward}:f'}}]")
        return alignment_stage(recipe, "policy", None).fingerprint

    first = identity("def f(prompt, response, columns): return 1")
    assert identity("def f(prompt, response, columns): return 2") != first
    assert identity("def f(prompt, response, columns): return 1") == first
