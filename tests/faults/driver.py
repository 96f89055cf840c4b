"""A driver that really dies in its second save, as a program: `python -m tests.faults.driver ROOT POLICY`.

One process to import everything, one child for every misfortune; prints how each child ended.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path

from pipeline.data.planted import build_tokenizer
from pipeline.data.prompts import PromptStream
from pipeline.errors import PipelineError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.loops.alignment import align
from pipeline.stages.workspace import StageDirectory
from tests.conftest import small_world
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.learners import ALIGNMENT, ppo_learner, prompts_of
from tests.support.rewards import rewards_of

MISFORTUNES = ("dies before the commit", "dies while writing", "finds the disk full")
SECOND_SAVE = 3
"""The step behind which it is made: checkpoint_every is 2."""


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """A snapshot whose writer dies in the middle of the file."""

    def __init__(self, snapshot):
        self._snapshot = snapshot

    def write(self, uri):
        self._snapshot.write(uri)
        [part] = Path(uri).iterdir()
        os.truncate(part, part.stat().st_size // 2)
        kill_this_process()


class FullDisk:
    """A snapshot for which too little room is left: the kernel refuses, as it would on a full disk."""

    def __init__(self, snapshot):
        self._snapshot = snapshot

    def write(self, uri):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            self._snapshot.write(uri)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(root, policy, misfortune=None):
    """Alignment in one process, up to the misfortune."""
    world, tokenizer = small_world(), build_tokenizer()
    learner = ppo_learner(policy, world, tokenizer, Path(root) / "published")
    commits, snapshots = [], []

    def before_commit():
        commits.append(None)
        if misfortune == "dies before the commit" and len(commits) == 2:
            kill_this_process()

    def snapshot():
        snapshots.append(None)
        if len(snapshots) == 2 and misfortune == "dies while writing":
            return HalfWritten(learner.engine.snapshot())
        if len(snapshots) == 2 and misfortune == "finds the disk full":
            return FullDisk(learner.engine.snapshot())
        return learner.engine.snapshot()

    learner.snapshot = snapshot
    stage = StageDirectory(str(root), "align_policy", "0" * 64, require_ownership=before_commit)
    stage.delete_uncommitted()
    rollouts = FakeRollouts(tokenizer)
    align(
        rollouts,
        rewards_of(FakeScorer()),
        learner,
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        stage,
        ALIGNMENT,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    return rollouts


def in_a_child(root, policy, misfortune):
    """Exit code, or minus the signal that ended it; and the letter it left."""
    messages, letter = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(root, policy, misfortune)
        except PipelineError as error:
            os.write(letter, f"{type(error).__name__}: {error}".encode())
            os._exit(2)
        os._exit(0)
    os.close(letter)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(messages) as stream:
        return code, stream.read()


if __name__ == "__main__":
    root, policy = sys.argv[1:]
    endings = {what: in_a_child(f"{root}/{what}", policy, what) for what in MISFORTUNES}
    print(json.dumps(endings))
