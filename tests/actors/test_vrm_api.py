"""The scoring service over HTTP, in this process and with a model of two objectives that fits in a sentence."""

import asyncio
import json
import math

import httpx
import pytest

from actors.vrm_api import build_api
from pipeline.config.schema import VRMHeadConfig
from pipeline.errors import DataError
from pipeline.models.reward_model import RewardModelCard
from pipeline.records import RewardScore
from pipeline.serving.desk import ScoringDesk, describe

CARD = RewardModelCard(
    head="vrm",
    vrm=VRMHeadConfig(semantic_dims=6),
    objectives=("helpfulness", "brevity"),
    max_length=64,
    score_mean=(3.0, 2.0),
    score_std=(1.0, 0.5),
    reward_mean=0.5,
    reward_std=2.0,
    metrics={"eval/accuracy": 0.75},
)


def words_and_letters(prompt, response):
    """About half the weight on the number of words, half on minus the number of letters.

    alpha = (3/2, 3/2), so Cov[w] = [[1, -1], [-1, 1]] / 16; nothing else is uncertain.
    """
    helpfulness, brevity = float(len(response.split())), -float(len(response))
    return RewardScore(
        mean=0.5 * helpfulness + 0.5 * brevity,
        std=(helpfulness - brevity) / 4,
        objective_weights=(0.5, 0.5),
        objective_scores=(helpfulness, brevity),
        concentration=3.0,
    )


