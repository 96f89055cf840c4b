"""The client against services that are slow, busy, broken or gone."""

import asyncio
import json
import pickle

import httpx
import pytest

from pipeline.errors import ConfigError, DataError, DeadlineExceeded, WorkerError
from pipeline.serving.client import (
    PATIENCE_S,
    AsyncClient,
    Client,
    Pause,
    Send,
    exchange,
    plan_calls,
)

URL = "http://vrm"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def reply(status, body=None, **headers):
    return httpx.Response(status, json=body or {"detail": "because"}, headers=headers)


def play(outcomes, deadline_s=100.0, uniform=lambda low, high: high):
    """Steps an exchange through the outcomes; the answer, and every pause it made."""
    clock, pauses, left = Clock(), [], list(outcomes)
    steps = exchange(URL, deadline_s, clock=clock, uniform=uniform)
    outcome = None
    try:
        while True:
            step = steps.send(outcome)
            outcome = None
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                clock.now += step.seconds
            else:
                assert isinstance(step, Send)
                assert step.timeout_s == deadline_s - clock.now
                outcome = left.pop(0)
    except StopIteration as answered:
        assert left == []
        return answered.value, pauses


def test_pauses_double_up_to_eight_seconds_and_a_busy_service_is_asked_on():
    answer, pauses = play([reply(503)] * 9 + [reply(200)], deadline_s=1000)
    assert answer.status_code == 200
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]


def test_retry_after_is_waited_out_before_the_jitter():
    _, pauses = play([reply(429, **{"retry-after": "7"}), reply(429, **{"retry-after": "nonsense"}), reply(200)])
    assert pauses == [7.25, 0.5]


def test_each_pause_is_drawn_between_nothing_and_its_length():
    drawn = []

    def uniform(low, high):
        drawn.append((low, high))
        return low

    _, pauses = play([reply(503), httpx.ConnectError("no"), reply(200)], uniform=uniform)
    assert drawn == [(0.0, 0.25), (0.0, 0.5)]
    assert pauses == [0.0, 0.0]


@pytest.mark.parametrize("outcome", [httpx.ConnectError("refused"), reply(500), reply(502)])
def test_a_service_that_fails_for_a_minute_is_given_up(outcome):
    """Pauses of 0.25 s to 4 s are 7.75 s together; seven of 8 s more pass the minute."""
    assert PATIENCE_S == 60
    with pytest.raises(WorkerError, match=r"http://vrm failed for 60 s, at last with"):
        play([outcome] * 13)


def test_a_service_that_was_only_busy_in_between_is_not_given_up():
    answer, _ = play([reply(500)] * 12 + [reply(429)] + [reply(500)] * 3 + [reply(200)], deadline_s=1000)
    assert answer.status_code == 200


def test_a_proxy_that_does_not_know_its_routes_yet_is_asked_again():
    """Ray Serve's own words, from a proxy that had just been restarted."""
    text = "Path '/v1/score' not found. Ping http://.../-/routes for available routes."
    answer, pauses = play([httpx.Response(404, text=text), reply(200)])
    assert (answer.status_code, pauses) == (200, [0.25])
    with pytest.raises(DataError, match="404"):
        play([reply(404)])  # the service's own answer


def test_the_deadline_ends_the_waiting():
    with pytest.raises(DeadlineExceeded, match=r"within 3 s, at last with 429: because"):
        play([reply(429, **{"retry-after": "2"})] * 2, deadline_s=3)


@pytest.mark.parametrize(("status", "kind"), [(401, ConfigError), (422, DataError), (413, DataError), (404, DataError)])
def test_what_asking_again_cannot_mend_is_told_at_once(status, kind):
    with pytest.raises(kind, match=f"{status}: because"):
        play([reply(status)])


@pytest.mark.parametrize(
    "outcome", [httpx.UnsupportedProtocol("no scheme"), httpx.LocalProtocolError("Illegal header value")]
)
def test_a_request_that_cannot_be_made_is_not_tried_again(outcome):
    with pytest.raises(ConfigError, match=r"cannot be asked .*http://host:port"):
        play([outcome])


def test_questions_of_one_call_share_its_end_and_its_deadline_is_the_one_told():
    steps = exchange(URL, 600.0, ends_at=3.0, clock=Clock())
    assert next(steps) == Send(3.0)
    with pytest.raises(DeadlineExceeded, match=r"within 600 s, at last with no question: those before it took"):
        next(exchange(URL, 600.0, ends_at=-1.0, clock=Clock()))


