"""The report in a browser: it fits narrow and wide screens and fetches nothing."""

import pytest

from pipeline.reporting.report import report_page
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
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        for width in (1280, 390):
            browser.resize(width)
            assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
            assert not browser.evaluate(RUNS_INTO_ITS_NEIGHBOUR)
            browser.photograph(artefacts / f"report-{width}-{scheme}.png")
        assert browser.evaluate(CONTRAST) >= 4.5
    assert [address for address in browser.requested if not address.startswith(("file:", "data:"))] == []
    assert browser.complaints == []
