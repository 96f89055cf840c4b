"""What a stage can know to be wrong it says before any rank starts."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import actors.rank_group
import actors.rollout_pool
import jobs.align_policy
import jobs.job_context
import jobs.train_reward_model
from cluster.autoscaler import RolloutWaits
from cluster.rollout_plan import THROUGH_FILES
from jobs.align_policy import align_policy
from jobs.command_line import JobOptions
from jobs.exit_codes import PREEMPTED
from jobs.job_context import JobContext
from jobs.sft import sft, split_texts
from jobs.train_reward_model import train_reward_model
from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError, DataError
from pipeline.records import StageResult
from pipeline.stages.ownership import read_owner
from pipeline.stages.runner import StageRunner
from pipeline.stages.scaling_requests import request_rollout_workers, requested_rollout_workers
from pipeline.stages.workspace import Workspace

SMALL = (
    "data.planted.num_train_pairs=16",
    "data.planted.num_heldout_pairs=8",
    "data.planted.num_sft_texts=300",
    "data.planted.num_train_prompts=8",
    "data.planted.num_heldout_prompts=8",
)


@pytest.fixture
def rooms_of(tmp_path, monkeypatch):
    def no_rank(*arguments, **options):
        raise AssertionError("a rank was about to start")

    monkeypatch.setattr(actors.rank_group, "RankGroup", no_rank)
    with ExitStack() as exits:
        workspace = exits.enter_context(Workspace.open(str(tmp_path / "run"), job="test"))
        yield lambda *settings: JobContext(
            load_recipe("tiny", (*SMALL, *settings)), StageRunner(workspace), THROUGH_FILES, exits
        )


def test_input_that_is_right_comes_as_far_as_the_ranks(rooms_of):
    with pytest.raises(AssertionError, match="a rank was about to start"):
        sft(rooms_of())


def test_adapters_on_layers_that_the_policy_does_not_have(rooms_of):
    with pytest.raises(ConfigError, match=r"sft\.lora\.targets: a qwen3 model has no linear layer named c_attn"):
        sft(rooms_of("sft.lora={targets: [c_attn]}"))


def test_texts_of_which_none_fits(rooms_of):
    with pytest.raises(DataError, match=r"none of 300 texts fits in sft\.max_length = 2 tokens"):
        sft(rooms_of("sft.max_length=2"))


@pytest.mark.parametrize(("texts", "heldout"), [(2, 1), (19, 1), (200, 20), (2560, 256), (9000, 256)])
def test_of_few_texts_a_tenth_is_held_out(texts, heldout):
    held, trained_on = split_texts(list(range(texts)))
    assert (held, trained_on) == (list(range(heldout)), list(range(heldout, texts)))


def test_a_single_text_is_not_split(rooms_of):
    with pytest.raises(DataError, match=r"1 text to fine-tune on, .*\(sft\.num_steps=0\)"):
        sft(rooms_of("data.planted.num_sft_texts=1"))


def test_other_objectives_are_another_fine_tuned_policy_and_the_same_adopted_one(rooms_of, monkeypatch):
    """The best of several rated completions, which is imitated, depends on what rates it."""
    begun = []
    monkeypatch.setattr(
        StageRunner, "run", lambda self, name, version, compute, *, config, **rest: begun.append(config)
    )
    for steps in (1, 0):
        for objectives in ("[a, b]", "[c, d]"):
            sft(rooms_of(f"objectives={objectives}", f"sft.num_steps={steps}"))
    assert begun[0] != begun[1]
    assert begun[2] == begun[3]


# Four commits, of which the first is the best. Two of the newest are kept by default.
@pytest.mark.parametrize(
    ("settings", "aligning", "training"),
    [
        ([], [2, 3], [2, 3]),
        (["alignment.keep_best=reward/mean"], [0, 2, 3], [2, 3]),
        (["alignment.keep_best=reward/mean", "alignment.keep_checkpoints=1"], [0, 3], [2, 3]),
        (["reward.keep_best=eval/accuracy"], [2, 3], [0, 2, 3]),
    ],
)
def test_a_stage_keeps_the_commits_that_the_recipe_asks_for(
    settings, aligning, training, rooms_of, tmp_path, monkeypatch
):
    found = {}

    def commit_four_times(stage, *_):
        for step, merit in enumerate((0.9, 0.1, 0.2, 0.3)):
            os.makedirs(stage.checkpoints.uri(step))
            stage.checkpoints.commit(step, {"metrics": {"reward/mean": merit, "eval/accuracy": merit}})
        checkpoints = Path(stage.checkpoints.uri(0)).parent
        found[stage.name] = [int(path.stem.removeprefix("step-")) for path in sorted(checkpoints.glob("*.json"))]
        return {}

    monkeypatch.setattr(jobs.align_policy, "_align", commit_four_times)
    monkeypatch.setattr(jobs.train_reward_model, "_train", commit_four_times)
    before = StageResult(name="before", location=str(tmp_path), fingerprint="0", metrics={})
    rooms = rooms_of(*settings)
    align_policy(rooms, before, before)
    train_reward_model(rooms, before)
    assert found == {"align_policy": aligning, "train_reward_model": training}


def test_a_job_forgets_what_was_asked_of_the_last_one_and_hears_what_is_asked_from_its_beginning(tmp_path, monkeypatch):
    """Also before its pool is there: models may train for hours until then."""
    place = str(tmp_path)

    @contextmanager
    def cluster_that_comes_up(*_):
        assert requested_rollout_workers(place) is None
        request_rollout_workers(place, 3)
        yield

    with Workspace.open(place, job="the last one"):
        request_rollout_workers(place, 7)
    monkeypatch.setattr(jobs.job_context, "open_cluster", cluster_that_comes_up)
    monkeypatch.setattr(jobs.job_context, "node_resources", lambda: [{"CPU": 64.0}])
    monkeypatch.setattr(
        actors.rollout_pool, "RolloutPool", lambda *_, requested_workers, **__: asked(requested_workers)
    )
    options = JobOptions(recipe=load_recipe("tiny"), workspace=place, dry_run=False, take_over=False)

    @contextmanager
    def asked(requested_workers):
        yield requested_workers()

    with jobs.job_context.open_job(options) as rooms:
        assert rooms.rollouts(StageResult(name="policy", location=place, fingerprint="0", metrics={})) == 3


@pytest.fixture
def autoscaler_of(rooms_of, monkeypatch):
    """What the pool is given, by the settings."""
    given = []

    @contextmanager
    def pool(*_, autoscaler, **__):
        given.append(autoscaler)
        yield

    monkeypatch.setattr(actors.rollout_pool, "RolloutPool", pool)

    def autoscaler_of(*settings):
        rooms_of(*settings).rollouts(StageResult(name="policy", location="", fingerprint="0", metrics={}))
        return given.pop()

    return autoscaler_of


def test_a_recipe_with_autoscaling_gives_the_pool_an_autoscaler_of_its_bounds(autoscaler_of):
    prefetch = ("alignment.prefetch=continue", "alignment.ppo.tis_cap=2")
    waits = RolloutWaits(rollout_s=1.0, learner_wait_s=0.0, queue_wait_s=0.0)
    bounds = "cluster.rollout.autoscale={min_workers: 2, max_workers: 5}"
    assert autoscaler_of(*prefetch, bounds).wanted(1, waits) == 2
    assert autoscaler_of(*prefetch, bounds).wanted(9, waits) == 5
    assert autoscaler_of(*prefetch) is None


CANNOT_BE_INTERRUPTED = """
import contextlib, os, signal, sys, time
import jobs.job_context
from cluster.rollout_plan import THROUGH_FILES
from cluster.autoscaler import RolloutWaits
from jobs.command_line import job_options
from jobs.run_job import job_command

options = job_options(job_command("", None).options(["--workspace", sys.argv[1], "cluster.deadlines.grace_s=1"]))
jobs.job_context.open_cluster = lambda *_: contextlib.nullcontext()
jobs.job_context.node_resources = lambda: [{"CPU": 64.0}]
with jobs.job_context.open_job(options):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(100)  # goes on behind a signal, as Ray's waits do
"""


def test_a_job_that_is_not_done_within_the_grace_leaves_with_its_code_and_lets_its_workspace_go(tmp_path):
    job = subprocess.run(
        [sys.executable, "-c", CANNOT_BE_INTERRUPTED, str(tmp_path)], capture_output=True, text=True, timeout=90
    )
    assert job.returncode == PREEMPTED, job.stderr[-2000:]
    assert "not ready to within cluster.deadlines.grace_s = 1 s" in job.stderr
    assert read_owner(str(tmp_path)) is None


def test_pairs_of_which_none_fits(rooms_of, tiny_policy):
    with pytest.raises(DataError, match=r"none of 16 pairs fits in max_length = 2 tokens"):
        train_reward_model(
            rooms_of("reward.max_length=2"),
            StageResult(name="sft", location=tiny_policy, fingerprint="0", metrics={}),
        )
