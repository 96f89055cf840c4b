"""What clusters do to a run, really done to it: it recovers by itself, or stops where the same command resumes.

Every run here ends with the weights of a run that nothing happened to, bit for bit: no committed step was lost, and no
sample trained on twice. Also killed for real: the job's driver in tests/jobs/test_full_pipeline.py, vLLM engines in
tests/actors/test_vllm_engine.py, a replica under load of users in tests/actors/test_reward_service.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file

from actors.rank_group import RankGroup, gather
from actors.ranked_learner import RankedPolicyLearner
from actors.reward_service import start_service, stop_service
from actors.rollout_pool import RolloutPool
from actors.worker_handle import EngineSettings, WorkerActors
from pipeline.config.cluster import DeadlinesConfig, RanksConfig, RolloutConfig, ScoringConfig
from pipeline.data.prompts import PromptStream
from pipeline.errors import DeadlineExceeded, WorkerDied
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.builders import PPOLearnerSpec
from pipeline.loops.alignment import align
from pipeline.models.backbone import load_backbone
from pipeline.models.reward_model import RewardModel, make_head, save_reward_model
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.runner import StageRunner
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory, Workspace
from tests.faults.driver import MISFORTUNES, SECOND_SAVE, run
from tests.faults.mortal_rank import CONFIG, build_learner, build_ranks
from tests.faults.mortal_worker import MortalWorker
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.learners import HEAD, prompts_of, reward_card, statistics_of
from tests.support.nodes import Node, ray_processes
from tests.support.paths import ROOT
from tests.support.rewards import rewards_of

pytestmark = pytest.mark.components

DEADLINES = DeadlinesConfig(start_s=240, update_s=120, generate_s=120, score_s=120, weights_s=120)
SCALE = RewardScale(mean=0.0, std=1.0)
ALIGN_POLICY = StageSpec(name="align_policy", version=1, config={})


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# ------------------------------------------------------------------ the driver


def test_a_driver_that_dies_in_a_save_or_finds_the_disk_full_resumes_behind_the_commit_before(tiny_policy, tmp_path):
    run(tmp_path / "whole", tiny_policy)
    driver = subprocess.run(
        [sys.executable, "-m", "tests.faults.driver", str(tmp_path), tiny_policy],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert driver.returncode == 0, driver.stderr
    endings = json.loads(driver.stdout.splitlines()[-1])
    for misfortune in MISFORTUNES:
        code, letter = endings[misfortune]
        place = tmp_path / misfortune
        if misfortune == "finds the disk full":
            assert code == 2
            assert letter.startswith(f"WorkspaceError: no space is left while writing {place}/checkpoints/step-000003")
            assert "the same command then resumes" in letter
        else:
            assert code == -signal.SIGKILL
        stage = StageDirectory(str(place), "align_policy", "0" * 64)
        assert stage.checkpoints.latest().step == SECOND_SAVE - 2
        again = run(place, tiny_policy)
        assert again.loaded == [SECOND_SAVE - 1, SECOND_SAVE, SECOND_SAVE + 1, SECOND_SAVE + 2, SECOND_SAVE + 3]
        assert_bit_equal(weights(place / "result"), weights(tmp_path / "whole" / "result"))
        assert [row["step"] for row in read_metrics(place / METRICS_FILE)] == list(range(6))


# ------------------------------------------------------------------ a hang


class Sleepwalker:
    def pid(self):
        return os.getpid()


def test_a_rank_that_hangs_is_named_with_what_it_was_doing_and_for_how_long(local_ray):
    ranks = [ray.remote(Sleepwalker).options(num_cpus=0.1).remote() for _ in range(2)]
    _, hanging = ray.get([rank.pid.remote() for rank in ranks], timeout=120)
    os.kill(hanging, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match=r"PPO learner: updating at step 3 did not end within 3 s on rank 1 of 2"
    ):
        gather([rank.pid.remote() for rank in ranks], who="PPO learner", doing="updating at step 3", deadline_s=3)
    assert time.monotonic() - started < 30
    for rank in ranks:
        ray.kill(rank)


# ------------------------------------------------------------------ everybody else


class Eventful:
    """The pool and the scorer, and what happens to them as a phase of a step begins; each event once."""

    def __init__(self, pool, scorer, events):
        self._pool, self._scorer, self._events = pool, scorer, events

    def load_weights(self, weights):
        self.step = weights.version
        self._happens("weights")
        return self._pool.load_weights(weights)

    def sleep(self):
        self._pool.sleep()

    def generate(self, prompts, sampling):
        self._happens("generation")
        return self._pool.generate(prompts, sampling)

    def score(self, prompts, responses):
        self._happens("scoring")
        return self._scorer.score(prompts, responses)

    def _happens(self, phase):
        self._events.pop((phase, self.step), lambda: None)()


def test_a_rank_killed_in_its_backward_pass_is_named_in_seconds_and_its_run_ends_as_if_nothing_had_happened(
    local_ray, tiny_policy, world, tokenizer, tmp_path, capsys
):
    config = CONFIG.model_copy(update={"num_steps": 4})
    spec = PPOLearnerSpec(
        config=config,
        policy_uri=tiny_policy,
        reward_model_uri="no critic of its own",
        dtype="float32",
        probes=tuple(choose_probes(prompts_of(world, tokenizer), vocabulary_size=len(tokenizer), seed=0, count=1)),
        publish_directory=str(tmp_path / "published"),
        seed=0,
    )
    prompts = PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0)
    fate = tmp_path / "fate"
    fate.mkdir()
    rollouts = Eventful(FakeRollouts(tokenizer), FakeScorer(), {("generation", 2): (fate / "death in backward").touch})
    learners, notices = [], []

    def run_ranks(stage):
        groups.close()  # of the attempt before
        ranks = RanksConfig(ranks=2, cpus_per_rank=1, zero_stage=3)
        group = groups.enter_context(RankGroup("PPO learner", ranks, start_s=240))
        group.build(build_ranks, spec, ranks, str(fate))
        learners.append(RankedPolicyLearner(group, DEADLINES))
        if len(learners) == 1:
            learners[0].snapshot().write(str(tmp_path / "start"))
        try:
            return align(rollouts, rewards_of(rollouts), learners[-1], prompts, stage, config, reward_scale=SCALE)
        except WorkerDied as error:
            notices.append((str(error), time.time() - (fate / "time of death").stat().st_mtime))
            raise

    with ExitStack() as groups, Workspace.open(str(tmp_path / "ws"), job="disturbed", needs_bytes=0) as workspace:
        result = StageRunner(workspace).run(ALIGN_POLICY, run_ranks, max_restarts=1)
        rows = workspace.stage("align_policy", result.fingerprint).metrics_rows()
        learners[-1].restore(str(tmp_path / "start"))
        quiet = StageDirectory(str(tmp_path / "quiet"), "align_policy", "0" * 64)
        align(rollouts, rewards_of(rollouts), learners[-1], prompts, quiet, config, reward_scale=SCALE)
    [(letter, seconds)] = notices
    assert "PPO learner: rank 1 of 2 died while updating at step 2, after" in letter
    assert seconds < 30
    assert "starts again from its last commit" in capsys.readouterr().out
    assert [row["step"] for row in rows] == list(range(4))
    assert_bit_equal(weights(result.location), weights(tmp_path / "quiet" / "result"))


class Wire(httpx.BaseTransport):
    """The scorer's way to the service; notes the steps in which a replica died with a request in its hands."""

    def __init__(self, transport):
        self._transport = transport
        self.died_in = set()

    def handle_request(self, request):
        try:
            return self._transport.handle_request(request)
        except httpx.RemoteProtocolError:
            self.died_in.add(self.step())
            raise


