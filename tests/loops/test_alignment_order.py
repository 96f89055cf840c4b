"""Engines that share the learner's GPUs are asleep whenever it works on them."""

from pipeline.data.prompts import PromptStream
from pipeline.learning.experience import RewardScale
from pipeline.loops.alignment import align
from pipeline.stages.workspace import StageDirectory
from tests.fakes import FakeRollouts, FakeScorer
from tests.learners import ALIGNMENT, ppo_learner, prompts_of


def recording(events, target, *names):
    """Writes down every call of these methods before it is made."""

    def recorded(name, method):
        def record(*arguments):
            events.append(name)
            return method(*arguments)

        return record

    for name in names:
        setattr(target, name, recorded(name, getattr(target, name)))
    return target


def test_engines_sleep_from_the_last_sample_to_the_new_weights(tiny_policy, world, tokenizer, tmp_path):
    events = []
    config = ALIGNMENT.model_copy(update={"num_steps": 2, "checkpoint_every": 5})
    align(
        recording(events, FakeRollouts(tokenizer), "load_weights", "generate", "sleep"),
        FakeScorer(),
        recording(
            events,
            ppo_learner(tiny_policy, world, tokenizer, tmp_path / "published", config=config),
            "evaluate",
            "update",
            "publish_weights",
        ),
        PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0),
        StageDirectory(str(tmp_path), "align_policy", "0" * 64),
        config,
        reward_scale=RewardScale(mean=0.0, std=1.0),
        seed=0,
    )
    step = ["generate", "sleep", "evaluate", "update", "publish_weights", "load_weights"]
    assert events == ["publish_weights", "load_weights", *step, *step]
