"""Launch files say what the dry run says, and those who read them accept them."""

import gzip
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.launch.launch_plan import launch_name
from jobs.command_line import job_options, print_dry_run
from jobs.launch import kubernetes_command, slurm_command, ssh_command
from jobs.run_job import job_command
from pipeline.errors import ConfigError, PipelineError, ResourceError, WorkspaceError
from tests.support.paths import ROOT, SHARED_DATA

CRDS = SHARED_DATA / "kuberay_crds"
BIN = Path(sys.executable).parent
IMAGE = ["--image", "registry.example/vrm:1"]
ON_S3 = ["--workspace", "s3://bucket/runs/qwen3?region=eu-west-1"]
SHARED = ["--workspace", "/shared/runs/qwen3"]
ELEVEN = ["cluster.alignment.ranks=11", "cluster.rollout.workers=11"]
"""Ranks and engines on eleven GPUs, and one for the scoring replica: two nodes."""


def written(command, *words):
    """What the command prints, through its own parser."""
    options = command.options(list(words))
    options.out = Path(os.environ["LAUNCH_OUT"])
    command.run(options)
    return options.out.read_text()


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_OUT", str(tmp_path / "launch"))
    monkeypatch.delenv("VRM_WORKSPACE", raising=False)


def manifest(*words):
    return yaml.safe_load(written(kubernetes_command, *IMAGE, *words))


