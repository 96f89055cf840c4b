"""A learner's rank that dies in its backward pass when its fate says so."""

import time
from functools import partial
from pathlib import Path

from actors.deepspeed_learners import deepspeed_ppo_learner
from pipeline.data.planted import build_tokenizer
from pipeline.learning.engine import TorchEngine
from tests.conftest import small_world
from tests.faults.mortal_worker import befalls, die
from tests.support.learners import ALIGNMENT, ppo_learner

CONFIG = ALIGNMENT.model_copy(update={"checkpoint_every": 1})


class MortalEngine(TorchEngine):
    def __init__(self, *arguments, fate, **options):
        super().__init__(*arguments, **options)
        self._fate = fate

    def backward(self, loss, *, last):
        super().backward(loss, last=last)
        if befalls(self._fate, "death in backward"):
            die()


def build_learner(policy, publish_directory, fate, device=None):
    """Runs on the rank."""
    engine = partial(MortalEngine, fate=fate)
    return ppo_learner(policy, small_world(), build_tokenizer(), publish_directory, config=CONFIG, make_engine=engine)


def build_ranks(spec, ranks, fate, device):
    """Runs on every rank of DeepSpeed; the last is mortal."""
    learner = deepspeed_ppo_learner(spec, ranks, device)
    engine = learner.engine
    backward = engine.backward

    def die_of_the_gradient(gradient):
        time.sleep(1.0)  # until the others wait in a collective
        (Path(fate) / "time of death").touch()
        die()

    def mortal_backward(loss, *, last):
        if engine.rank == engine.world_size - 1 and befalls(fate, "death in backward"):
            loss.register_hook(die_of_the_gradient)
        backward(loss, last=last)

    engine.backward = mortal_backward
    return learner
