"""Style control against its formula, scikit-learn and public judgments."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.benchmark.arena_hard.style_control import (
    StyleFeatures,
    markdown_counts,
    style_controlled_win_rates,
    style_features,
)
from pipeline.benchmark.arena_hard.win_rates import bradley_terry_win_rates
from pipeline.errors import DataError
from tests.benchmark.arena_hard.battle_rows import SHARED, battle, needs_public_data, public_battles


def test_markdown_is_counted_outside_fenced_code():
    answer = (
        "# Title\n## Part\n### \n#no\n1. one\n 2. two\n- a\n* b\n+ c\n**bold** and __too__ ** no\n```\n# x\n- y\n```\n"
    )
    assert markdown_counts(answer) == {
        "header_count": {"h1": 1, "h2": 1, "h3": 1, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 1, "__": 1},
    }
    assert style_features(answer, num_tokens=40) == StyleFeatures(tokens=40, headers=3, lists=5, bolds=2)


def test_at_equal_styles_style_control_is_the_win_rate():
    battles = [battle(float(n % 5 < 2), question_id=str(n)) for n in range(500)]
    styles = {
        (model, str(n)): StyleFeatures(tokens=n, headers=1, lists=0, bolds=2)
        for model in ("base", "m")
        for n in range(500)
    }
    plain = bradley_terry_win_rates(battles, "base", num_resamples=2)["m"]["win_rate"]
    for centred in (True, False):
        control = style_controlled_win_rates(battles, styles, "base", centred=centred, num_resamples=2)
        assert control.models["m"]["win_rate"] == pytest.approx(plain, abs=0.01)
        assert control.coefficients == {"tokens": 0, "headers": 0, "lists": 0, "bolds": 0}


def length_only_world(num_battles, seed=0):
    """The model writes longer answers, and length alone decides: logit P = 4 (t_m - t_b)/(t_m + t_b + 1)."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.lognormal(6.3, 0.5, num_battles).astype(int), rng.lognormal(6.0, 0.5, num_battles).astype(int)
    p_model = 1 / (1 + np.exp(-4 * (ours - theirs) / (ours + theirs + 1)))
    battles = [battle(float(loses), question_id=str(n)) for n, loses in enumerate(rng.random(num_battles) > p_model)]
    styles = {("m", str(n)): StyleFeatures(tokens=int(t), headers=0, lists=0, bolds=0) for n, t in enumerate(ours)}
    styles |= {
        ("base", str(n)): StyleFeatures(tokens=int(t), headers=0, lists=0, bolds=0) for n, t in enumerate(theirs)
    }
    return battles, styles


def test_where_only_length_decides_uncentred_control_finds_equals():
    battles, styles = length_only_world(20_000)
    plain = bradley_terry_win_rates(battles, "base", num_resamples=2)["m"]["win_rate"]
    centred, uncentred = (
        style_controlled_win_rates(battles, styles, "base", centred=c, num_resamples=2) for c in (True, False)
    )
    assert plain > 60
    # Upstream's centring leaves the model's average surplus of length in its favour.
    assert centred.models["m"]["win_rate"] > plain + 1
    assert uncentred.models["m"]["win_rate"] == pytest.approx(50, abs=1.0)
    assert centred.coefficients["tokens"] > 0


def test_an_answer_without_style_is_named():
    styles = {("base", "q"): StyleFeatures(tokens=1, headers=0, lists=0, bolds=0)}
    with pytest.raises(DataError, match="no answer of 'm' to question 'q' among the 1 answers given"):
        style_controlled_win_rates([battle(1.0)], styles, "base", centred=True)


@needs_public_data
def test_style_control_is_scikit_learns_regression_of_upstreams_doubled_rows():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    answers = pq.read_table(SHARED / "model_answer_wetzel.parquet").to_pylist()
    styles = {(a["model"], a["question_id"]): style_features(a["content"], num_tokens=a["token_len"]) for a in answers}
    models = sorted({model for model, _ in styles})
    battles = [b for b in public_battles("battles_wetzel_20240813.parquet") if b.model_b in models]
    ours = style_controlled_win_rates(battles, styles, "gpt-4-0314", centred=True, num_resamples=2)

    rows, wins = [], []
    for b in battles:
        one, other = styles[b.model_a, b.question_id], styles[b.model_b, b.question_id]
        gaps = [
            (getattr(one, e) - getattr(other, e)) / (getattr(one, e) + getattr(other, e) + 1)
            for e in ("tokens", "headers", "lists", "bolds")
        ]
        player = [math.log(10) * ((m == b.model_a) - (m == b.model_b)) for m in models]
        rows += [player + gaps] * 2
        wins += [1, 0] if b.outcome == 0.5 else [int(b.outcome)] * 2
    x = np.array(rows)
    x[:, 4:] = (x[:, 4:] - x[:, 4:].mean(axis=0)) / x[:, 4:].std(axis=0)
    theirs = linear_model.LogisticRegression(fit_intercept=False, C=1.0, tol=1e-8, max_iter=2000).fit(x, wins).coef_[0]
    for model, metrics in ours.models.items():
        gap = theirs[models.index("gpt-4-0314")] - theirs[models.index(model)]
        assert metrics["win_rate"] == pytest.approx(100 / (1 + 10**gap), abs=1e-3)
    assert list(ours.coefficients.values()) == pytest.approx(list(theirs[4:]), abs=1e-5)
