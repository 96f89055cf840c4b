"""Report and comparison in a browser: they fit narrow and wide screens, can be read, and fetch nothing."""

import pytest

from pipeline.benchmark.policy_comparison.contest import build_contest
from pipeline.reporting.report import report_page
from tests.benchmark.policy_comparison.policies import ALIGNED, BASE, answers_of, judged
from tests.reporting.test_comparison_page import page_of
from tests.reporting.test_report import CONTRIBUTIONS, FIDELITY, kept, report
from tests.support.browser import CHROMIUM, CONTRAST

pytestmark = [
    pytest.mark.components,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]

SOURCE_METRICS = (
    "pairs",
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "nll",
    "nll_low",
    "nll_high",
    "longer_is_better",
)


RUNS_INTO_ITS_NEIGHBOUR = """
[...document.querySelectorAll('.finding strong, .bar-row > span, .level')]
  .some(node => node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== 'inline')
"""


def test_a_report_fits_the_screen_and_its_verdict_stands_first(browser, tmp_path, artefacts):
    source = dict.fromkeys((f"eval/source/{'a' * 30}/{name}" for name in SOURCE_METRICS), 0.5)
    reward = report().reward_metrics | FIDELITY | CONTRIBUTIONS | {"alarm/scale": 1.0, "eval/scale": 71.0} | source
    worse = report().benchmark_metrics | {"reward/high": 0.49}
    rows = [{"step": s, "reward/mean": s % 7 / 7, "kl/per_response": 1.5, "gate/max": 1e-6} for s in range(40)]
    page = tmp_path / "report.html"
    over_time = tuple(kept(updates, a="word " * 60, b="x" * 200, c="short") for updates in (0, 12, 24))
    data = report(
        reward_metrics=reward, benchmark_metrics=worse, alignment_rows=rows, over_time=over_time, gold=lambda *_: 3.0
    )
    page.write_text(report_page(data))
    browser.open(page.as_uri())
    levels = "[...document.querySelectorAll('.finding strong')].map(level => level.textContent)"
    assert browser.evaluate(levels) == ["good", "unsure", "bad", "unsure"]
    widths = "[...document.querySelectorAll('#reasons ~ .bar-row .bar')].map(bar => bar.getBoundingClientRect().width)"
    by_score, by_annotations = browser.evaluate(widths)
    assert by_score / by_annotations == pytest.approx(0.8, rel=1e-3)
    browser.evaluate("for (const hidden of document.querySelectorAll('details')) hidden.open = true")
    require_readable(browser, artefacts, "report")


def test_a_comparison_fits_the_screen_and_opens_with_its_summary(browser, tmp_path, artefacts):
    contest = build_contest([BASE, ALIGNED, answers_of("a-third-one-with-a-long-name", [0.0] * 4, output="x" * 200)])
    page = tmp_path / "comparison.html"
    page.write_text(page_of(contest, [judged([2.0, 2.0, 2.0, 1.5])]))
    browser.open(page.as_uri())
    assert browser.evaluate("document.querySelector('h2').textContent") == "Summary"
    levels = "[...document.querySelectorAll('.finding strong')].map(level => level.textContent)"
    assert browser.evaluate(levels) == ["unsure", "unsure", "bad"]
    browser.evaluate("""(() => {
      const search = document.querySelector(".search");
      search.value = "an answer"; search.dispatchEvent(new Event("input"));
    })()""")
    assert browser.evaluate("document.querySelector('.shown').textContent") == "4 prompts"
    require_readable(browser, artefacts, "comparison")


def require_readable(browser, artefacts, name):
    """Nothing sticks out or runs into its neighbour, text has contrast, and nothing is fetched."""
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        for width in (1280, 390):
            browser.resize(width)
            assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
            assert not browser.evaluate(RUNS_INTO_ITS_NEIGHBOUR)
            browser.photograph(artefacts / f"{name}-{width}-{scheme}.png")
        assert browser.evaluate(CONTRAST) >= 4.5
    assert [address for address in browser.requested if not address.startswith(("file:", "data:"))] == []
    assert browser.complaints == []
