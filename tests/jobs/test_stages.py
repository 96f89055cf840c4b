"""What a stage can know to be wrong it says before any rank starts."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import actors.deepspeed_learners
import actors.rollout_pool
import jobs.open_job
import pipeline.loops.align_policy
import pipeline.loops.reward
from cluster.autoscaler import RolloutWaits
from cluster.rollout_plan import THROUGH_FILES
from cluster.rollout_room import RolloutRoom
from jobs.align_policy import align_policy
from jobs.command_line import JobOptions
from jobs.exit_codes import PREEMPTED
from jobs.open_job import Job
from jobs.scale_rollouts import scale_rollouts_command
from jobs.sft import sft
from jobs.shared_actors import SharedActors
from jobs.train_reward_model import train_reward_model
from pipeline.config.load import load_recipe
from pipeline.data.run_data import load_data
from pipeline.errors import ConfigError, DataError
from pipeline.loops.sft import split_texts
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


ROOM = RolloutRoom(workers=2, reason="a node holds no more")


@pytest.fixture
def job_of(tmp_path, monkeypatch):
    def no_rank(*arguments, **options):
        raise AssertionError("a rank was about to start")

    monkeypatch.setattr(actors.deepspeed_learners, "RankGroup", no_rank)
    with ExitStack() as exits:
        workspace = exits.enter_context(Workspace.open(str(tmp_path / "run"), job="test"))

        def job_of(*settings):
            recipe = load_recipe("tiny", (*SMALL, *settings))
            return Job(
                recipe=recipe,
                stages=StageRunner(workspace),
                read_data=lambda: load_data(recipe),
                actors=SharedActors(recipe, THROUGH_FILES, workspace.uri, exits, room=lambda: ROOM),
            )

        yield job_of


def fine_tune(job):
    return sft(job.stages, job.recipe, job.read_data)


def test_input_that_is_right_comes_as_far_as_the_ranks(job_of):
    with pytest.raises(AssertionError, match="a rank was about to start"):
        fine_tune(job_of())


def test_adapters_on_layers_that_the_policy_does_not_have(job_of):
    with pytest.raises(ConfigError, match=r"sft\.lora\.targets: a qwen3 model has no linear layer named c_attn"):
        fine_tune(job_of("sft.lora={targets: [c_attn]}"))


def test_the_policy_that_fine_tuning_starts_from_lies_in_the_workspace_while_it_trains(job_of, monkeypatch):
    seen = []

    def open_learner(name, build, ranks, deadlines, spec):
        seen.append((spec.policy_uri, Path(spec.policy_uri, "config.json").is_file()))
        raise KeyError("far enough")

    monkeypatch.setattr(actors.deepspeed_learners, "open_ranked_learner", open_learner)
    job = job_of()
    with pytest.raises(KeyError, match="far enough"):
        fine_tune(job)
    [(place, was_there)] = seen
    assert place.startswith(f"{job.stages.workspace.uri}/stages/sft-")
    assert was_there
    assert not Path(place).exists()


def test_texts_of_which_none_fits(job_of):
    with pytest.raises(DataError, match=r"none of 300 texts fits in sft\.max_length = 2 tokens"):
        fine_tune(job_of("sft.max_length=2"))


@pytest.mark.parametrize(("texts", "heldout"), [(2, 1), (19, 1), (200, 20), (2560, 256), (9000, 256)])
def test_of_few_texts_a_tenth_is_held_out(texts, heldout):
    held, trained_on = split_texts(list(range(texts)))
    assert (held, trained_on) == (list(range(heldout)), list(range(heldout, texts)))


def test_a_single_text_is_not_split(job_of):
    with pytest.raises(DataError, match=r"1 text to fine-tune on, .*\(sft\.num_steps=0\)"):
        fine_tune(job_of("data.planted.num_sft_texts=1"))


def test_other_objectives_are_another_fine_tuned_policy_and_the_same_adopted_one(job_of, monkeypatch):
    """The best of several rated completions, which is imitated, depends on what rates it."""
    begun = []
    monkeypatch.setattr(StageRunner, "run", lambda self, spec, compute, **rest: begun.append(spec.config))
    for steps in (1, 0):
        for objectives in ("[a, b]", "[c, d]"):
            fine_tune(job_of(f"objectives={objectives}", f"sft.num_steps={steps}"))
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
    settings, aligning, training, job_of, tmp_path, monkeypatch
):
    found = {}

    def commit_four_times(stage, *_, **__):
        for step, merit in enumerate((0.9, 0.1, 0.2, 0.3)):
            os.makedirs(stage.checkpoints.uri(step))
            stage.checkpoints.commit(step, {"metrics": {"reward/mean": merit, "eval/accuracy": merit}})
        checkpoints = Path(stage.checkpoints.uri(0)).parent
        found[stage.name] = [int(path.stem.removeprefix("step-")) for path in sorted(checkpoints.glob("*.json"))]
        return {}

    monkeypatch.setattr(pipeline.loops.align_policy, "run_alignment", commit_four_times)
    monkeypatch.setattr(pipeline.loops.reward, "run_reward_training", commit_four_times)
    before = StageResult(name="before", location=str(tmp_path), fingerprint="0", metrics={})
    job = job_of(*settings)
    job.actors.publish_directory = str(tmp_path / "published")
    align_policy(job.stages, job.recipe, job.read_data, job.actors, before, before)
    train_reward_model(job.stages, job.recipe, job.read_data, before)
    assert found == {"align_policy": aligning, "train_reward_model": training}


def test_a_request_beyond_the_room_is_answered_in_the_log_and_to_who_asks(job_of, capsys):
    job = job_of()
    workspace = job.stages.workspace.uri
    request_rollout_workers(workspace, 4)
    assert [job.actors.requested_workers() for _ in range(3)] == [4, 4, 4]
    remark = "4 rollout workers asked, room for 2: a node holds no more"
    assert capsys.readouterr().out.splitlines() == [f"rollout workers     {remark}"]
    scale_rollouts_command(["--workers", "4", workspace])
    assert capsys.readouterr().out.splitlines()[1:] == [remark]
    scale_rollouts_command(["--workers", "2", workspace])
    assert len(capsys.readouterr().out.splitlines()) == 1


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
    monkeypatch.setattr(jobs.open_job, "open_cluster", cluster_that_comes_up)
    monkeypatch.setattr(jobs.open_job, "node_resources", lambda: [{"CPU": 64.0}])
    monkeypatch.setattr(
        actors.rollout_pool, "RolloutPool", lambda *_, requested_workers, **__: asked(requested_workers)
    )
    options = JobOptions(recipe=load_recipe("tiny"), workspace=place, dry_run=False, take_over=False)

    @contextmanager
    def asked(requested_workers):
        yield requested_workers()

    with jobs.open_job.open_job(options) as job:
        assert job.actors.rollouts(StageResult(name="policy", location=place, fingerprint="0", metrics={})) == 3


@pytest.fixture
def autoscaler_of(job_of, monkeypatch):
    """What the pool is given, by the settings."""
    given = []

    @contextmanager
    def pool(*_, autoscaler, **__):
        given.append(autoscaler)
        yield

    monkeypatch.setattr(actors.rollout_pool, "RolloutPool", pool)

    def autoscaler_of(*settings):
        job_of(*settings).actors.rollouts(StageResult(name="policy", location="", fingerprint="0", metrics={}))
        return given.pop()

    return autoscaler_of


def test_a_recipe_with_autoscaling_gives_the_pool_an_autoscaler_of_its_bounds(autoscaler_of):
    prefetch = ("alignment.prefetch=continue", "alignment.ppo.tis_cap=2")
    waits = RolloutWaits(rollout_s=1.0, learner_wait_s=0.0, queue_wait_s=0.0)
    bounds = "cluster.rollout.autoscale={min_workers: 2, max_workers: 5}"
    assert autoscaler_of(*prefetch, bounds).target_workers(1, waits) == 2
    assert autoscaler_of(*prefetch, bounds).target_workers(9, waits) == 5
    assert autoscaler_of(*prefetch) is None


CANNOT_BE_INTERRUPTED = """
import contextlib, os, signal, sys, time
import jobs.open_job
from cluster.rollout_plan import THROUGH_FILES
from cluster.rollout_room import RolloutRoom
from cluster.autoscaler import RolloutWaits
from jobs.command_line import job_options
from jobs.run_job import job_command

options = job_options(job_command("", None).options(["--workspace", sys.argv[1], "cluster.deadlines.grace_s=1"]))
jobs.open_job.open_cluster = lambda *_: contextlib.nullcontext()
jobs.open_job.node_resources = lambda: [{"CPU": 64.0}]
with jobs.open_job.open_job(options):
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


def test_pairs_of_which_none_fits(job_of, tiny_policy):
    policy = StageResult(name="sft", location=tiny_policy, fingerprint="0", metrics={})
    job = job_of("reward.max_length=2")
    with pytest.raises(DataError, match=r"none of 16 pairs fits in reward\.max_length = 2 tokens"):
        train_reward_model(job.stages, job.recipe, job.read_data, policy)
