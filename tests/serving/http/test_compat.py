"""The forms in which other trainers ask for rewards."""

import asyncio
import base64
import contextlib
import importlib.util
import json
import logging
import math
import random
import socket
import struct
import sys
import threading
import types
from pathlib import Path

import pytest
import uvicorn

from tests.serving.http.test_app import api, ask, chatml

# words_and_letters: (words - messages) / 2.
SHORT, LONG = "a b", "abcdef"  # -0.5 and -2.5


def test_openrlhf_gets_one_reward_per_query():
    body = {"query": [chatml(SHORT), chatml(LONG)], "prompts": [chatml(None)] * 2, "labels": [None, "x"]}
    answer = ask("POST", "/get_reward", body).json()
    assert answer["rewards"] == answer["scores"] == [-0.5, -2.5]
    assert answer["extra_logs"] == {
        "vrm/reward_std": [1.25, 1.75],
        "vrm/helpfulness": [1.0 - 1.25, 0.5 - 1.25],  # above the mean held-out response
        "vrm/brevity": [-1.5 + 0.75, -3.0 + 0.75],
    }
    assert answer["model_fingerprint"] == "f00d"


def test_openrlhf_without_a_chat_template_marks_the_response_by_its_prompt():
    answer = ask("POST", "/get_reward", {"query": ["hi: a b</s>"], "prompts": ["hi: "], "labels": [None]})
    assert answer.json()["rewards"] == [-0.5]


def test_openrlhf_can_only_put_the_token_into_the_url():
    app, body = api(token="secret"), {"query": [chatml(SHORT)], "prompts": [chatml(None)], "labels": [None]}
    assert ask("POST", "/get_reward", body, app=app).status_code == 401
    assert ask("POST", "http://vrm:secret@vrm/get_reward", body, app=app).status_code == 200


def test_a_query_without_a_border_is_refused():
    answer = ask("POST", "/get_reward", {"query": ["who said what?"]})
    assert answer.status_code == 422
    assert "says where the response begins" in answer.json()["detail"]


def test_vllm_classifies_into_one_class_whose_logit_is_the_reward():
    """What verl's reward loop reads: output["data"][-1]["probs"][-1]."""
    body = {"model": "any", "input": chatml(SHORT), "use_activation": False, "priority": 3}
    answer = ask("POST", "/classify", body).json()
    assert answer["data"] == [{"index": 0, "label": "LABEL_0", "probs": [-0.5], "num_classes": 1}]
    assert (answer["object"], answer["model"]) == ("list", "f00d")


def test_many_inputs_keep_their_order_and_messages_need_no_markup():
    many = ask("POST", "/classify", {"input": [chatml(LONG), chatml(SHORT)], "use_activation": False}).json()
    assert [item["probs"] for item in many["data"]] == [[-2.5], [-0.5]]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": LONG}]
    assert ask("POST", "/classify", {"messages": messages, "activation": False}).json()["data"][0]["probs"] == [-2.5]


def test_vllms_default_is_a_sigmoid():
    answer = ask("POST", "/classify", {"input": chatml(SHORT)}).json()
    assert answer["data"][0]["probs"] == [pytest.approx(0.3775406688)]


def test_a_very_bad_response_has_probability_nearly_zero():
    answer = ask("POST", "/classify", {"input": chatml("x" * 9000)}).json()
    assert answer["data"][0]["probs"] == [0.0]


def test_pooling_is_a_vector_of_one():
    body = {"input": chatml(SHORT), "use_activation": False}
    assert ask("POST", "/pooling", body).json()["data"] == [{"index": 0, "object": "pooling", "data": [-0.5]}]
    encoded = ask("POST", "/pooling", body | {"encoding_format": "base64"}).json()["data"][0]["data"]
    assert struct.unpack("<f", base64.b64decode(encoded)) == (-0.5,)


@pytest.mark.parametrize(
    "names", [("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")]
)
def test_pairs_go_by_any_of_vllms_names(names):
    one, two = names
    answer = ask("POST", "/score", {one: "hi", two: [SHORT, LONG], "use_activation": False}).json()
    assert answer["data"] == [
        {"index": 0, "object": "score", "score": -0.5},
        {"index": 1, "object": "score", "score": -2.5},
    ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]}),
        ("/score", {"queries": ["a", "b"]}),
        ("/score", {"queries": "a", "documents": []}),
        ("/score", {"queries": "a", "documents": [{"content": []}]}),
        ("/classify", {}),
        ("/classify", {"input": [1, 2, 3]}),
        ("/classify", {"input": "plain words"}),
        ("/classify", {"messages": [{"role": "user", "content": "x"}]}),
        ("/classify", {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]}),
        ("/pooling", {"input": "x", "encoding_format": "bytes"}),
        ("/pooling", {"input": "x", "task": "embed"}),
        ("/get_reward", {"query": []}),
        ("/get_reward", {"query": "x"}),
        ("/get_reward", {"query": ["x"], "prompts": ["x", "y"]}),
    ],
)
def test_what_cannot_be_scored_is_refused_with_a_reason(path, body):
    answer = ask("POST", path, body)
    assert answer.status_code == 422
    assert answer.json()["detail"]