def scored(reward):
    return {
        "reward": reward,
        "reward_std": 0.0,
        "concentration": 0.0,
        "objective_weights": {},
        "objective_scores": {},
        "contributions": {},
    }


class Service:
    """Rewards the length of a response; fails as often as it is told to first."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.requests = []

    def __call__(self, request):
        body = json.loads(request.content)
        self.requests.append((request.headers.get("authorization"), body))
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        items = [[scored(float(len(text))) for text in item["responses"]] for item in body["items"]]
        return httpx.Response(200, json={"model_fingerprint": "f00d", "items": items})


def sync_scores(service, prompts, responses, **options):
    with Client(URL, transport=httpx.MockTransport(service), **options) as scorer:
        return scorer.score_rows(prompts, responses)


def async_scores(service, prompts, responses, **options):
    async def ask():
        async with AsyncClient(URL, transport=httpx.MockTransport(service), **options) as scorer:
            return await scorer.score_rows(prompts, responses)

    return asyncio.run(ask())


both = pytest.mark.parametrize("scores", [sync_scores, async_scores])


@both
def test_scores_come_back_in_order_however_many_requests_they_took(scores):
    service = Service()
    responses = ["x" * n for n in range(1, 12)]
    answer = scores(service, ["hi"] * 11, responses, batch_size=2, concurrency=3)
    assert [score.reward for score in answer.scores] == [float(n) for n in range(1, 12)]
    assert answer.model_fingerprint == "f00d"
    assert len(service.requests) == 6


@both
def test_a_hiccup_is_asked_again(scores):
    service = Service(httpx.ReadError("gone"), reply(503), reply(500))
    assert [s.reward for s in scores(service, ["hi"], ["abc"]).scores] == [3.0]
    assert len(service.requests) == 4


@both
def test_the_token_is_sent(scores, monkeypatch):
    service = Service()
    scores(service, ["hi"], ["a"], token="mine")
    monkeypatch.setenv("VRM_SERVICE_TOKEN", "from the environment")
    scores(service, ["hi"], ["a"])
    assert [token for token, _ in service.requests] == ["Bearer mine", "Bearer from the environment"]


@both
def test_a_refused_request_ends_the_whole_call(scores):
    with pytest.raises(DataError, match="422: because"):
        scores(Service(reply(422)), ["hi"] * 4, ["a"] * 4, batch_size=1)


@both
@pytest.mark.parametrize(("prompts", "responses"), [([], []), (["hi"], ["a", "b"])])
def test_rows_that_do_not_pair_up_are_refused_before_they_are_sent(scores, prompts, responses):
    service = Service()
    with pytest.raises(DataError, match="one prompt per response"):
        scores(service, prompts, responses)
    assert service.requests == []


def test_neighbours_share_their_prompt():
    chat = [{"role": "user", "content": "yes"}]
    [call] = plan_calls(["hi", "hi", chat, chat, "hi"], ["a", "b", "c", "d", "e"], batch_size=8)
    assert call.body["items"] == [
        {"prompt": "hi", "responses": ["a", "b"]},
        {"prompt": chat, "responses": ["c", "d"]},
        {"prompt": "hi", "responses": ["e"]},
    ]


def test_long_texts_make_small_requests():
    calls = plan_calls(["hi"] * 3, ["é" * 1_000_000] * 3, batch_size=64)
    assert [len(call.body["items"][0]["responses"]) for call in calls] == [2, 1]


@pytest.mark.parametrize("scores", [sync_scores, async_scores])
def test_scores_of_two_models_are_not_mixed(scores):
    """The service swaps its model between the two requests of a call, and the call is asked once more."""
    old = httpx.Response(200, json={"model_fingerprint": "01d", "items": [[scored(-1.0)]]})
    service = Service(old)
    answer = scores(service, ["hi", "you"], ["a", "bc"], batch_size=1, concurrency=1)
    assert answer.model_fingerprint == "f00d"
    assert [score.reward for score in answer.scores] == [1.0, 2.0]
    assert len(service.requests) == 4


def test_another_server_is_recognised():
    with (
        Client(URL, transport=httpx.MockTransport(lambda request: httpx.Response(200, json={}))) as scorer,
        pytest.raises(WorkerError, match="is no VRM scoring service"),
    ):
        scorer.model()


def test_a_client_can_be_sent_to_another_process():
    scorer = pickle.loads(pickle.dumps(Client(URL, token="mine", deadline_s=1.0)))
    assert (scorer._settings.url, scorer._settings.token, scorer._settings.deadline_s) == (URL, "mine", 1.0)
