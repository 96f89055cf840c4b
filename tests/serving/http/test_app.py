"""The scoring service over HTTP, in this process and with a model of two objectives that fits in a sentence."""

import asyncio
import json
import math
import re

import httpx
import pytest

from pipeline.config.cluster import ScoringConfig
from pipeline.config.reward import VRMHeadConfig
from pipeline.errors import DataError
from pipeline.models.reward_model_card import RewardCalibration, RewardModelCard
from pipeline.records import RewardScore
from pipeline.serving.admission import Admission
from pipeline.serving.cache import ScoreCache
from pipeline.serving.http.app import build_api
from pipeline.serving.scoring_service import ScoringService, describe_model

CARD = RewardModelCard(
    head="vrm",
    vrm=VRMHeadConfig(semantic_dims=6),
    objectives=("helpfulness", "brevity"),
    max_length=64,
    score_mean=(3.0, 2.0),
    score_std=(1.0, 0.5),
    reward_mean=0.5,
    reward_std=2.0,
    metrics={"eval/accuracy": 0.75, "reasons/brevity/pair_accuracy": 0.8, "reasons/brevity/pairs": 50.0},
    scale=2.0,
    calibration=RewardCalibration(temperature=2.0, answer_threshold=0.5),
    mean_contributions=(1.25, -0.75),
)


