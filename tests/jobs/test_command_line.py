import os
import resource
import subprocess
import sys

import pytest

from cluster.submission import JOB_CONFIG
from jobs.command_line import absolute_place, job_options, print_dry_run
from jobs.run_job import job_command
from pipeline.errors import ConfigError, WorkspaceError
from tests.support.paths import ROOT

JOBS = (
    "full_pipeline",
    "sft",
    "train_reward_model",
    "align_policy",
    "generate_benchmark",
    "write_report",
)


def parse(arguments):
    """The options of a job that does nothing."""
    return job_options(job_command("", lambda job: None).options(arguments))


def run(*arguments, **variables):
    command = [sys.executable, "jobs/full_pipeline.py", *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=60, check=False
    )


def test_dry_runs_of_the_pipeline_and_of_every_stage_print_recipe_and_plan_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['job', '--dry-run', 'alignment.num_steps=7']; "
        f"[runpy.run_path(f'jobs/{{job}}.py', run_name='__main__') for job in {JOBS}]; "
        "print(*sorted({'torch', 'ray', 'transformers', 'matplotlib'} & sys.modules.keys()), 'loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("num_steps: 7") == len(JOBS)
    assert done.stdout.count("at most at once") == len(JOBS)
    assert done.stdout.splitlines()[-1].strip() == "loaded"


def processor_seconds_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignment.num_stps=7", "alignment.num_stps: unknown key; did you mean alignment.num_steps?"),
        ("alignment.num_steps=many", "alignment.num_steps = 'many'"),
        ("alignment.ppo.mini_batch_size=100", "is not a multiple of ppo.mini_batch_size = 100"),
        ("num_steps", "is no override; write key.path=value"),
    ],
)
def test_a_bad_override_is_an_error_message_and_costs_nothing(override, message):
    before = processor_seconds_of_children()
    done = run(override)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert processor_seconds_of_children() - before < 1.5  # 0.4 here; importing torch and ray alone takes 2


def test_an_unknown_recipe_names_its_neighbour():
    done = run("--recipe", "tinny")
    assert done.returncode == 2
    assert "Did you mean 'tiny'?" in done.stderr


def test_a_dry_run_takes_less_than_a_second_of_processor_time():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--dry-run", "--recipe", "paper_qwen3_8b").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Two busy threads of one core slow each other: once in three is without company.
    assert any(seconds() < 1.0 for _ in range(3))


def test_a_dry_run_refuses_a_plan_this_machine_cannot_hold():
    done = run("--dry-run", "cluster.rollout.workers=100000")
    assert done.returncode == 2
    assert "stage align_policy needs 40001 CPU" in done.stderr
    assert "would fit; or add a node" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "sentence", "role"),
    [
        (
            ["cluster.rollout.placement=disaggregated", "cluster.alignment.ranks=4", "cluster.rollout.workers=3"],
            "Rollout engines have resources of their own (disaggregated);",
            "rollout worker",
        ),
        (
            [],
            "Rollout engines share the learner's GPUs and sleep while it works (colocated);",
            "rank and engine",
        ),
    ],
)
def test_a_dry_run_says_where_the_rollout_engines_stand(overrides, sentence, role, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    print_dry_run(parse(["--recipe", "paper_qwen2.5_7b", *overrides]))
    printed = capsys.readouterr().out
    assert sentence in printed
    assert f"align_policy        {role}" in printed


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        (["alignment.algorithm=dpo"], ["training rank"]),
        (
            ["alignment.algorithm=dpo", "alignment.pairs=policy", "alignment.samples_per_prompt=4"],
            ["training rank", "rollout worker", "scoring replica"],
        ),
        ([], ["training rank", "rollout worker", "scoring replica"]),
    ],
)
def test_a_dry_run_lists_engines_and_scorers_of_alignments_that_sample(overrides, roles, capsys):
    print_dry_run(parse(["--recipe", "tiny", *overrides]))
    table = capsys.readouterr().out.partition("\nstage ")[2]
    stage = table.partition("align_policy ")[2].partition("together")[0]
    assert [role for role in ("training rank", "rollout worker", "scoring replica") if role in stage] == roles
    assert "rollout worker" in table.partition("generate_benchmark ")[2]


def test_a_dry_run_leaves_the_plan_to_the_cluster_it_is_meant_for():
    done = run("--dry-run", "cluster.rollout.workers=100000", RAY_ADDRESS="10.0.0.1:6379")
    assert done.returncode == 0, done.stderr
    assert "is checked when the job connects" in done.stdout


def test_options_and_overrides_may_be_mixed():
    options = parse(["seed=3", "--recipe", "tiny", "alignment.num_steps=7", "--workspace", "/ws", "--take-over"])
    assert (options.recipe.seed, options.recipe.alignment.num_steps) == (3, 7)
    assert (options.workspace, options.take_over, options.dry_run) == ("/ws", True, False)


def test_the_workspace_comes_from_option_then_variable_then_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("VRM_WORKSPACE", raising=False)
    assert parse([]).workspace == "/home/me/vrm-runs/tiny"
    monkeypatch.setenv("VRM_WORKSPACE", "s3://bucket/ws")
    assert parse([]).workspace == "s3://bucket/ws"
    assert parse(["--workspace", "runs/x"]).workspace == os.path.abspath("runs/x")


def test_a_submitted_job_refuses_a_workspace_that_would_be_thrown_away(monkeypatch):
    monkeypatch.setenv(JOB_CONFIG, "{}")
    assert absolute_place("/data/ws") == "/data/ws"
    with pytest.raises(ConfigError, match=r'Write --workspace "\$PWD/runs/x"'):
        absolute_place("runs/x")
    with pytest.raises(WorkspaceError, match=r"names no path of this machine"):
        absolute_place("file://runs/x")