async def score_rows(rows):
    prompts, responses = rows
    if "refuse" in responses:
        raise DataError("the chat template refuses this conversation")
    if "break" in responses:
        raise RuntimeError("a secret of this machine")
    if "overflow" in responses:
        return [RewardScore(mean=math.nan, std=0.0, objective_weights=(), objective_scores=())] * len(responses)
    return [words_and_letters(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def api(token=None, rows=score_rows):
    return build_api(ScoringDesk(rows, describe(CARD, "f00d", {"torch": "2"})), token=token)


def ask(method, path, body=None, *, app=None, **options):
    """One request; bytes go as they are."""
    options |= {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}

    async def exchange():
        transport = httpx.ASGITransport(app=app or api())
        async with httpx.AsyncClient(transport=transport, base_url="http://vrm") as client:
            return await client.request(method, path, **options)

    return asyncio.run(exchange())


def test_one_prompt_with_many_responses():
    answer = ask("POST", "/v1/score", {"prompt": "hi", "responses": ["a b", "abcd"]}).json()
    assert answer["model_fingerprint"] == "f00d"
    assert [score["reward"] for score in answer["scores"]] == [-0.5, -1.5]
    assert answer["scores"][0]["contributions"] == {"helpfulness": 1.0, "brevity": -1.5}
    assert answer["scores"][0]["concentration"] == 3.0


def test_many_prompts_keep_their_own_responses():
    items = [
        {"prompt": "hi", "responses": ["a", "a b c"]},
        {"prompt": [{"role": "user", "content": "x"}], "responses": ["ab"]},
    ]
    answer = ask("POST", "/v1/score", {"items": items}).json()
    assert [[score["reward"] for score in item] for item in answer["items"]] == [[0.0, -1.0], [-0.5]]


def test_a_comparison_says_how_surely_and_because_of_what():
    answer = ask("POST", "/v1/compare", {"prompt": "hi", "a": "a b", "b": "abcde"}).json()
    # Scores (2, -3) against (1, -5): D = (1, 2), E = 1/2 + 2/2, Var = (1 - 2)^2 / 16.
    assert (answer["margin"], answer["margin_std"]) == (1.5, 0.25)
    assert answer["probability"] == pytest.approx(1 / (1 + math.exp(-1.5 / math.sqrt(1 + math.pi / 8 / 16))))
    assert answer["contributions"] == {"helpfulness": 0.5, "brevity": 1.0}
    assert (answer["preferred"], answer["decided_by"]) == ("a", "brevity")
    assert answer["b"]["reward"] == -2.0


def test_equal_responses_tie_and_nothing_decides():
    answer = ask("POST", "/v1/compare", {"prompt": "hi", "a": "a", "b": "a"}).json()
    assert (answer["preferred"], answer["decided_by"], answer["probability"]) == ("tie", None, 0.5)


def test_a_doubtful_candidate_must_be_better_to_win():
    # Rewards -3/2, -5/2 with standard deviations 11/4, 7/4.
    body = {"prompt": "hi", "responses": ["abcdef", "a b c d"]}
    assert ask("POST", "/v1/best_of", body).json()["best"] == 1
    ranking = ask("POST", "/v1/best_of", body | {"lcb": 2}).json()["ranking"]
    assert [(c["index"], c["reward"], c["bound"]) for c in ranking] == [(0, -2.5, -6.0), (1, -1.5, -7.0)]


def test_the_model_introduces_itself():
    answer = ask("GET", "/v1/model").json()
    assert answer["model_fingerprint"] == "f00d"
    assert (answer["head"], answer["decoder"], answer["objectives"]) == ("vrm", "bilinear", ["helpfulness", "brevity"])
    assert answer["objective_statistics"]["brevity"] == {"mean": 2.0, "std": 0.5}
    assert answer["versions"] == {"torch": "2"}


def test_health_asks_for_no_token():
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert ask("GET", path, app=api(token="secret")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/score", "/v1/compare", "/v1/best_of"])
@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "Basic !", "Basic d3Jvbmc=", "Bearer sécret"])
def test_without_the_token_nobody_is_served(path, authorization):
    headers = {"authorization": authorization.encode()}
    assert ask("POST", path, {}, app=api(token="secret"), headers=headers).status_code == 401


def test_the_token_is_taken_as_bearer_or_as_password():
    for options in ({"headers": {"authorization": "Bearer secret"}}, {"auth": ("anyone", "secret")}):
        assert ask("GET", "/v1/model", app=api(token="secret"), **options).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"",
        b'{"prompt": NaN, "responses": ["x"]}',
        b'{"prompt": "hi", "responses": ["\\ud800"]}',
        b'{"\\ud800": "hi", "prompt": "hi", "responses": ["x"]}',
        b'{"prompt": "hi", "responses": ["\xff\xfe"]}',
        b"\xff\xfe\x00",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"items": ' + b'{"items":' * 50_000,
        b'{"prompt": "hi", "responses": ' + b"9" * 10_000 + b"}",
        {"prompt": "hi", "responses": []},
        {"prompt": "hi", "responses": "x"},
        {"prompt": "hi", "responses": [None]},
        {"prompt": 3, "responses": ["x"]},
        {"prompt": [], "responses": ["x"]},
        {"prompt": [{"role": "tool", "content": "hi"}], "responses": ["x"]},
        {"prompt": "hi", "responses": ["x" * 100_001]},
        {"prompt": "hi", "responses": ["x"] * 1025},
        {"prompt": "hi"},
        {"prompt": "hi", "responses": ["x"], "more": 1},
        {"items": [], "prompt": "hi", "responses": ["x"]},
        {"prompt": "hi", "responses": ["refuse"]},
    ],
    ids=lambda body: str(body)[:30],
)
def test_a_request_that_means_nothing_is_refused_with_a_reason(body):
    answer = ask("POST", "/v1/score", body)
    assert answer.status_code in {400, 422}
    assert answer.json()["detail"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("lcb", [b"NaN", b"Infinity", b"-1", b'"x"', b"1e999"])
def test_a_bound_that_is_no_number_is_refused(lcb):
    body = b'{"prompt": "hi", "responses": ["x"], "lcb": ' + lcb + b"}"
    assert ask("POST", "/v1/best_of", body).status_code == 422


@pytest.mark.parametrize("response", ["break", "overflow"])
def test_what_fails_inside_stays_inside(response, caplog):
    answer = ask("POST", "/v1/score", {"prompt": "hi", "responses": [response]})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the service failed; its log says why"}
    assert ("a secret" in caplog.text) == (response == "break")


def test_the_interface_is_described_in_openapi():
    paths = ask("GET", "/openapi.json").json()["paths"]
    assert {"/v1/score", "/v1/compare", "/v1/best_of", "/v1/model", "/healthz", "/readyz"} <= paths.keys()
    assert json.dumps(paths["/v1/score"]).count("ScoreManyRequest")
