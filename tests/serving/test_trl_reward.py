"""The reward function that TRL calls."""

import json
import pickle

import httpx
import pytest

from pipeline.errors import DataError
from pipeline.serving.trl_reward import VRMReward, split_completion

CHAT = [{"role": "user", "content": "hi"}]


def service(request):
    """Rewards the length of a response; half of it is helpfulness."""
    items = json.loads(request.content)["items"]
    scores = [
        [
            {
                "reward": float(len(text)),
                "reward_std": 0.5,
                "concentration": 4.0,
                "objective_weights": {"helpfulness": 0.5},
                "objective_scores": {"helpfulness": float(len(text))},
                "contributions": {"helpfulness": 0.5 * len(text)},
            }
            for text in item["responses"]
        ]
        for item in items
    ]
    return httpx.Response(200, json={"model_fingerprint": "f00d", "items": scores})


def reward(**options):
    return VRMReward("http://vrm", transport=httpx.MockTransport(service), **options)


def test_text_and_conversations_are_rewarded_alike():
    assert reward()(prompts=["hi", "ho"], completions=["a", "abc"], answer=["x", "y"]) == [1.0, 3.0]
    completions = [[{"role": "assistant", "content": "abc"}]]
    assert reward()(prompts=[CHAT], completions=completions, completion_ids=[[1]], trainer_state=None) == [3.0]


def test_a_doubtful_reward_counts_less_with_lcb():
    assert reward(lcb=2.0)(prompts=["hi"], completions=["abc"]) == [2.0]


def test_spread_and_contributions_are_logged():
    metrics, table = {}, {}
    reward()(prompts=["hi"] * 2, completions=["a", "abc"], log_metric=metrics.__setitem__, log_extra=table.__setitem__)
    assert metrics == {"vrm/reward_std": 0.5, "vrm/helpfulness": 1.0}
    assert table == {"vrm/reward_std": [0.5, 0.5], "vrm/helpfulness": [0.5, 1.5]}


def test_the_last_turn_of_a_long_completion_is_the_response():
    turns = [
        {"role": "assistant", "content": "which ?"},
        {"role": "user", "content": "this"},
        {"role": "assistant", "content": "so"},
    ]
    assert split_completion("hi", turns) == ([CHAT[0], *turns[:2]], "so")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ([], "must end with a turn of the assistant"),
        ([{"role": "user", "content": "x"}], "must end with a turn of the assistant"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "holds list: only text"),
        ([{"role": "assistant", "content": None}], "holds NoneType: only text"),
    ],
)
def test_what_is_no_answer_of_the_assistant_is_refused(completion, reason):
    with pytest.raises(DataError, match=reason):
        split_completion(CHAT, completion)


def test_it_can_be_sent_to_another_process():
    copy = pickle.loads(pickle.dumps(VRMReward("http://vrm", lcb=1.0, token="mine")))
    assert (copy._lcb, copy._scorer._settings.token, copy.__name__) == (1.0, "mine", "vrm")
