"""The page of kept rollouts: over HTTP, and in a browser at both widths and in both colour schemes."""

import pytest
from starlette.testclient import TestClient

from pipeline.errors import WorkerDied
from pipeline.rollouts.rollout_queries import RolloutQueries
from pipeline.serving.http.rollouts_app import build_rollouts_api
from pipeline.serving.protocol import ExplainedReward
from tests.rollouts.test_kept_rollouts import SCRIPT, batch, files_in, rollout
from tests.support.browser import CHROMIUM, CONTRAST
from tests.support.http_server import serving

TOKEN = "secret"
AGAIN = ExplainedReward(
    reward=9.5, reward_std=0.25, concentration=1.0, objective_weights={}, objective_scores={}, contributions={}
)


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """Three steps; in each prompt "a" has the best answer, and one answer is a script."""
    path = tmp_path_factory.mktemp("kept")
    files = files_in(path)
    for step in range(3):
        texts = {"a": f"good {step}", "b": SCRIPT, "c": "one two three four five six " * 40}
        texts |= {f"other {i}": f"answer {i}" for i in range(57)}
        rollouts = [
            rollout(
                name, 0, text, logprobs=(-1.0,) * (2 + (name == "c")), finish_reason="length" if name == "c" else "stop"
            )
            for name, text in texts.items()
        ]
        files.keep(batch(step, rollouts, [100.0 + step, 1.0, 2.0, *(0.01 * i for i in range(57))]))
    return RolloutQueries(str(path / "rollouts"))


def client_of(queries, rescore=None, token=TOKEN):
    api = build_rollouts_api(queries, title="align_policy-0123", token=TOKEN, rescore=rescore)
    return TestClient(api, headers={} if token is None else {"authorization": f"Bearer {token}"})


@pytest.mark.parametrize("token", [None, "wrong"])
def test_nothing_is_told_without_the_token(token, queries):
    client = client_of(queries, token=token)
    for path in ("/v1/summary", "/v1/rollouts", "/v1/rollouts/0/0"):
        assert client.get(path).status_code == 401
    assert client.post("/v1/rescore", json={"step": 0, "position": 0}).status_code == 401
    assert client.get("/openapi.json").status_code == 404
    page = client.get("/")
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]


def test_a_page_of_the_table(queries):
    client = client_of(queries)
    told = client.get("/v1/rollouts", params={"sort": "reward", "descending": True, "limit": 2, "text": "good"}).json()
    assert told["total"] == 3
    assert [(row["step"], row["response"], row["rewards"]) for row in told["rows"]] == [
        (2, "good 2", {"model": 102.0}),
        (1, "good 1", {"model": 101.0}),
    ]
    assert client.get("/v1/rollouts/2/0").json()["seed"] == "100"
    summary = client.get("/v1/summary").json()
    assert (summary["title"], summary["rollouts"], summary["steps"]) == ("align_policy-0123", 180, [0, 2])


@pytest.mark.parametrize(
    "asked", [{"sort": "response"}, {"limit": 1000}, {"offset": -1}, {"step_from": "soon"}, {"colour": "red"}]
)
def test_a_question_that_means_nothing_is_refused(asked, queries):
    assert client_of(queries).get("/v1/rollouts", params=asked).status_code == 422


def test_a_rollout_is_scored_again_by_the_service_that_is_connected(queries):
    asked = []
    client = client_of(queries, rescore=lambda messages, response: asked.append((messages, response)) or AGAIN)
    answer = client.post("/v1/rescore", json={"step": 1, "position": 0})
    assert answer.json()["reward"] == 9.5
    assert asked == [([{"role": "user", "content": "question a"}], "good 1")]
    missing = client.post("/v1/rescore", json={"step": 9, "position": 0})
    assert (missing.status_code, missing.json()["detail"]) == (404, "rollout 0 of step 9 was not kept")


def test_without_a_service_or_with_a_dead_one_the_answer_says_why(queries):
    def dead(messages, response):
        raise WorkerDied("http://127.0.0.1:8000 cannot be reached")

    unconnected = client_of(queries).post("/v1/rescore", json={"step": 1, "position": 0})
    assert unconnected.status_code == 409
    assert "vrm serve" in unconnected.json()["detail"]
    answer = client_of(queries, rescore=dead).post("/v1/rescore", json={"step": 1, "position": 0})
    assert (answer.status_code, answer.json()["detail"]) == (502, "http://127.0.0.1:8000 cannot be reached")


# ----------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def url(queries):
    api = build_rollouts_api(queries, title="align_policy-0123", token=TOKEN, rescore=lambda *_: AGAIN)
    with serving(api) as url:
        yield url


FIRST_ROW = "[...document.querySelectorAll('#rows tr:first-child td')].map(cell => cell.textContent)"


@pytest.mark.components
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
def test_the_page_sorts_searches_opens_and_scores_again_and_runs_no_script(url, browser, artefacts):
    def click(name):
        browser.evaluate(f"[...document.querySelectorAll('button')].find(b => b.textContent === '{name}').click()")

    def where(text):
        browser.wait_for(f"document.getElementById('where').textContent === '{text}'")

    browser.open(f"{url}/#{TOKEN}")
    where("1 to 50 of 180")
    assert browser.evaluate("location.hash") == ""
    click("Next")
    where("51 to 100 of 180")
    click("Highest reward")
    browser.wait_for(f"({FIRST_ROW})[2] === 'good 2'")
    assert browser.evaluate(FIRST_ROW)[3] == "102.000 ± 0.50"
    click("Longest")
    browser.wait_for(f"({FIRST_ROW})[9] === 'at the limit'")
    browser.type_into("text", "<script>")
    click("Show")
    where("1 to 3 of 3")
    assert browser.evaluate(FIRST_ROW)[2] == SCRIPT
    browser.evaluate("document.querySelector('#rows tr').click()")
    browser.wait_for("document.getElementById('one').open")
    assert browser.evaluate("document.getElementById('one_response').textContent") == SCRIPT
    bars = "[...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)"
    smaller, larger = browser.evaluate(bars)
    assert smaller / larger == pytest.approx(1.0 / 1.5, rel=1e-2)
    click("Score it again")
    browser.wait_for("document.getElementById('rescored').textContent.includes('9.500 ± 0.250')")
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            browser.resize(width)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            browser.photograph(artefacts / f"one-rollout-{width}-{scheme}.png")
    click("This prompt over time")
    browser.evaluate("document.getElementById('text').value = ''")
    click("Show")
    browser.wait_for("!document.getElementById('one_prompt').hidden")
    where("1 to 3 of 3")
    assert browser.evaluate("document.getElementById('prompt_id').textContent") == "b"
    click("All prompts")
    where("1 to 50 of 180")
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            browser.resize(width)
            assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
            assert browser.evaluate(CONTRAST) >= 4.5
            browser.photograph(artefacts / f"rollouts-{width}-{scheme}.png")
    assert browser.evaluate("document.title") == "Rollouts of align_policy-0123"
    assert [address for address in browser.requested if not address.startswith(url)] == []
    assert browser.complaints == []


@pytest.mark.components
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
def test_the_page_without_its_token_says_what_to_open(url, browser):
    browser.open(url)
    browser.wait_for("document.getElementById('problem').textContent.includes('whole address')")
