"""A learner's rank that dies in its backward pass when its fate says so."""

from functools import partial

from pipeline.data.planted import build_tokenizer
from pipeline.learning.engine import TorchEngine
from tests.conftest import small_world
from tests.faults.mortal_worker import befalls, die
from tests.learners import ALIGNMENT, ppo_learner

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