WHOLE = {
    "/v1/score": {"prompt": "hi", "responses": ["a"]},
    "/v1/compare": {"prompt": "hi", "a": "x", "b": "y"},
    "/v1/best_of": {"prompt": "hi", "responses": ["a"], "lcb": 1},
    "/get_reward": {"query": [chatml("a")], "prompts": [chatml(None)]},
    "/classify": {"input": chatml("a")},
    "/pooling": {"input": chatml("a")},
    "/score": {"queries": "a", "documents": ["b"]},
}
FIELDS = [
    *dict.fromkeys(field for body in WHOLE.values() for field in body),
    "items",
    "messages",
    "role",
    "content",
    "\ud800",
]
LEAVES = [None, True, -1, 10**400, math.nan, math.inf, "", "user", "\ud800", "\0", chatml(None), "<|im_start|>" * 50]


def anything(rng, depth=0):
    kind = rng.randrange(3) if depth < 4 else 0
    if kind == 0:
        return rng.choice(LEAVES)
    if kind == 1:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(FIELDS): anything(rng, depth + 1) for _ in range(rng.randrange(5))}


@pytest.mark.parametrize("path", WHOLE)
def test_no_request_however_mangled_breaks_the_service(path):
    rng, app = random.Random(path), api()
    for _ in range(50):
        body = WHOLE[path] | {rng.choice(FIELDS): anything(rng) for _ in range(rng.randrange(3))}
        raw = bytearray(json.dumps(body).encode())
        for _ in range(rng.randrange(3)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        answer = ask("POST", path, bytes(raw), app=app, headers={"content-type": "application/json"})
        assert answer.status_code in {200, 400, 422}, bytes(raw)
        assert answer.json()


@pytest.mark.components
def test_vllms_own_classes_write_the_requests_and_read_the_answers():
    """vLLM takes ten seconds to import, hence the marker."""
    classify = pytest.importorskip("vllm.entrypoints.pooling.classify.protocol")
    pooling = pytest.importorskip("vllm.entrypoints.pooling.pooling.protocol")
    scoring = pytest.importorskip("vllm.entrypoints.pooling.scoring.protocol")
    text = {"input": chatml(SHORT)}
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": SHORT}]}
    app, sigmoid = api(), pytest.approx(0.3775406688)
    for path, asks, fields, answers in (
        ("/classify", classify.ClassificationCompletionRequest, text, classify.ClassificationResponse),
        ("/classify", classify.ClassificationChatRequest, chat, classify.ClassificationResponse),
        ("/pooling", pooling.PoolingCompletionRequest, text, pooling.PoolingResponse),
        ("/pooling", pooling.PoolingChatRequest, chat, pooling.PoolingResponse),
        ("/score", scoring.ScoreQueriesDocumentsRequest, {"queries": "hi", "documents": SHORT}, scoring.ScoreResponse),
        ("/score", scoring.ScoreQueriesItemsRequest, {"queries": "hi", "items": [SHORT]}, scoring.ScoreResponse),
        ("/score", scoring.ScoreTextRequest, {"text_1": ["hi"], "text_2": [SHORT]}, scoring.ScoreResponse),
        ("/score", scoring.ScoreDataRequest, {"data_1": "hi", "data_2": SHORT}, scoring.ScoreResponse),
    ):
        # With every field of theirs, those included that mean nothing here.
        answer = ask("POST", path, asks.model_validate(fields).model_dump(mode="json"), app=app).json()
        theirs = answers.model_validate(answer)
        assert theirs.model_extra == {}
        assert json.loads(theirs.model_dump_json()) == answer
        item = theirs.data[0].model_dump()
        assert item.get("score", item.get("probs", item.get("data"))) in (sigmoid, [sigmoid])


@contextlib.contextmanager
def listening(app):
    """The application on a port of this machine; yields host:port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_openrlhfs_own_client_reads_the_rewards(monkeypatch):
    """Its rollout agent, loaded from its file: importing the package would ask for its GPU libraries."""
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs openrlhf's files (0.11.2 was tried): pip install --no-deps openrlhf")
    silent = types.SimpleNamespace(init_logger=logging.getLogger)
    monkeypatch.setitem(sys.modules, "openrlhf", types.ModuleType("openrlhf"))
    monkeypatch.setitem(sys.modules, "openrlhf.utils", types.ModuleType("openrlhf.utils"))
    monkeypatch.setitem(sys.modules, "openrlhf.utils.logging_utils", silent)
    file = Path(package.submodule_search_locations[0], "utils", "agent.py")
    spec = importlib.util.spec_from_file_location("openrlhf_agent", file)
    agent = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agent)
    with listening(api(token="secret")) as address:
        executor = agent.SingleTurnAgentExecutor([f"http://vrm:secret@{address}/get_reward"])
        answers = asyncio.run(
            executor._fetch_rewards_via_http([chatml(SHORT), chatml(LONG)], [chatml(None)] * 2, [None, "x"])
        )
    assert [answer["rewards"] for answer in answers] == [[-0.5, -2.5]]
    assert answers[0]["extra_logs"]["vrm/reward_std"] == [1.25, 1.75]