def strict(schema):
    """The schema with keys that it does not list refused, as the API server's strict validation refuses them."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def problems(manifest, kind):
    path = CRDS / f"{kind}.v1.schema.json.gz"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not at {CRDS}")
    schema = strict(json.loads(gzip.decompress(path.read_bytes())))
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(manifest)]


# ----------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "write",
    [
        lambda: written(kubernetes_command, "paper_qwen3_8b", *IMAGE, *ON_S3),
        lambda: written(slurm_command, "paper_qwen3_8b", *SHARED),
        lambda: written(ssh_command, "paper_qwen3_8b", *SHARED, "--hosts", "192.0.2.10"),
    ],
    ids=["kubernetes", "slurm", "ssh"],
)
def test_every_file_repeats_the_table_of_the_dry_run(write, capsys, monkeypatch):
    text = write()
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    command = job_command("doc", lambda job: None, recipe_flag="recipe")
    print_dry_run(job_options(command.options(["paper_qwen3_8b", *SHARED, "--dry-run"])))
    table = capsys.readouterr().out.partition("stage  ")[2].partition("Rollout engines")[0]
    lines = [f"# stage  {table.splitlines()[0]}", *(f"# {line}".rstrip() for line in table.splitlines()[1:] if line)]
    assert len(lines) > 10
    assert [line for line in lines if line not in text.splitlines()] == []
    assert "# 1 node of 8 H100, 88 CPU, 900 GiB." in text.splitlines()


def test_the_number_of_nodes_is_the_smallest_that_holds_every_stage():
    apart = ["cluster.rollout.placement=disaggregated"]
    more = ["cluster.rollout.workers=27", "cluster.alignment.ranks=8", *apart]  # with the scoring replica: 36 GPUs
    [group] = manifest("paper_qwen3_8b", *ON_S3, *more)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (5, 5, 5)
    grows = ["cluster.rollout.autoscale={max_workers: 50}", "alignment.prefetch=continue", "alignment.ppo.tis_cap=2"]
    sizes = ["cluster.rollout.workers=3", "cluster.alignment.ranks=4"]
    cluster = manifest("paper_qwen3_8b", *ON_S3, *grows, *sizes, *apart)["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"], cluster["enableInTreeAutoscaling"]) == (1, 7, True)


@pytest.mark.parametrize(
    ("words", "error", "letter"),
    [
        (
            ["--accelerator", "h1000"],
            ConfigError,
            r"--accelerator h1000 is unknown\. Did you mean h100\? Known",
        ),
        (["--accelerator", "abacus"], ConfigError, r"--accelerator abacus is unknown\. Known are h200, h100"),
        (["--accelerator", "cpu"], ResourceError, r"takes 4 CPU and 1 GPU and never spans nodes; .* 16 CPU and 0 GPU"),
        (["--accelerator", "cpu", "--gpus-per-node", "2"], ConfigError, "name the GPU instead"),
        (["--gpus-per-node", "0"], ConfigError, "write --accelerator cpu"),
        (
            ["cluster.reward.cpus_per_rank=100"],
            ResourceError,
            r"rank of stage train_reward_model takes 100 CPU and 1 GPU",
        ),
        (
            ["cluster.reward.gpus_per_rank=9"],
            ResourceError,
            r"4 CPU and 9 GPU.*8 GPU.*\(cluster\.reward\)",
        ),
        (["--env", "NAME"], ConfigError, "--env NAME is not of the form NAME=VALUE"),
        (
            ["--accelerator", "l40s", "alignment.max_tokens_per_micro_batch=131072"],
            ResourceError,
            r"needs 93 GB of a l40s with 48 GB: .*alignment\.max_tokens_per_micro_batch=16384 would fit",
        ),
        (["--env", "AWS_SECRET_ACCESS_KEY=hidden"], ConfigError, r"--env AWS_SECRET_ACCESS_KEY: .*with --secret\."),
        (["--env", "HF_TOKEN=hidden"], ConfigError, r"--env HF_TOKEN: its value would stand in the file"),
        (["--partition", "a b"], ConfigError, "--partition 'a b' is no name for sbatch"),
        (["--account", "a\n#SBATCH --wrap=x"], ConfigError, "is no name for sbatch"),
        (["--memory-gib-per-node", "100"], ResourceError, r"host memory on each of 1 node\(s\) with 107\.4 GB"),
        (
            ["--accelerator", "a100", "cluster.accelerator=h200"],
            ConfigError,
            r"--accelerator a100, but the recipe is planned for cluster\.accelerator = h200\. Leave the option out",
        ),
        (["--workspace", "s3://key:secret@bucket/run"], WorkspaceError, "carries credentials"),
        (["sft.num_stps=1"], ConfigError, "unknown key"),
    ],
)
def test_what_no_machine_can_run_is_refused_by_name(words, error, letter):
    with pytest.raises(error, match=letter) as refusal:
        written(slurm_command, "paper_qwen3_8b", *SHARED, *words)
    assert "hidden" not in str(refusal.value)


def test_a_recipe_is_launched_on_the_accelerator_that_it_is_planned_for():
    text = written(slurm_command, "paper_qwen3_32b", *SHARED)
    assert "#SBATCH --gpus-per-node=h200:8" in text.splitlines()


def test_names_are_taken_by_every_scheduler():
    assert launch_name("paper_qwen2.5_7b") == "vrm-paper-qwen2-5-7b"
    assert launch_name("X" * 200) == f"vrm-{'x' * 43}"  # KubeRay takes 47 letters
    assert launch_name("a_" * 100, suffix="-reward") == f"vrm-{'a-' * 17}a-reward"
    with pytest.raises(ConfigError, match="has no letter"):
        launch_name("___")


# ----------------------------------------------------------------------------- Kubernetes


def test_the_ray_job_is_one_that_kuberay_accepts():
    job = manifest("paper_qwen3_8b", *ON_S3, "--secret", "vrm", "--env", "VRM_DATA_ROOT=/data", "seed=5")
    assert problems(job, "rayjobs") == []
    assert problems(job | {"spec": job["spec"] | {"entrypiont": "x"}}, "rayjobs") != []
    assert shlex.split(job["spec"]["entrypoint"]) == ["vrm", "run", "paper_qwen3_8b", *ON_S3, "seed=5"]
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert container["env"] == [{"name": "VRM_DATA_ROOT", "value": "/data"}]
        assert container["envFrom"] == [{"secretRef": {"name": "vrm"}}]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    [container] = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"


def test_a_ray_job_of_a_recipe_without_gpus_asks_for_none_and_mounts_the_claim():
    job = manifest("tiny", "--workspace", "/shared/runs/tiny", "--volume-claim", "vrm-files")
    assert problems(job, "rayjobs") == []
    assert "nvidia" not in json.dumps(job)
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spec = group["template"]["spec"]
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "vrm-files"}} in spec["volumes"]


def test_the_ray_service_is_one_that_kuberay_and_serve_accept():
    from ray.serve.schema import ServeDeploySchema

    more = ["cluster.scoring.max_replicas=12", "cluster.scoring.requests_per_replica=2"]
    service = manifest("paper_qwen3_8b", "--serve", "s3://bucket/model", "--secret", "vrm", *more)
    assert problems(service, "rayservices") == []
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = serve.applications
    assert application.import_path == "jobs.scoring_application:build"
    assert application.args["model"] == "s3://bucket/model"
    assert application.args["scoring"]["max_replicas"] == 12
    [group] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["replicas"], group["maxReplicas"]) == (1, 2)


@pytest.mark.parametrize(
    ("words", "letter"),
    [
        (
            ["tiny", "--workspace", "/runs/tiny"],
            r"/runs/tiny is inside a pod, and lost with it\. Give a URI",
        ),
        (["tiny", "--workspace", "/runs/tiny", "--volume-claim", "c"], "a path below /shared/"),
        (["tiny", "--workspace", "/shared/../runs", "--volume-claim", "c"], "a path below /shared/"),
        (["tiny", "--serve", "s3://bucket/model"], "--serve needs --secret NAME, a Secret with VRM_SERVICE_TOKEN"),
        (["tiny", "--serve", "/model", "--secret", "s"], "--serve /model is inside a pod"),
        (["tiny", *ON_S3, "--secret", "My_Secret"], "--secret My_Secret is no name of Kubernetes"),
        (["tiny", *ON_S3, "--volume-claim", "claim-"], "--volume-claim claim- is no name of Kubernetes"),
        (["tiny", *ON_S3, "--image", "an image"], r"--image an image is no image\. Write"),
        ([f"{ROOT}/jobs/recipes/tiny.yaml", *ON_S3], "is a file of this machine, which a pod does not have"),
    ],
)
def test_what_a_pod_would_not_find_is_refused(words, letter):
    with pytest.raises(PipelineError, match=letter):
        manifest(*words)


# ----------------------------------------------------------------------------- Slurm

FAKE_COMMANDS = {
    "scontrol": 'echo "scontrol $*" >> "$LOG"; if [ "$1" = show ]; then printf "node1\\nnode2\\n"; fi',
    "srun": 'echo "srun $*" >> "$LOG"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    # Ray's processes stay until they are ended, as those of `--block` do.
    "ray": 'trap "echo ray ended >> $LOG; exit" TERM; sleep 60 >/dev/null & wait',
    "vrm": 'echo "vrm $* at $RAY_ADDRESS with $VRM_DATA_ROOT" >> "$LOG"; '
    'trap "echo committed >> $LOG; exit 75" TERM; echo started; '
    '[ -n "$STAY" ] && { sleep 60 >/dev/null & wait; }; exit $CODE',
}
"""Of a machine with Slurm: they note how they are called."""


@pytest.fixture
def slurm(tmp_path):
    """Starts a script as sbatch would, on a machine where nothing of Slurm or Ray is real."""
    log, commands = tmp_path / "log", tmp_path / "bin"
    commands.mkdir()
    for name, body in FAKE_COMMANDS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    # Python is asked for the address, a token, and how many nodes there are.
    answers = f'case "$*" in *ray.init*) echo 2;; *) exec {sys.executable} "$@";; esac'
    (commands / "python").write_text(f"#!/usr/bin/env bash\n{answers}\n")
    (commands / "python").chmod(0o755)
    environment = {
        "PATH": f"{commands}:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "4711",
        "LOG": str(log),
        "STAY": "",
        "CODE": "0",
    }

    def start(script, **changed):
        (tmp_path / "job.sbatch").write_text(script)
        return subprocess.Popen(
            ["bash", "job.sbatch"], cwd=tmp_path, env=environment | changed, stdout=subprocess.PIPE, text=True
        ), log

    return start


def two_nodes():
    more = [*ELEVEN, "--env", "VRM_DATA_ROOT=/shared/my data", "--partition", "gpu"]
    return written(slurm_command, "paper_qwen3_8b", *SHARED, *more)


def test_the_batch_script_passes_shellcheck(tmp_path):
    (tmp_path / "job.sbatch").write_text(two_nodes())
    checked = subprocess.run([BIN / "shellcheck", tmp_path / "job.sbatch"], capture_output=True, text=True, check=False)
    assert checked.stdout + checked.stderr == ""


def test_the_batch_script_asks_for_the_nodes_of_the_plan():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", two_nodes(), flags=re.MULTILINE))
    assert options["nodes"] == "2"
    assert options["gpus-per-node"] == "h100:8"
    assert options["cpus-per-task"] == "88"
    assert options["partition"] == "gpu"
    assert options["signal"] == "B:TERM@30"
    assert "account" not in options
    with pytest.raises(ConfigError, match="--time soon is no time for sbatch"):
        written(slurm_command, "paper_qwen3_8b", *SHARED, "--time", "soon")


def test_the_batch_script_starts_ray_everywhere_and_the_driver_once(slurm):
    script, log = slurm(two_nodes())
    script.communicate(timeout=60)
    assert script.returncode == 0
    calls = log.read_text().splitlines()
    port = 20000 + 4711 % 20000
    heads = [call for call in calls if "ray start --head" in call]
    others = [call for call in calls if "ray start --address=" in call]
    assert (len(heads), len(others)) == (1, 1)
    assert "--nodelist=node1" in heads[0]
    assert f"--port={port} --num-cpus=88 --num-gpus=8" in heads[0]
    assert "--nodes=1 --ntasks=1 --exclude=node1" in others[0]
    [driver] = [call for call in calls if call.startswith("vrm")]
    assert driver.startswith(f"vrm run paper_qwen3_8b --workspace /shared/runs/qwen3 {' '.join(ELEVEN)} at ")
    assert driver.endswith(f":{port} with /shared/my data")
    assert not any("requeue" in call for call in calls)


def test_the_batch_script_ends_with_the_drivers_code(slurm):
    script, _ = slurm(two_nodes(), CODE="2")
    script.communicate(timeout=60)
    assert script.returncode == 2


def test_a_preempted_batch_script_waits_for_the_commit_and_queues_itself_again(slurm):
    script, log = slurm(two_nodes(), STAY="1")
    assert script.stdout.readline() == "started\n"
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=60)
    assert script.returncode == 75
    calls = log.read_text().splitlines()
    assert calls.index("committed") < calls.index("scontrol requeue 4711")


# ----------------------------------------------------------------------------- ssh


def test_ray_accepts_the_cluster_file_and_it_says_how_it_is_used():
    from ray.autoscaler._private.util import prepare_config, validate_config

    hosts = ["--hosts", "192.0.2.10", "192.0.2.11"]
    text = written(ssh_command, "paper_qwen3_8b", *SHARED, *hosts, "--env", "VRM_DATA_ROOT=/shared/data")
    config = yaml.safe_load(text)
    validate_config(prepare_config(config))
    assert config["provider"] == {"type": "local", "head_ip": "192.0.2.10", "worker_ips": ["192.0.2.11"]}
    [submit] = [line for line in text.splitlines() if "ray job submit" in line]
    words = shlex.split(submit.removeprefix("# "))
    assert json.loads(words[words.index("--runtime-env-json") + 1]) == {"env_vars": {"VRM_DATA_ROOT": "/shared/data"}}
    assert words[words.index("--") + 1 :] == ["vrm", "run", "paper_qwen3_8b", *SHARED]


@pytest.mark.parametrize(
    ("hosts", "letter"),
    [
        (["192.0.2.10"], r"--hosts names 1 host\(s\), and the plan needs 2 of 8 H100"),
        (["192.0.2.10", "192.0.2.10"], r"--hosts names 192\.0\.2\.10 twice"),
    ],
)
def test_hosts_that_do_not_suffice_are_refused(hosts, letter):
    with pytest.raises(ConfigError, match=letter):
        written(ssh_command, "paper_qwen3_8b", *SHARED, *ELEVEN, "--hosts", *hosts)


# ----------------------------------------------------------------------------- the image


def test_the_dockerfile_has_nothing_that_hadolint_reports():
    checked = subprocess.run([BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_image_runs_the_dry_run_without_being_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    command = json.loads(next(line for line in lines if line.startswith("CMD")).removeprefix("CMD "))
    assert command[0] == "vrm"
    done = subprocess.run(
        [sys.executable, "-m", "vrm.command_line", *command[1:], "--workspace", "/nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "at most at once" in done.stdout


def docker_answers():
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not docker_answers(), reason="no docker daemon answers")
def test_the_image_is_built_and_runs_its_dry_run_as_its_own_user():
    subprocess.run(["docker", "build", "--tag", "vrm:test", "."], cwd=ROOT, check=True)
    run = ["docker", "run", "--rm", "vrm:test"]
    assert "at most at once" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
    user = subprocess.run([*run, "id", "--user"], capture_output=True, text=True, check=True)
    assert user.stdout == "1000\n"
