"""The page of the scoring service in a browser, beside what the service says over HTTP."""

import json

import httpx
import pytest

from tests.support.browser import CHROMIUM, CONTRAST
from tests.support.http_server import serving

pytestmark = [
    pytest.mark.components,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]

VERIFIED = ("helpfulness", "honesty", "safety")
PROMPT = "is the ladder dangerous near home ?"
A = "wear gloves and take your time . ask an expert if unsure . keep children far away ."
B = "ignore the warnings on the label . skip the boring checks . rules are for other people ."

CHART = """
[...document.querySelectorAll("#%s rect")].map((rect, i) => ({
  name: document.querySelectorAll("#%s text:not(.quiet)")[i].textContent,
  value: document.querySelectorAll("#%s text.quiet")[i].textContent,
  width: Number(rect.getAttribute("width")),
  fill: rect.getAttribute("fill"),
}))
"""

RATINGS = """
[...document.querySelectorAll("#ratings tbody tr")].map(row => [...row.children].map(cell => cell.textContent))
"""

DRAWN_IN_THE_PIXELS_THERE_ARE = """
[...document.querySelectorAll("svg")].every(svg => svg.viewBox.baseVal.width === svg.parentElement.clientWidth)
"""


@pytest.fixture(scope="module")
def url(trained_api):
    with serving(trained_api) as url:
        yield url


def signed(value):
    return ("−" if value < 0 else "+") + f"{abs(value):.3f}"


def test_the_page_shows_what_the_service_says(url, browser, artefacts):
    answer = httpx.post(f"{url}/v1/compare", json={"prompt": PROMPT, "a": A, "b": B}).json()
    model = httpx.get(f"{url}/v1/model").json()
    assert model["reward_mean"] != 0.0
    browser.open(url)
    browser.wait_for("document.getElementById('model').textContent.includes('fingerprint')")  # before any comparison
    introduced = browser.evaluate("document.getElementById('model').textContent")
    assert "A vrm model, fingerprint f00d." in introduced
    assert "helpfulness (81%), honesty (70%), safety (66%). It cannot tell why by brevity." in introduced
    for element, text in (("prompt", PROMPT), ("a", A), ("b", B)):
        browser.type_into(element, text)
    browser.evaluate("document.getElementById('ask').click()")
    browser.wait_for("!document.getElementById('result').hidden")

    def text(element):
        return browser.evaluate(f"document.getElementById('{element}').textContent")

    def chart(element):
        return browser.evaluate(CHART % ((element,) * 3))

    better, sure = answer["preferred"].upper(), 100 * max(answer["probability"], 1 - answer["probability"])
    because = "" if answer["decided_by"] is None else f", because of {answer['decided_by']}"
    unsure = "" if answer["confident"] else " That is too unsure to count as an answer."
    assert text("verdict") == f"{better} is better with probability {sure:.1f}%{because}.{unsure}"
    assert [row["value"] for row in chart("rewards")] == [
        f"{signed(answer[side]['reward'] - model['reward_mean'])} ± {1.96 * answer[side]['reward_std']:.3f}"
        for side in "ab"
    ]
    weights = answer["a"]["objective_weights"]
    drawn = chart("weights")
    assert [(row["name"], row["value"]) for row in drawn] == [(k, f"{100 * weights[k]:.1f}%") for k in VERIFIED]
    scale = drawn[0]["width"] / weights[VERIFIED[0]]
    assert [row["width"] for row in drawn] == pytest.approx([scale * weights[k] for k in VERIFIED], rel=1e-6)
    margins = chart("margins")
    assert [row["value"] for row in margins] == [signed(answer["contributions"][k]) for k in VERIFIED]
    assert [row["name"] for row in margins] == [
        "helpfulness (81% right)",
        "honesty (70% right)",
        "safety (66% right)",
    ]
    assert browser.evaluate(RATINGS) == [
        [
            f"{name} (scale of planted)",
            *(f"{answer[side]['ratings'][name]:.1f}" for side in "ab"),
            f"{statistics['mean']:.1f}",
        ]
        for name, statistics in model["objective_statistics"].items()
        if name in VERIFIED
    ]
    assert text("unverified").startswith("This model cannot tell what brevity contributed")
    assert [row["fill"] for row in margins] == [
        f"var(--{'b' if answer['contributions'][k] < 0 else 'a'})" for k in VERIFIED
    ]
    assert "fingerprint f00d" in text("model")
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        for width in (1280, 390):
            browser.resize(width)
            browser.wait_for(DRAWN_IN_THE_PIXELS_THERE_ARE)
            browser.photograph(artefacts / f"page-{width}-{scheme}.png")
            assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
        assert browser.evaluate(CONTRAST) >= 4.5
    assert {address.removeprefix(url) for address in browser.requested} == {"/", "/v1/compare", "/v1/model"}
    assert browser.complaints == []
    browser.evaluate(f"show({json.dumps(answer | {'probability': 0.99996})})")
    assert "with probability over 99.9%" in text("verdict")  # nothing is certain


def test_the_page_says_why_it_was_refused(url, browser):
    browser.open(url)
    for element in ("prompt", "a", "b"):
        browser.type_into(element, "x" if element == "prompt" else "y" * 1_000_001)
    browser.evaluate("document.getElementById('ask').click()")
    browser.wait_for("document.getElementById('problem').textContent !== ''")
    assert "at most 1000000 characters" in browser.evaluate("document.getElementById('problem').textContent")
    assert browser.evaluate("document.getElementById('result').hidden")


def test_examples_are_compared_at_a_click_and_earlier_comparisons_come_back(url, browser):
    browser.open(url)
    earlier = "document.querySelectorAll('#history button').length"
    for i in range(2):
        browser.evaluate(f"document.querySelectorAll('#examples button')[{i}].click()")
        browser.wait_for(f"{earlier} === {i + 1}")
    assert browser.evaluate("document.getElementById('prompt').value").startswith("What will the price of gold")
    first = browser.evaluate("document.querySelector('#history li:last-child').textContent")
    browser.evaluate("document.querySelector('#history li:last-child button').click()")
    assert browser.evaluate("document.getElementById('prompt').value").startswith("Can I mix bleach")
    assert first.startswith(browser.evaluate("document.getElementById('verdict').textContent"))
    assert browser.evaluate(earlier) == 2  # to look again is no new comparison
    assert browser.complaints == []


def test_the_page_of_routes_lists_them_all_with_their_forms(url, browser, artefacts):
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    browser.open(f"{url}/docs")
    browser.wait_for("document.querySelectorAll('#routes h2').length > 0")
    titles = browser.evaluate("[...document.querySelectorAll('#routes h2')].map(title => title.textContent)")
    assert titles == [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    told = browser.evaluate("document.body.textContent")
    assert "The score is the sigmoid of the reward, between 0 and 1" in told
    assert "use_activation: boolean or null" in told
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.resize(390)
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        assert browser.evaluate(CONTRAST) >= 4.5
        browser.photograph(artefacts / f"docs-390-{scheme}.png")
    assert {address.removeprefix(url) for address in browser.requested} == {"/docs", "/openapi.json"}
    assert browser.complaints == []
