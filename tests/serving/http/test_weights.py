"""`/v1/score` with `weights`: users steer a reward without training."""

import asyncio

import httpx
import pytest

from pipeline.errors import DataError
from pipeline.serving.client import AsyncVRMScorer
from tests.serving.http.test_app import ask

BODY = {"prompt": "what of the saw ?", "responses": ["do check another source .", "skip the boring checks ."]}


def scores(app, **weights):
    answer = ask("POST", "/v1/score", BODY | ({"weights": weights} if weights else {}), app=app)
    return answer.status_code, answer.json()


def test_equal_weights_change_nothing_and_others_renormalise(trained_api):
    _, own = scores(trained_api)
    names = list(own["scores"][0]["objective_weights"])
    assert scores(trained_api, **dict.fromkeys(names, 3.0)) == (200, own)
    _, steered = scores(trained_api, **{names[0]: 3.0})
    for new, old in zip(steered["scores"], own["scores"], strict=True):
        w = old["objective_weights"]
        total = 1.0 + 2.0 * w[names[0]]
        expected = {name: w[name] * (3.0 if name == names[0] else 1.0) / total for name in names}
        assert new["objective_weights"] == pytest.approx(expected, rel=1e-5)
        assert new["reward"] == pytest.approx(sum(expected[n] * old["objective_scores"][n] for n in names), abs=1e-5)
        mean = ask("GET", "/v1/model", app=trained_api).json()["reward_mean"]
        assert sum(new["contributions"].values()) == pytest.approx(new["reward"] - mean, abs=1e-4)


def test_an_unknown_objective_is_refused_by_name(trained_api):
    status, answer = scores(trained_api, kindness=2.0)
    assert status == 422
    assert "weights name 'kindness', which is no objective of this model" in answer["detail"]
    assert scores(trained_api, safety=-1.0)[0] == 422


def test_the_client_passes_the_weights_on(trained_api):
    async def asked(**weights):
        async with AsyncVRMScorer("http://vrm", transport=httpx.ASGITransport(trained_api)) as client:
            return await client.score(BODY["prompt"], BODY["responses"], weights=weights)

    _, expected = scores(trained_api, safety=3.0)
    assert [s.reward for s in asyncio.run(asked(safety=3.0)).scores] == [s["reward"] for s in expected["scores"]]
    with pytest.raises(DataError, match="'kindness'"):
        asyncio.run(asked(kindness=3.0))
