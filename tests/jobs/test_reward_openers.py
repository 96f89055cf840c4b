"""How a job opens the reward models of its recipe: behind which service, with which scale and which weights."""

from contextlib import ExitStack

import pytest

import actors.reward_service
from cluster.rollout_plan import THROUGH_FILES
from cluster.rollout_room import RolloutRoom
from jobs.shared_actors import SharedActors
from pipeline.config.load import load_recipe
from pipeline.config.rewards import ModelReward
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.models.reward_model_card import read_card
from pipeline.records import StageResult


class Service:
    """A scoring service that remembers what it was asked to be."""

    def __init__(self, place, weights=None):
        self.place, self.weights = place, weights

    def steered(self, weights):
        return Service(self.place, weights)


@pytest.fixture
def openers(monkeypatch, trained_reward_model):
    monkeypatch.setattr(actors.reward_service, "start_service", lambda place, *args, **settings: Service(place))
    monkeypatch.setattr(actors.reward_service, "scorer_of_application", lambda name, *args, **settings: Service(name))
    own = StageResult(name="train_reward_model", location=trained_reward_model, fingerprint="own", metrics={})
    with ExitStack() as exits:
        room = RolloutRoom(workers=1, reason="")
        shared = SharedActors(load_recipe("tiny"), THROUGH_FILES, "workspace", exits, room=lambda: room)
        yield shared.reward_openers(own)


def test_the_model_of_the_run_and_a_checkpoint_are_served_with_the_scale_of_their_card(openers, trained_reward_model):
    scale = RewardScale.of(read_card(trained_reward_model))
    for place in ("this_run", trained_reward_model):
        plain = openers.model(ModelReward(place=place))
        assert (plain.scorer.place, plain.scorer.weights, plain.scale) == (trained_reward_model, None, scale)
        steered = openers.model(ModelReward(place=place, weights={"safety": 2.0}))
        assert (steered.scorer.weights, steered.scale) == ({"safety": 2.0}, scale)


def test_an_application_of_others_is_asked_and_its_scale_is_measured(openers):
    opened = openers.model(ModelReward(place="serve:theirs", weights={"safety": 2.0}))
    assert (opened.scorer.place, opened.scorer.weights, opened.scale) == ("theirs", {"safety": 2.0}, None)