def words_and_letters(prompt, response):
    """About half the weight on the number of words, half on minus the number of messages.

    What is uncertain is how one weighs against the other.
    """
    helpfulness, brevity = float(len(response.split())), -float(len(response))
    return RewardScore(
        mean=0.5 * helpfulness + 0.5 * brevity,
        std=abs(helpfulness - brevity) / 4,
        objective_weights=(0.5, 0.5),
        objective_scores=(helpfulness, brevity),
        concentration=3.0,
        deviations=((helpfulness - brevity) / 4,),
        temperature=2.0,
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


def api(token=None, rows=score_rows, deadline_s=5.0, **limits):
    config = ScoringConfig(**limits)
    service = ScoringService(
        rows,
        describe_model(CARD, config, "f00d", {"torch": "2"}),
        admission=Admission(config.max_pending_rows),
        cache=ScoreCache(config.cache_entries),
        deadline_s=deadline_s,
    )
    return build_api(service, token=token, replica="r1")


def chatml(response):
    """A conversation as a trainer renders it; None stops where the assistant speaks."""
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    return prompt if response is None else f"{prompt}{response}<|im_end|>\n"


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
    # 1 and -3/2 against 5/4 and -3/4 of the mean held-out response; together the reward minus its mean, -1/2 - 1/2.
    assert answer["scores"][0]["contributions"] == {"helpfulness": -0.25, "brevity": -0.75}
    assert ask("GET", "/v1/model").json()["mean_contributions"] == {"helpfulness": 1.25, "brevity": -0.75}
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
    # Scores (2, -3) against (1, -5): D = (1, 2), E = 1/2 + 2/2, Var = (1 - 2)^2 / 16; the temperature is 2.
    assert (answer["margin"], answer["margin_std"]) == (1.5, 0.25)
    assert answer["probability"] == pytest.approx(1 / (1 + math.exp(-1.5 / math.sqrt(4 + math.pi / 8 / 16))))
    assert answer["contributions"] == {"helpfulness": 0.5, "brevity": 1.0}
    assert (answer["preferred"], answer["decided_by"], answer["confident"]) == ("a", "brevity", True)
    assert answer["b"]["reward"] == -2.0


def test_an_objective_that_held_out_pairs_did_not_verify_is_no_reason():
    # Scores (2, -3) against (1, -3): helpfulness decides, and nothing says that it means what it is named after.
    answer = ask("POST", "/v1/compare", {"prompt": "hi", "a": "a b", "b": "abc"}).json()
    assert answer["contributions"] == {"helpfulness": 0.5, "brevity": 0.0}
    assert (answer["preferred"], answer["decided_by"]) == ("a", None)
    assert not answer["confident"]  # the log-odds are 1/4, and the threshold is 1/2
    assert ask("GET", "/v1/model").json()["verified_objectives"] == ["brevity"]


def test_ratings_are_scores_on_the_annotators_own_scale():
    [score] = ask("POST", "/v1/score", {"prompt": "hi", "responses": ["a b"]}).json()["scores"]
    # Scores 2 and -3 at two units a standard deviation; annotations with mean 3 and 2, standard deviation 1 and 0.5.
    assert score["ratings"] == {"helpfulness": 3.0 + 1.0 * 2 / 2, "brevity": 2.0 + 0.5 * -3 / 2}


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
    assert answer["objective_statistics"]["brevity"] == {"mean": 2.0, "std": 0.5, "source": ""}
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
        {"prompt": "hi", "responses": ["x" * 1_000_001]},
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


def test_what_fails_inside_stays_inside(caplog):
    answer = ask("POST", "/v1/score", {"prompt": "hi", "responses": ["break"]})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the service failed; its log says why"}
    assert "a secret" in caplog.text


def test_a_reward_that_is_no_number_is_told():
    answer = ask("POST", "/v1/score", {"prompt": "hi", "responses": ["overflow"]})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the model gave a reward of nan with a standard deviation of 0.0"}


def test_a_request_that_is_too_large_is_refused_unread():
    app = api(max_request_bytes=1000)
    body = {"prompt": "hi", "responses": ["x" * 1000]}
    answer = ask("POST", "/v1/score", body, app=app)
    assert answer.status_code == 413
    assert "cluster.scoring.max_request_bytes" in answer.json()["detail"]
    assert ask("POST", "/v1/score", body, app=app, headers={"content-length": "-1"}).status_code == 413


def test_a_request_that_hides_its_size_is_cut_off():
    async def endless():
        while True:
            yield b" " * 500

    answer = ask("POST", "/v1/score", app=api(max_request_bytes=1000), content=endless())
    assert answer.status_code == 413


def test_more_rows_than_a_request_may_hold_are_refused():
    items = [{"prompt": "hi", "responses": ["x", "y"]}] * 3
    answer = ask("POST", "/v1/score", {"items": items}, app=api(max_rows_per_request=5))
    assert answer.status_code == 422
    assert "6 responses in one request, at most 5" in answer.json()["detail"]


def test_a_full_replica_says_when_to_come_back_and_then_serves():
    async def exchange():
        release = asyncio.Event()

        async def slow_rows(rows):
            await release.wait()
            return await score_rows(rows)

        transport = httpx.ASGITransport(app=api(rows=slow_rows, max_pending_rows=3))
        async with httpx.AsyncClient(transport=transport, base_url="http://vrm") as client:
            first = asyncio.create_task(client.post("/v1/score", json={"prompt": "hi", "responses": ["a", "b", "c"]}))
            await asyncio.sleep(0.05)
            refused = await client.post("/v1/score", json={"prompt": "hi", "responses": ["y"]})
            busy = await client.get("/readyz")
            healthy = await client.get("/healthz")
            release.set()
            served = await first
            again = await client.post("/v1/score", json={"prompt": "hi", "responses": ["x"]})
        return refused, busy, healthy, served, again

    refused, busy, healthy, served, again = asyncio.run(exchange())
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert (busy.status_code, busy.json(), healthy.status_code) == (503, {"status": "busy"}, 200)
    assert (served.status_code, again.status_code) == (200, 200)


def test_what_was_scored_before_is_not_scored_again():
    scored = []

    async def counted(rows):
        scored.append(rows[1])
        return await score_rows(rows)

    app = api(rows=counted)
    first = ask("POST", "/v1/score", {"prompt": "hi", "responses": ["a", "b b", "a"]}, app=app).json()
    assert [score["reward"] for score in first["scores"]] == [0.0, -0.5, 0.0]
    ask("POST", "/v1/best_of", {"prompt": "hi", "responses": ["c", "b b"]}, app=app)
    # As a message it is the same prompt; another one makes other rows.
    ask("POST", "/v1/compare", {"prompt": [{"role": "user", "content": "hi"}], "a": "c", "b": "a"}, app=app)
    ask("POST", "/v1/compare", {"prompt": "ho", "a": "c", "b": "a"}, app=app)
    assert scored == [["a", "b b"], ["c"], ["c", "a"]]


def test_a_refused_row_is_not_remembered():
    app = api()
    for _ in range(2):
        assert ask("POST", "/v1/score", {"prompt": "hi", "responses": ["refuse"]}, app=app).status_code == 422


def test_an_answer_that_takes_too_long_is_given_up():
    async def never(rows):
        await asyncio.sleep(60)

    answer = ask("POST", "/v1/score", {"prompt": "hi", "responses": ["x"]}, app=api(rows=never, deadline_s=0.01))
    assert answer.status_code == 504
    assert "1 responses were not scored within 0.01 s" in answer.json()["detail"]


def test_a_monitor_sees_requests_rows_and_rewards():
    app = api(token="secret")
    auth = {"authorization": "Bearer secret"}
    for responses in (["a b", "abcd"], ["a b"]):
        ask("POST", "/v1/score", {"prompt": "hi", "responses": responses}, app=app, headers=auth)
    ask("POST", "/v1/score", {"prompt": "hi", "responses": ["break"]}, app=app, headers=auth)
    ask("POST", "/v1/score", {}, app=app)
    ask("GET", "/no/such/path", app=app)
    lines = ask("GET", "/metrics", app=app).text.splitlines()
    assert {
        'vrm_requests_total{replica="r1",route="/v1/score",status="200"} 2.0',
        'vrm_requests_total{replica="r1",route="/v1/score",status="401"} 1.0',
        'vrm_requests_total{replica="r1",route="/v1/score",status="500"} 1.0',
        'vrm_requests_total{replica="r1",route="other",status="404"} 1.0',
        'vrm_request_seconds_count{replica="r1",route="/v1/score"} 4.0',
        'vrm_cache_lookups_total{replica="r1",result="hit"} 1.0',
        'vrm_cache_lookups_total{replica="r1",result="miss"} 3.0',
        'vrm_cache_entries{replica="r1"} 2.0',
        'vrm_pending_rows{replica="r1"} 0.0',
        'vrm_reward_count{replica="r1"} 2.0',
        'vrm_reward_sum{replica="r1"} -2.0',
        'vrm_reward_std_sum{replica="r1"} 2.5',
        'vrm_model_info{fingerprint="f00d",head="vrm",replica="r1"} 1.0',
    } <= set(lines)


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_secret():
    answer = ask("GET", "/", app=api(token="secret"))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    addresses = re.findall(r"https?://[^\s\"'<>]+", answer.text)
    assert addresses == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<(link|img|iframe)|@import|url\(|innerHTML|src=", answer.text)
    assert "secret" not in answer.text


def test_the_page_asks_for_fields_that_the_answer_has():
    text = ask("GET", "/").text
    answer = ask("POST", "/v1/compare", {"prompt": "hi", "a": "a b", "b": "abcde"}).json()
    for field in re.findall(r"\banswer\.(\w+)", text):
        assert field in answer or field in {"a", "b", "ok", "json", "statusText"}, field
    for field in re.findall(r"\banswer\.[ab]\.(\w+)|\{reward, (reward_std)", text):
        assert "".join(field) in answer["a"], field
    for field in re.findall(r"\bmodel\.(\w+)", text):
        assert field in ask("GET", "/v1/model").json(), field


def test_the_interface_is_described_in_openapi():
    paths = ask("GET", "/openapi.json").json()["paths"]
    assert {"/v1/score", "/v1/compare", "/v1/best_of", "/v1/model", "/healthz", "/readyz"} <= paths.keys()
    assert json.dumps(paths["/v1/score"]).count("ScoreManyRequest")


def test_only_a_sum_over_objectives_gives_reasons():
    """A `bt_aux` predicts annotations well, but its reward does not come from them."""
    described = [
        describe_model(card, ScoringConfig(), "f00d", {})
        for card in (CARD, CARD.model_copy(update={"head": "bt_aux", "mean_contributions": ()}))
    ]
    assert [model.verified_objectives for model in described] == [["brevity"], []]