def kill_the_replica():
    [replica] = ray_processes("ServeRepli")
    replica.kill()


@pytest.fixture
def reward_model(tiny_policy, tokenizer, world, tmp_path):
    backbone = load_backbone(tiny_policy, dtype="float32")
    torch.manual_seed(0)
    model = RewardModel(backbone, make_head("vrm", 64, 4, HEAD))
    torch.nn.init.normal_(model.head.weight_head.output.weight, std=0.1)
    save_reward_model(
        str(tmp_path / "reward model"),
        state_dict=model.state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=reward_card("vrm", statistics_of(world)),
    )
    return str(tmp_path / "reward model")


def test_a_run_that_loses_a_node_two_workers_a_rank_and_a_replica_ends_as_if_nothing_had_happened(
    local_ray, reward_model, tiny_policy, world, tokenizer, tmp_path, capsys, caplog
):
    fate = shutil.copytree(tiny_policy, tmp_path / "fate")
    prompts = PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0)
    # Calls wait 0.4 s for company in the replica: long enough to kill it with some in its hands.
    scorer = start_service(
        reward_model,
        ScoringConfig(cpus_per_replica=0.5, batch_wait_s=0.4),
        start_s=240,
        deadline_s=120,
        name="chaos",
    )
    wire = scorer._transport = Wire(scorer._transport)
    # While it stands, nothing but the service fits the first node.
    filler = placement_group([{"CPU": 3.4}])
    ray.get(filler.ready(), timeout=60)
    node = Node(num_cpus=4)
    pool = RolloutPool(
        EngineSettings(model_uri=str(fate), dtype="float32", max_model_len=64, gate_tolerance=1e-4, seed=0),
        RolloutConfig(workers=2, cpus_per_worker=1, chunk_size=3, max_restarts=4),
        DEADLINES,
        actors=WorkerActors(worker=MortalWorker),
    )

    def the_node_loses_power():
        remove_placement_group(filler)
        node.lose_power()

    events = {
        ("generation", 1): the_node_loses_power,
        ("generation", 2): (fate / "death in generation").touch,
        ("weights", 3): (fate / "death in a weight update").touch,
        ("scoring", 4): threading.Timer(0.2, kill_the_replica).start,
        ("generation", 5): (fate / "death in backward").touch,
    }

    def disturbed(stage):
        ranks = RanksConfig(ranks=1, cpus_per_rank=1)
        with RankGroup("PPO learner", ranks, start_s=240) as group:
            group.build(build_learner, tiny_policy, str(tmp_path / "published"), str(fate))
            learner = RankedPolicyLearner(group, DEADLINES)
            eventful = Eventful(pool, scorer, events)
            wire.step = lambda: eventful.step
            return align(eventful, rewards_of(eventful), learner, prompts, stage, CONFIG, reward_scale=SCALE)

    try:
        with Workspace.open(str(tmp_path / "ws"), job="disturbed", needs_bytes=0) as workspace:
            result = StageRunner(workspace).run(ALIGN_POLICY, disturbed, max_restarts=2)
            rows = workspace.stage("align_policy", result.fingerprint).metrics_rows()
        alone = build_learner(tiny_policy, tmp_path / "published alone", str(tmp_path / "no fate"))
        quiet = StageDirectory(str(tmp_path / "quiet"), "align_policy", "0" * 64)
        align(pool, rewards_of(scorer), alone, prompts, quiet, CONFIG, reward_scale=SCALE)
    finally:
        pool.close()
        stop_service("chaos")
    assert events == {}
    assert wire.died_in == {4}
    assert [path.name for path in fate.glob("death*")] == []
    assert [row["step"] for row in rows] == list(range(6))
    assert_bit_equal(weights(result.location), weights(tmp_path / "quiet" / "result"))
    assert capsys.readouterr().out.count("starts again from its last commit") == 2
    messages = [record.getMessage() for record in caplog.records if "Replacing it" in record.getMessage()]
    assert len(messages) == 4
    assert sum("died during sample()" in letter for letter in messages) >= 1
    # A worker that dies in generation may be missed only then: another has sampled its late chunk meanwhile.
    assert sum("died during load_weights() of policy version 3" in letter for letter in messages) >= 1
