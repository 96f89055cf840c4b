"""The loop on a learner whose model is a number: the step it was updated at last."""

import json
from pathlib import Path

import pytest

from pipeline.loops.training import train
from pipeline.stages.workspace import StageDirectory

ACCURACY = {1: 0.6, 3: 0.9, 5: 0.7}
"""Held-out accuracy of the models after steps 1, 3 and 5."""


class NumberLearner:
    def update(self, batch, step):
        self.number = step
        return {"train/loss": 0.0}

    def evaluate(self, batch):
        return {"eval/accuracy": ACCURACY[self.number]}

    def snapshot(self):
        return NumberSnapshot(self.number)

    def restore(self, uri):
        self.number = json.loads(Path(uri, "number").read_text())

    def export(self, uri):
        Path(uri).mkdir()
        Path(uri, "model").write_text(str(self.number))


class NumberSnapshot:
    def __init__(self, number):
        self.number = number

    def write(self, uri):
        Path(uri).mkdir(parents=True)
        Path(uri, "number").write_text(str(self.number))


@pytest.mark.parametrize(("keep_best", "model"), [(None, 5), ("eval/accuracy", 3), ("-eval/accuracy", 1)])
def test_training_ends_with_the_last_model_or_with_the_best(keep_best, model, tmp_path):
    stage = StageDirectory(str(tmp_path), "train", "0" * 64, keep_checkpoints=1, keep_best=keep_best)
    metrics = train(
        NumberLearner(),
        stage,
        batch_of=lambda step: step,
        heldout=None,
        num_steps=6,
        eval_every=2,
        checkpoint_every=2,
    )
    assert Path(stage.result_uri, "model").read_text() == str(model)
    assert metrics == {"eval/accuracy": ACCURACY[model]}
