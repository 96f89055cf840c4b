"""The report in a browser: it fits narrow and wide screens and fetches nothing."""

import contextlib
import os
from pathlib import Path

import pytest

from pipeline.reporting.report import report_page
from tests.reporting.test_report import CONTRIBUTIONS, FIDELITY, kept, report
from tests.support.browser import CHROMIUM, Browser

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


def test_a_report_fits_the_screen_and_its_verdict_stands_first(tmp_path):
    source = dict.fromkeys((f"eval/source/{'a' * 30}/{name}" for name in SOURCE_METRICS), 0.5)
    reward = report().reward_metrics | FIDELITY | CONTRIBUTIONS | {"alarm/scale": 1.0, "eval/scale": 71.0} | source
    worse = report().benchmark_metrics | {"reward/high": 0.49}
    page = tmp_path / "report.html"
    over_time = tuple(kept(updates, a="word " * 60, b="x" * 200, c="short") for updates in (0, 12, 24))
    page.write_text(report_page(report(reward_metrics=reward, benchmark_metrics=worse, over_time=over_time)))
    photographs = Path(os.environ.get("VRM_TEST_ARTEFACTS", tmp_path))
    with contextlib.closing(Browser(tmp_path / "profile")) as browser:
        browser.open(page.as_uri())
        levels = "[...document.querySelectorAll('.finding strong')].map(level => level.textContent)"
        assert browser.evaluate(levels) == ["good", "unsure", "bad", "unsure"]
        widths = "[...document.querySelectorAll('.bar')].map(bar => bar.getBoundingClientRect().width)"
        by_score, by_annotations = browser.evaluate(widths)
        assert by_score / by_annotations == pytest.approx(0.8, rel=1e-3)
        for width in (1280, 390):
            browser.resize(width)
            assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
            browser.photograph(photographs / f"report-{width}.png")
        assert [address for address in browser.requested if not address.startswith(("file:", "data:"))] == []
        assert browser.complaints == []
