"""A disturbed alignment against a plain one: same prompts, same seeds, and a policy as good.

    python -m tests.performance.disturbed_run --out /tmp/disturbed --json disturbed_run.json
    python -m tests.performance.disturbed_run --out /tmp/smoke --seeds 0 --smoke

The planted world, the jobs that users run, real engines, learner and scoring service. Of each seed, both runs start
from one fine-tuned policy and one reward model, at the recipe's size. The plain one has one rollout worker that samples
each step when its policy is there. The disturbed one prefetches, is asked for three workers (jobs/scale_rollouts.py)
and later for one again, and between the two requests a worker's process is killed by SIGKILL while it samples.

Checked, and an error where it fails: the pool had one, three and one workers; a worker was replaced; every step
consumed the same (prompt, sample, seed), in order. Printed: planted reward of the answers to the held-out prompts with
its standard error, reward, KL, win rate over the start, and the difference of the two runs, prompt by prompt and over
the seeds. A seed takes some fifteen minutes of two idle cores; what is finished in --out is not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.data.planted import GoldAnnotator
from pipeline.experiments.findings import spread
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from tests.performance.processor import processor
from tests.support.paths import ROOT

CONSUMED_FILE = "consumed.jsonl"
BEFORE_ALIGNMENT = ("sft", "train_reward_model")
END = 3
"""Last steps of training over which reward and KL are averaged."""
BOTH = (
    # Room for three workers beside the learner and the scoring replica on two cores.
    "cluster.alignment.ranks=1",
    "cluster.rollout.workers=1",
    "cluster.rollout.chunk_size=16",
    # Engines take their time to join, on a busy machine the time of many steps.
    "alignment.num_steps=40",
    # Prefetch needs it; where samples are on policy it changes next to nothing.
    "alignment.ppo.tis_cap=2",
)
PREFETCH = ("alignment.prefetch=continue",)
SMOKE = (
    "data.planted.num_train_pairs=640",
    "data.planted.num_sft_texts=1600",
    "data.planted.num_heldout_prompts=32",
    "sft.num_steps=20",
    "reward.num_steps=30",
    "alignment.num_steps=100",
    "alignment.prompts_per_step=64",
    "alignment.ppo.mini_batch_size=32",
    "benchmark.num_prompts=32",
)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What is left of one run."""

    workspace: Path
    consumed: list[list[Any]]
    """Of every batch, in order, its [prompt id, sample index, seed]."""
    rows: list[dict[str, Any]]
    golds: np.ndarray
    """Planted reward of the answer to each held-out prompt."""
    measured: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a directory for the workspaces")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="few prompts and a reward model of 30 steps")
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value", help="overrides of the recipe")
    parser.add_argument("--json", help="write the numbers here, too")
    parser.add_argument("--job", metavar="WORKSPACE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        run_recorded_job(options)
        return
    print(processor(), flush=True)
    out = Path(options.out).resolve()
    pairs = [run_both(seed, out, options) for seed in options.seeds]
    numbers = report(options.seeds, pairs)
    if options.json:
        written = {"options": vars(options), "processor": processor(), "measured": numbers}
        Path(options.json).write_text(json.dumps(written, indent=2) + "\n")


# ------------------------------------------------------------------ the job, in a process of its own


def run_recorded_job(options: argparse.Namespace) -> None:
    """jobs/generate_benchmark.py, whose pool also writes down which requests were consumed."""
    from actors import rollout_pool
    from jobs import generate_benchmark
    from jobs.run_job import run_job
    from pipeline.rollouts.requests import rollout_requests

    class RecordingPool(rollout_pool.RolloutPool):
        def begin(self, prompts: Any, sampling: Any, **how: Any) -> None:
            self._asked = rollout_requests(prompts, sampling)
            super().begin(prompts, sampling, **how)

        def collect(self) -> Any:
            rollouts = super().collect()
            asked = [[request.prompt.id, request.sample_index, request.seed] for request in self._asked]
            given = [[rollout.prompt.id, rollout.sample_index] for rollout in rollouts]
            assert [row[:2] for row in asked] == given, "a batch came back in another order, or not whole"
            with open(Path(options.job, CONSUMED_FILE), "a") as log:
                log.write(json.dumps(asked) + "\n")
            return rollouts

    rollout_pool.RolloutPool = RecordingPool  # type: ignore[misc]  # where jobs/shared_actors.py takes it from
    overrides = [override for override in options.set if override]
    sys.argv = ["disturbed_run", "--recipe", options.recipe, "--workspace", options.job, *overrides]
    run_job(generate_benchmark.__doc__ or "", generate_benchmark.main)


class Job:
    """A running job, and what can be seen of it from outside."""

    def __init__(self, command: Sequence[str], workspace: Path) -> None:
        self.workspace = workspace
        self.log = workspace.parent / f"{workspace.name}.log"
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
            )

    def rows(self) -> list[dict[str, Any]]:
        """Of the steps of alignment so far."""
        found = list((self.workspace / "stages").glob(f"align_policy-*/{METRICS_FILE}"))
        return read_metrics(str(found[0])) if found else []

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """What the condition says once it is true."""
        while not (said := condition()):
            if self.process.poll() is not None:
                raise SystemExit(
                    f"the job ended before {what}. More steps (--set alignment.num_steps=60)? {self.tail()}"
                )
            time.sleep(0.05)
        return said

    def sampling_workers(self) -> list[psutil.Process]:
        """Ray names the process of an actor after the call it is in."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                call = " ".join(process.cmdline())
                if process.name().startswith("ray::Roll") and ("sample" in call or "continue_sampling" in call):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def finish(self) -> None:
        if self.process.wait() != 0:
            raise SystemExit(f"the job in {self.workspace} failed. {self.tail()}")

    def tail(self) -> str:
        return f"The end of {self.log}:\n{self.log.read_text()[-3000:]}"


def run_both(seed: int, out: Path, options: argparse.Namespace) -> tuple[Finished, Finished]:
    overrides = [*BOTH, *(SMOKE if options.smoke else ()), *options.set, f"seed={seed}"]
    shared, plain, disturbed = (out / f"seed-{seed}" / name for name in ("shared", "plain", "disturbed"))
    shared.parent.mkdir(parents=True, exist_ok=True)
    if not _is_finished(shared, BEFORE_ALIGNMENT[-1]):
        print(f"seed {seed}: starting policy and reward model", flush=True)
        command = [sys.executable, "jobs/train_reward_model.py", "--recipe", options.recipe]
        Job([*command, "--workspace", str(shared), *overrides], shared).finish()
    for workspace, arm in ((plain, ()), (disturbed, PREFETCH)):
        if _is_finished(workspace, "generate_benchmark"):
            continue
        # Anew: half of a run that was ended from outside would not be the run that is meant.
        shutil.rmtree(workspace, ignore_errors=True)
        for stage in BEFORE_ALIGNMENT:
            [source] = (shared / "stages").glob(f"{stage}-*")
            shutil.copytree(source, workspace / "stages" / source.name)
        print(f"seed {seed}: {workspace.name}", flush=True)
        command = [sys.executable, "-m", "tests.performance.disturbed_run", "--out", str(out)]
        command += ["--recipe", options.recipe, "--job", str(workspace), "--set", *overrides, *arm]
        job = Job(command, workspace)
        if workspace is disturbed:
            disturb(job)
        job.finish()
    finished = read_finished(plain), read_finished(disturbed)
    require_same_samples(*finished)
    return finished


def _is_finished(workspace: Path, stage: str) -> bool:
    return any((workspace / "stages").glob(f"{stage}-*/manifest.json"))


def disturb(job: Job) -> None:
    """1 -> 3 workers, a death, -> 1 worker. Who joins starts beside the running steps, and is there some steps on."""

    def workers() -> float:
        rows = job.rows()
        return rows[-1]["rollout/workers"] if rows else 0.0

    job.wait_until(lambda: len(job.rows()) >= 2, "its second step")
    scale(job.workspace, 3)
    job.wait_until(lambda: workers() == 3, "it had three workers")
    victim = job.wait_until(job.sampling_workers, "a worker sampled")[0]
    print(f"step {len(job.rows())}: SIGKILL to {victim.name()}, process {victim.pid}", flush=True)
    victim.kill()
    job.wait_until(lambda: "Replacing it" in job.log.read_text(), "the dead worker was replaced")
    seen = len(job.rows())
    job.wait_until(lambda: len(job.rows()) >= seen + 2, "two more steps")
    scale(job.workspace, 1)
    job.wait_until(lambda: workers() == 1, "it had one worker again")


def scale(workspace: Path, workers: int) -> None:
    subprocess.run(
        [sys.executable, "jobs/scale_rollouts.py", str(workspace), "--workers", str(workers)],
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# ------------------------------------------------------------------ what came of it


def read_finished(workspace: Path) -> Finished:
    [aligned] = (workspace / "stages").glob("align_policy-*")
    [benchmark] = (workspace / "stages").glob("generate_benchmark-*")
    rows = read_metrics(str(aligned / METRICS_FILE))
    gold = GoldAnnotator()
    answers = read_scored_answers(benchmark / "result" / "aligned" / "model_outputs.json")
    golds = np.array([gold.reward([{"role": "user", "content": a.instruction}], a.output) for a in answers])
    metrics = json.loads((benchmark / "manifest.json").read_text())["metrics"]
    return Finished(
        workspace=workspace,
        consumed=[json.loads(line) for line in (workspace / CONSUMED_FILE).read_text().splitlines()],
        rows=rows,
        golds=golds,
        measured={
            "gold": float(golds.mean()),
            "gold_se": standard_error(golds),
            "gold_start": metrics["gold/base"],
            "gold_win_rate": metrics["gold/win_rate"],
            "heldout_reward": metrics["reward/aligned"],
            "reward": float(np.mean([row["reward/mean"] for row in rows[-END:]])),
            "kl": float(np.mean([row["kl/per_response"] for row in rows[-END:]])),
            "stale": float(np.mean([row["rollout/staleness_mean"] for row in rows])),
        },
    )


def require_same_samples(plain: Finished, disturbed: Finished) -> None:
    """Every batch the same, one a step and those of the benchmark; and the disturbance was one."""
    assert len(plain.consumed) > len(plain.rows) == len(disturbed.rows)
    assert len(plain.consumed) == len(disturbed.consumed)
    for step, (one, other) in enumerate(zip(plain.consumed, disturbed.consumed, strict=True)):
        differ = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
        assert not differ, f"batch {step}: {len(differ)} of {len(one)} samples differ, first {differ[0]}"
    sizes = [int(row["rollout/workers"]) for row in disturbed.rows]
    assert (sizes[0], max(sizes), sizes[-1]) == (1, 3, 1), f"workers by step: {sizes}"
    assert {row["rollout/workers"] for row in plain.rows} == {1.0}


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def report(seeds: Sequence[int], pairs: Sequence[tuple[Finished, Finished]]) -> dict[str, Any]:
    """Prints the table, returns its numbers."""
    print(f"\n{'':<18}{'gold (se)':>16}{'win rate':>10}{'RM, held-out':>14}{'RM, train':>11}{'KL':>7}{'stale':>7}")
    numbers: dict[str, Any] = {}
    for seed, both in zip(seeds, pairs, strict=True):
        for name, run in zip(("plain", "disturbed"), both, strict=True):
            m = numbers[f"seed {seed}, {name}"] = run.measured
            gold = f"{m['gold']:.3f} ({m['gold_se']:.3f})"
            print(
                f"{f'seed {seed}, {name}':<18}{gold:>16}{m['gold_win_rate']:>10.3f}"
                f"{m['heldout_reward']:>14.3f}{m['reward']:>11.3f}{m['kl']:>7.2f}{m['stale']:>7.2f}"
            )
        plain, disturbed = both
        difference = disturbed.golds - plain.golds
        samples = sum(map(len, plain.consumed))
        numbers[f"seed {seed}, difference"] = {"gold": float(difference.mean()), "gold_se": standard_error(difference)}
        print(
            f"{'  difference':<18}{f'{difference.mean():+.3f} ({standard_error(difference):.3f})':>16}"
            f"   start {plain.measured['gold_start']:.3f}; the same {samples} samples in {len(plain.consumed)} batches"
        )
    over_seeds = spread([float((disturbed.golds - plain.golds).mean()) for plain, disturbed in pairs])
    numbers["difference over seeds"] = {"gold": over_seeds.mean, "low": over_seeds.low, "high": over_seeds.high}
    print(f"\ngold, disturbed minus plain, mean over seeds {over_seeds.mean:+.3f}", end="")
    print(f", 95% t interval [{over_seeds.low:+.3f}, {over_seeds.high:+.3f}]" if len(pairs) > 1 else "")
    return numbers


if __name__ == "__main__":
    main()
