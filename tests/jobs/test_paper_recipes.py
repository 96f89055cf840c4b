"""The paper recipes' own paths on two cores: their algorithms, ZeRO stages, offload and data in the publisher's form.

Only what a CPU cannot hold is changed: the models are a tiny random Qwen3 with a tokenizer of its family, the data
forty prompts in UltraFeedback's raw form, and steps, lengths and processes are few.
"""

import json
import os
import subprocess
import sys

import pytest

from jobs.command_line import job_options, print_dry_run
from jobs.run_job import job_command
from pipeline.config.load import load_recipe
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from tests.support.chat_families import FAMILIES
from tests.support.paths import ROOT

PAPER_RECIPES = [
    "paper_literal",
    "paper_qwen2.5_7b",
    "paper_qwen3_32b",
    "paper_qwen3_8b",
    "paper_qwen3_8b_two_nodes",
    "qwen3_1.7b_one_gpu",
    "qwen3_8b_lora_one_gpu",
    "table1_qwen2.5_7b",
    "table1_qwen3_8b",
]
ASPECTS = ("instruction_following", "truthfulness", "honesty", "helpfulness")

REDUCED = (
    *("policy.dtype=float32", "reward.backbone_dtype=float32"),
    *("reward.batch_pairs=8", "reward.num_steps=4", "reward.max_length=192", "reward.max_tokens_per_micro_batch=512"),
    *("reward.eval_every=2", "reward.checkpoint_every=2"),
    *("alignment.num_steps=2", "alignment.prompts_per_step=8", "alignment.ppo.mini_batch_size=8"),
    *("alignment.max_prompt_tokens=96", "alignment.max_response_tokens=16"),
    *("alignment.max_tokens_per_micro_batch=512", "alignment.eval_every=2", "alignment.eval_prompts=2"),
    *("benchmark.num_prompts=2", "benchmark.max_prompt_tokens=96", "benchmark.max_response_tokens=16"),
    "data.heldout_fraction=0.2",
)

ON_TWO_CORES = (
    *(f"cluster.{s}.{k}" for s in ("reward", "sft") for k in ("ranks=1", "cpus_per_rank=0.5", "gpus_per_rank=0")),
    *("cluster.alignment.cpus_per_rank=0.4", "cluster.alignment.gpus_per_rank=0"),
    *("cluster.rollout.workers=1", "cluster.rollout.cpus_per_worker=0.4", "cluster.rollout.gpus_per_worker=0"),
    *("cluster.rollout.placement=null", "cluster.rollout.gpu_memory_fraction=null", "cluster.rollout.max_sequences=16"),
    *("cluster.rollout.enforce_eager=true", "cluster.scoring.replicas=1", "cluster.scoring.max_tokens_per_batch=1024"),
    *(
        "cluster.accelerator=auto",
        "cluster.scoring.cpus_per_replica=0.2",
        "cluster.scoring.gpus_per_replica=0",
        "cluster.object_store_gib=0.3",
    ),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return FAMILIES["Qwen3"].write(tmp_path_factory.mktemp("qwen3"), ending="<|im_end|>")


@pytest.fixture(scope="module")
def ultrafeedback(tmp_path_factory):
    """Forty prompts as openbmb/UltraFeedback has them: four rated completions each, some ratings missing."""
    rows = [
        {
            "source": "sharegpt",
            "instruction": f"Name {n} things that are red.",
            "models": [f"model-{place}" for place in range(4)],
            "completions": [
                {
                    "model": f"model-{place}",
                    "response": " ".join(["A rose."] * (1 + (n + place) % 4)),
                    "annotations": {
                        aspect: {
                            "Rating": "N/A" if (n + k) % 13 == 0 else str(1 + (n + place + k) % 5),
                            "Rationale": "",
                        }
                        for k, aspect in enumerate(ASPECTS)
                    },
                    "overall_score": float(place),
                }
                for place in range(4)
            ],
        }
        for n in range(40)
    ]
    file = tmp_path_factory.mktemp("data") / "ultrafeedback.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def reduced(recipe, model, ultrafeedback):
    ranks = 2 if load_recipe(recipe).cluster.alignment.ranks > 1 else 1
    return (
        *REDUCED,
        *ON_TWO_CORES,
        f"policy.checkpoint={model}",
        f"reward.backbone={model}",
        f"data.sources=[{{path: {ultrafeedback}, format: ultrafeedback}}]",
        f"cluster.alignment.ranks={ranks}",
    )


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_a_reduced_paper_recipe_plans_and_keeps_its_path(name, model, ultrafeedback, tmp_path, capsys):
    overrides = reduced(name, model, ultrafeedback)
    own, small = load_recipe(name), load_recipe(name, overrides)
    command = job_command("", lambda job: None)
    print_dry_run(job_options(command.options(["--recipe", name, "--workspace", str(tmp_path), *overrides])))
    printed = capsys.readouterr().out
    assert "1 data file, policy.checkpoint, reward.backbone looked at" in printed
    assert "Planned for" in printed
    for change in ("prompts_per_step", "max_response_tokens"):
        assert getattr(small.alignment, change) < getattr(own.alignment, change)
    # What makes the path is the recipe's: the loss, who offloads, how models are split, what the reward is.
    path = {"mini_batch_size"}
    assert small.alignment.ppo.model_dump(exclude=path) == own.alignment.ppo.model_dump(exclude=path)
    assert small.alignment.kl == own.alignment.kl
    assert small.reward.vrm == own.reward.vrm
    assert small.reward.loss == own.reward.loss
    for field in ("zero_stage", "offload_optimiser"):
        assert getattr(small.cluster.alignment, field) == getattr(own.cluster.alignment, field)


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.parametrize("name", ["paper_qwen3_8b", "qwen3_1.7b_one_gpu", "qwen3_8b_lora_one_gpu"])
def test_a_reduced_paper_recipe_runs_its_own_path(name, model, ultrafeedback, tmp_path):
    """PPO with ZeRO-3, offload and a critic of its own on two ranks; GRPO; GRPO through adapters."""
    done = subprocess.run(
        [
            *(sys.executable, "jobs/align_policy.py", "--recipe", name, "--workspace", str(tmp_path)),
            *reduced(name, model, ultrafeedback),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=850,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    stages = {stage.name.rpartition("-")[0]: stage for stage in (tmp_path / "stages").iterdir()}
    assert {"train_reward_model", "align_policy"} <= stages.keys()
    assert all((stage / "manifest.json").exists() for stage in stages.values())
    steps = [row for row in read_metrics(stages["align_policy"] / METRICS_FILE) if "gate/mean" in row]
    # The finished policy's validation repeats the numbers of the last step.
    assert [row["step"] for row in steps] == [0, 1, 1]
    assert all(row["gate/mean"] < 1e-4 for row in steps)
    assert ("value/mean" in steps[0]) == (name == "paper_qwen3_8b")
    assert (stages["align_policy"] / "result" / "model.safetensors").exists()
