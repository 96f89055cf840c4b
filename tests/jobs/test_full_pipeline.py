"""The main job on real Ray, DeepSpeed, Serve and vLLM, reduced; killed, preempted and resumed."""

import gzip
import importlib.util
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from jobs.compare_policies import compare_policies, compare_policies_command
from jobs.exit_codes import PREEMPTED
from jobs.judge_benchmark import judge_benchmark, judge_benchmark_command
from jobs.score_benchmark import score_benchmark, score_benchmark_command
from jobs.show_rollouts import show_rollouts_command
from pipeline.benchmark.alpaca_eval.annotations import read_annotations
from pipeline.benchmark.policy_comparison.contest import build_contest
from pipeline.benchmark.policy_comparison.policy_answers import read_policy_answers, read_questions
from pipeline.benchmark.policy_comparison.verdicts import judged_verdicts, reward_verdicts
from pipeline.benchmark.policy_comparison.win_matrix import win_matrix
from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.data.planted import GoldAnnotator
from pipeline.objectives.reward_comparison import compare_rewards
from pipeline.rollouts.kept_samples import read_samples
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from tests.support.paths import ROOT

REDUCED = (
    "data.planted.num_train_pairs=640",
    "data.planted.num_sft_texts=1600",
    "data.planted.num_heldout_prompts=32",
    "sft.num_steps=20",
    "reward.num_steps=30",
    "reward.checkpoint_every=10",
    "reward.eval_every=10",
    "alignment.num_steps=5",
    "alignment.prompts_per_step=32",
    "alignment.ppo.mini_batch_size=16",
    "alignment.checkpoint_every=1",
    "alignment.eval_every=2",
    "alignment.eval_prompts=16",
    "benchmark.num_prompts=32",
)

LOGGERS_HERE = ["tensorboard", *(["trackio"] if importlib.util.find_spec("trackio") else [])]
"""With the extra where it is installed; `tests/tracking` says where it is not."""

PROFILED_STEP = 2

GRACE_S = 120
"""Of a machine with two cores for everything; a step of the reduced run takes seconds where it is alone."""

FEWER_PROCESSES = (
    "cluster.alignment.ranks=1",
    "cluster.rollout.workers=1",
    f"cluster.deadlines.grace_s={GRACE_S}",
)
"""Where things run is no part of what is computed: half the processes start in half the time."""

MORE_PROCESSES = ("cluster.alignment.ranks=2", "cluster.rollout.workers=2")

pytestmark = pytest.mark.e2e


def stage_directory(workspace, name):
    return next(iter(sorted((workspace / "stages").glob(f"{name}-*"))), None)


def manifest(workspace, name):
    return json.loads((stage_directory(workspace, name) / "manifest.json").read_text())


def commits(workspace, name):
    """In order."""
    directory = stage_directory(workspace, name)
    return [] if directory is None else sorted((directory / "checkpoints").glob("step-*.json"))


def start(workspace, *processes):
    """A stage's own job without a submission, on a local cluster of its own; its Ray processes die with it."""
    with open(workspace.parent / f"{workspace.name}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "jobs/align_policy.py", "--workspace", str(workspace), *REDUCED, *processes],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )


def end_by(signal_number, workspace, stage, *, grace_s, timeout_s=300):
    """Sends the driver a signal as soon as it has made a commit of the stage; how it ended, within the grace time."""
    before = commits(workspace, stage)
    driver = start(workspace, *FEWER_PROCESSES)
    deadline = time.monotonic() + timeout_s
    while set(commits(workspace, stage)) <= set(before):
        assert driver.poll() is None, (workspace.parent / f"{workspace.name}.log").read_text()[-4000:]
        assert time.monotonic() < deadline, f"no commit of {stage} in {timeout_s} s"
        time.sleep(0.2)
    driver.send_signal(signal_number)
    code = driver.wait(timeout=grace_s)
    assert not (stage_directory(workspace, stage) / "manifest.json").exists()
    return code


def last_commit(workspace, stage):
    """The step behind which the stage is committed, counted from 0."""
    return json.loads(commits(workspace, stage)[-1].read_text())["step"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run through `ray job submit`."""
    workspace = tmp_path_factory.mktemp("pipeline") / "whole"
    done = subprocess.run(
        [
            *("bash", "install/submit.sh", "--recipe", "tiny", "--workspace", str(workspace)),
            *(*REDUCED, f"logging=[{','.join(LOGGERS_HERE)}]", f"profile.steps=[{PROFILED_STEP}]"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "TRACKIO_DIR": str(workspace.parent / "trackio")},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return workspace, done.stdout


def test_the_submitted_job_shows_progress_and_ends_with_its_results(finished):
    workspace, output = finished
    for stage in ("sft", "train_reward_model", "align_policy", "generate_benchmark"):
        assert manifest(workspace, stage)["seconds"] > 0
        assert f"{stage:<19} finished" in output
    for stage in ("sft", "train_reward_model", "align_policy"):
        assert manifest(workspace, stage)["metrics"]["memory/rank_peak_gib"] > 0
    assert manifest(workspace, "align_policy")["metrics"]["memory/rollout_worker_peak_gib"] > 0
    assert "5/5  reward" in output
    assert "win rate over base, by the gold annotator" in output
    assert "gold-proxy gap in sd, first to last step" in output
    assert "(raylet)" not in output  # Ray tells of processes that ended unbidden
    assert not re.search(r"\b(INFO|WARNING|DEBUG)\b", output), output
    assert "Connected to Ray cluster" in (workspace / "libraries.log").read_text()
    assert f"report: {workspace}/report.html" in output


def test_each_stage_is_a_run_of_one_group_on_its_own_steps(finished):
    workspace, output = finished
    assert "logging:" not in output  # nothing failed
    for stage in ("sft", "train_reward_model", "align_policy"):
        assert list((stage_directory(workspace, stage) / "tensorboard").iterdir())
    if "trackio" in LOGGERS_HERE:
        with sqlite3.connect(workspace.parent / "trackio" / "tiny.db") as database:
            rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
            groups = {json.loads(config)["_Group"] for (config,) in database.execute("select config from configs")}
        [group] = groups
        assert group.startswith("whole-")
        steps = {name.split("/")[1].rpartition("-")[0]: [] for name, _, _ in rows}
        for name, step, _ in rows:
            steps[name.split("/")[1].rpartition("-")[0]].append(step)
        # The last step has the evaluation of what is finished too.
        assert steps == {
            "sft": [*range(20), 19],
            "train_reward_model": [*range(30), 29],
            "align_policy": [*range(5), 4],
        }


def test_a_profiled_step_leaves_what_each_process_did_under_the_names_of_the_phases(finished):
    workspace, output = finished
    profile = stage_directory(workspace, "align_policy") / "profile"
    place = profile / f"step-{PROFILED_STEP:06}"
    assert f"profile of step {PROFILED_STEP}: {place}\n" in output
    assert sorted(p.name for p in profile.iterdir()) == ["ray_timeline.json", place.name]

    def names(file):
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return [event.get("name") for event in json.loads(text)["traceEvents"]]

    # A step that validates its policy samples, scores and evaluates twice.
    assert [*dict.fromkeys(names(place / "driver.json"))] == ["rollout", "score", "evaluate", "update", "weights"]
    rank, engine = {*names(place / "rank-0.json.gz")}, {*names(place / "engine-0.json.gz")}
    assert {"evaluate", "update", "weights", "aten::mm"} <= rank
    assert {"rollout", "weights"} <= engine
    assert any(name.startswith("aten::") for name in engine)
    timeline = {event["name"] for event in json.loads((profile / "ray_timeline.json").read_text())}
    assert {"sample", "evaluate_rollouts", "update", "load_weights"} <= timeline


def test_a_healthy_run_raises_no_alarm_of_the_policy(finished):
    workspace, output = finished
    rows = read_metrics(stage_directory(workspace, "align_policy") / METRICS_FILE)
    checked = [row for row in rows if {"alarm/far_from_start", "alarm/engine_gap"} <= row.keys()]
    assert {row["step"] for row in checked} == {0, 1, 2, 3, 4}
    assert {row["train/alarms"] for row in checked} == {0.0}
    assert "align_policy        alarm " not in output


def test_the_report_needs_nothing_from_outside(finished):
    page = (finished[0] / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page.split("<details>")[0].replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page.split("<details>")[0]


def test_every_engine_held_the_learners_weights(finished):
    rows = read_metrics(stage_directory(finished[0], "align_policy") / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]  # the last row is of the finished policy's validation
    assert max(row["gate/max"] for row in rows) < 1e-4
    assert max(row["engine_gap/max"] for row in rows) < 1e-3


def run_whole_job(workspace, *settings):
    """Without a submission. Returns what it printed."""
    done = subprocess.run(
        [
            *(sys.executable, "jobs/full_pipeline.py", "--workspace", str(workspace)),
            *(*REDUCED, *FEWER_PROCESSES, *settings),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def with_stages_of(finished, workspace):
    """A workspace that holds the finished policy and reward model of another one."""
    for name in ("sft", "train_reward_model"):
        stage = stage_directory(finished, name)
        shutil.copytree(stage, workspace / "stages" / stage.name)
    return workspace


def test_a_direct_method_goes_from_the_finished_reward_model_to_its_report(finished, tmp_path):
    """The alignment starts no engine and no scoring service: its ranks alone hold the policy."""
    workspace = with_stages_of(finished[0], tmp_path / "direct")
    direct = ("algorithm=dpo", "direct.num_steps=6", "direct.batch_pairs=16", "direct.eval_every=3")
    output = run_whole_job(workspace, *(f"alignment.{setting}" for setting in direct))
    for name in ("sft", "train_reward_model"):
        assert f"{name:<19} finished before, skipped" in output
    rows = read_metrics(stage_directory(workspace, "align_policy") / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 5]
    assert 0.0 < rows[-1]["eval/change_rms"] < 100.0
    assert not any(metric.startswith(("rollout/", "gate/")) for row in rows for metric in row)
    assert "win rate over base, by the gold annotator" in output
    assert "implicit reward: held-out accuracy" in output
    assert "implicit reward: held-out accuracy" in (workspace / "report.html").read_text()


def test_a_function_of_the_users_and_reweighted_objectives_train_the_policy_together(finished, tmp_path):
    """The function fails for responses of even length; they are left out of the step, counted and shown."""
    workspace = with_stages_of(finished[0], tmp_path / "rewards")
    (tmp_path / "mine.py").write_text(
        "def brief(prompt, response, columns):\n"
        "    words = len(response.split())\n"
        "    if words % 2 == 0:\n"
        "        raise ValueError(f'{words} words are even')\n"
        "    return -float(words)\n"
    )
    model, function = "{place: this_run, weights: {brevity: 2}}", f"'{tmp_path}/mine.py:brief'"
    rewards = f"[{{model: {model}}}, {{name: brief, python: {function}}}]"
    output = run_whole_job(workspace, "alignment.num_steps=2", "alignment.eval_every=0", f"alignment.rewards={rewards}")
    rows = read_metrics(stage_directory(workspace, "align_policy") / METRICS_FILE)
    for row in rows[:2]:
        assert row["reward/brief"] < 0.0
        assert 0 < row["reward/brief/failed"] == row["reward/dropped"] < 32
        assert row["reward/model/failed"] == 0
    assert re.search(r"reward brief: \d+ of 32 responses without a score, left out of the step", output)
    assert "words are even" in output


def test_held_out_prompts_were_answered_while_the_policy_was_trained(finished):
    stage = stage_directory(finished[0], "align_policy")
    validated = [row for row in read_metrics(stage / METRICS_FILE) if "eval/updates" in row]
    assert [row["eval/updates"] for row in validated] == [0, 2, 5]
    assert validated[0]["eval/kl"] == pytest.approx(0.0, abs=1e-3)
    for row in validated:
        assert row["eval/reward_low"] < row["eval/reward"] < row["eval/reward_high"]
        objectives = ("helpfulness", "honesty", "safety", "brevity")
        assert {"eval/gold", *(f"eval/objective/{name}" for name in objectives)} <= row.keys()
    assert [kept.updates for kept in read_samples(str(stage))] == [0, 2, 5]


def test_every_rollout_was_kept_and_the_report_says_so_and_shows_samples_over_time(finished, tmp_path):
    workspace, output = finished
    show_rollouts_command([str(workspace), "--jsonl", str(tmp_path / "rollouts.jsonl")])
    kept = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(row["step"], row["position"]) for row in kept] == [(step, i) for step in range(5) for i in range(32)]
    assert all(sum(row["contributions"].values()) == pytest.approx(row["reward"], abs=1e-4) for row in kept)
    assert "align_policy  rollouts kept for `vrm rollouts`: 160 of 160 in 0." in output
    assert "160 of 160 in 0." in (workspace / "report.html").read_text()
    rows = read_metrics(stage_directory(workspace, "align_policy") / METRICS_FILE)
    assert max(row["logprob_gap"] for row in kept) == pytest.approx(
        max(row["engine_gap/max"] for row in rows), rel=1e-3
    )
    over_time = (workspace / "report.html").read_text().split("<h2>Samples over time</h2>")[1].split("<h2>")[0]
    assert over_time.count("before the first update") == over_time.count("after 5 updates") == 8


def test_answers_have_the_form_alpaca_eval_reads(finished):
    for generator in ("base", "aligned"):
        path = stage_directory(finished[0], "generate_benchmark") / "result" / generator / "model_outputs.json"
        rows = json.loads(path.read_text())
        assert len(rows) == 32
        assert all({"instruction", "output", "generator"} <= row.keys() for row in rows)


def test_base_and_aligned_are_judged_scored_and_compared_and_every_number_agrees(finished, tmp_path):
    """By the reward model and by the truth, through the same jobs that another judge would be asked by."""
    result = stage_directory(finished[0], "generate_benchmark") / "result"
    reward_model = stage_directory(finished[0], "train_reward_model") / "result"
    base, aligned = files = [result / generator / "model_outputs.json" for generator in ("base", "aligned")]
    pairs = list(zip(read_scored_answers(aligned), read_scored_answers(base), strict=True))
    assert [a.instruction for a, _ in pairs] == [b.instruction for _, b in pairs]

    annotations, scores = {}, {}
    for name, judge in (("vrm", f"vrm:{reward_model}"), ("gold", "gold:planted")):
        out = tmp_path / name / "annotations.json"
        judging = ["--answers", str(aligned), "--baseline", str(base), "--judge", judge, "--out", str(out)]
        costs = judge_benchmark(judge_benchmark_command.options(["--benchmark", "alpaca_eval", *judging]))
        assert (costs.unanswered, costs.unparsed) == ({}, 0)
        annotations[name] = read_annotations(out)
        scoring = ["--benchmark", "alpaca_eval", "--judgments", str(out), "--out", str(tmp_path / name)]
        score_benchmark(score_benchmark_command.options(scoring))
        [scores[name]] = json.loads((tmp_path / name / "alpaca_eval.json").read_text())["models"].values()
        preferences = annotations[name].preferences
        assert scores[name]["win_rate"] == pytest.approx(100 * (sum(preferences) / len(pairs) - 1))

    # The judge scores one pair at a time where the benchmark scored batches: equal to rounding.
    from_rewards = [1.0 + compare_rewards(a.score, b.score).probability for a, b in pairs]
    assert annotations["vrm"].preferences == pytest.approx(from_rewards, abs=1e-3)
    gold = GoldAnnotator()
    gaps = [
        gold.reward(prompt, a.output) - gold.reward(prompt, b.output)
        for a, b in pairs
        for prompt in [[{"role": "user", "content": a.instruction}]]
    ]
    wins = sum(gap > 1e-9 for gap in gaps) + 0.5 * sum(abs(gap) <= 1e-9 for gap in gaps)
    assert scores["gold"]["discrete_win_rate"] == pytest.approx(100 * wins / len(pairs))

    page = tmp_path / "comparison.html"
    options = ["--judgments", *(str(tmp_path / name / "annotations.json") for name in scores)]
    options += ["--scores", str(tmp_path / "gold" / "alpaca_eval.json"), "--questions", str(result / "planted.json")]
    compare_policies(
        compare_policies_command.options(
            [*map(str, files), *options, "--reward-model", str(reward_model), "--out", str(page)]
        )
    )
    assert f"{scores['gold']['win_rate']:.2f} ± {scores['gold']['standard_error']:.2f}" in page.read_text()
    contest = build_contest([read_policy_answers(file, read_questions([])) for file in files])
    [rewards] = reward_verdicts(contest)
    first, second = contest.policies
    reported = manifest(finished[0], "generate_benchmark")["metrics"]["reward/win_rate"]
    assert win_matrix(contest, rewards)[second][first]["win_rate"] == pytest.approx(reported)
    for (name, judged), verdicts in zip(
        annotations.items(), judged_verdicts(contest, list(annotations.values())), strict=True
    ):
        cell = win_matrix(contest, verdicts)[judged.model][judged.baseline]
        assert 100 * cell["win_rate"] == pytest.approx(scores[name]["win_rate"])
        assert f"{100 * cell['win_rate']:.1f} [" in page.read_text()


def test_a_driver_killed_in_two_stages_and_preempted_once_resumes_to_the_same_result_on_other_numbers_of_processes(
    finished, tmp_path
):
    whole, _ = finished
    workspace = tmp_path / "killed"
    policy = stage_directory(whole, "sft")
    shutil.copytree(policy, workspace / "stages" / policy.name)
    assert end_by(signal.SIGKILL, workspace, "train_reward_model", grace_s=10) == -signal.SIGKILL
    assert end_by(signal.SIGKILL, workspace, "align_policy", grace_s=10) == -signal.SIGKILL
    killed_behind = last_commit(workspace, "align_policy")
    assert end_by(signal.SIGTERM, workspace, "align_policy", grace_s=GRACE_S) == PREEMPTED
    preempted_behind = last_commit(workspace, "align_policy")
    assert f"align_policy is committed after step {preempted_behind + 1}" in (tmp_path / "killed.log").read_text()
    # A checkpoint of one rank, sampled for by one worker, goes on in two of each.
    driver = start(workspace, *MORE_PROCESSES)
    assert driver.wait(timeout=600) == 0, (tmp_path / "killed.log").read_text()[-4000:]
    log = (tmp_path / "killed.log").read_text()
    assert f"{'sft':<19} finished before, skipped" in log
    assert "train_reward_model  resumes after step" in log
    assert 0 <= killed_behind < preempted_behind
    for behind in (killed_behind, preempted_behind):
        assert log.count(f"align_policy        resumes after step {behind + 1}\n") == 1
    # Two DeepSpeed ranks on the same data: equal to rounding.
    one, other = (manifest(w, "train_reward_model")["metrics"] for w in (whole, workspace))
    assert one.keys() == other.keys()
    learned = {name: value for name, value in one.items() if not name.startswith("memory/")}
    moved = {
        name: (value, other[name])
        for name, value in learned.items()
        if other[name] != pytest.approx(value, rel=1e-4, abs=1e-5)
    }
    assert moved == {}
    # vLLM samples by seed; a token that flips on a rounding difference moves a mean over 32 responses a little.
    one, other = (manifest(w, "align_policy")["metrics"] for w in (whole, workspace))
    assert other["reward/mean"] == pytest.approx(one["reward/mean"], abs=0.3)
    assert other["kl/per_response"] == pytest.approx(one["kl/per_response"], abs=0.3)
    rows = read_metrics(stage_directory(workspace, "align_policy") / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    assert [row["eval/updates"] for row in rows if "eval/updates" in row] == [0, 2, 5]
