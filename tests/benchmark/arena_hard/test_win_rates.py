import csv
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.benchmark.arena_hard.files import ModelAnswer, read_answers, read_games, styles_of, write_answers
from pipeline.benchmark.arena_hard.win_rates import (
    Battle,
    Judgment,
    Style,
    count_failures,
    fit_logistic,
    markdown_counts,
    parse_verdict,
    style_controlled_win_rate,
    style_of,
    to_battles,
    win_rate,
)
from pipeline.errors import DataError
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "arena_hard"
needs_public_data = pytest.mark.skipif(not SHARED.exists(), reason="needs the public data folder beside the checkout")


def battle(outcome, model_a="base", model_b="m", question_id="q", weight=1):
    return Battle(question_id=question_id, model_a=model_a, model_b=model_b, outcome=outcome, weight=weight)


def judged(first, second, model="m", question_id="q"):
    return Judgment(question_id=question_id, model=model, baseline="base", judge="j", verdicts=(first, second))


# ----------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("text", "v0_1", "v2"),
    [
        ("My final verdict is: [[A>B]]", "A>B", "A>B"),
        ("[[A>B]] ... so again [[A>B]]", "A>B", "A>B"),
        ("at first [[A>B]], no: [[B>>A]]", None, "B>>A"),
        ("[A=B]", None, "A=B"),
        ("[[b>a]]", None, "B>A"),
        ("A is better", None, None),
        ("[[]]", None, None),
        ("[B>A] and then [[A>B]]", "A>B", "A>B"),
    ],
)
def test_each_edition_reads_verdicts_by_its_own_rules(text, v0_1, v2):
    assert (parse_verdict(text, "v0.1"), parse_verdict(text, "v2")) == (v0_1, v2)


@pytest.mark.parametrize(
    ("first", "second", "wins_of_the_model"),
    [("B>>A", "A>B", [(1.0, 3), (1.0, 1)]), ("A=B", "B>A", [(0.5, 1), (0.0, 1)]), ("A>>B", "A>>B", [(0, 3), (1, 3)])],
)
def test_a_clear_win_weighs_three_and_the_second_game_is_swapped(first, second, wins_of_the_model):
    battles = to_battles([judged(first, second)], "v0.1")
    assert [(1 - b.outcome, b.weight) for b in battles] == wins_of_the_model
    assert {(b.model_a, b.model_b) for b in battles} == {("base", "m")}


def test_golden_games_have_their_rates():
    # (B>>A, A>B) is four rows of 1; (A=B, B>A) is one of 0.5 and one of 0.
    battles = to_battles([judged("B>>A", "A>B", "x"), judged("A=B", "B>A", "y")], "v2")
    rates = win_rate(battles, "base", num_resamples=2)
    assert rates["x"]["win_rate"] == pytest.approx(100, abs=1e-3)
    assert rates["y"]["win_rate"] == pytest.approx(25, abs=1e-3)
    assert (rates["x"]["battles"], rates["y"]["battles"]) == (4, 2)


def test_v0_1_drops_the_failed_game_and_v2_its_question():
    judgments = [judged("A>B", None, question_id="1"), judged("B>A", "A>B", question_id="2")]
    assert len(to_battles(judgments, "v0.1")) == 3
    assert [b.question_id for b in to_battles(judgments, "v2")] == ["2", "2"]
    assert count_failures(judgments, "v0.1") == {"m": 1}


def test_only_v2_knows_labels_with_the_smaller_side_first():
    judgments = [judged("A<<B", "B=A")]
    assert to_battles(judgments, "v0.1") == []
    assert [(b.outcome, b.weight) for b in to_battles(judgments, "v2")] == [(0.0, 3), (0.5, 1)]
    assert (count_failures(judgments, "v0.1"), count_failures(judgments, "v2")) == ({"m": 2}, {"m": 0})


# ----------------------------------------------------------------------------- win rate


def test_against_one_baseline_bradley_terry_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    outcomes, weights = rng.choice([0.0, 0.5, 1.0], 200), rng.choice([1, 3], 200)
    models = rng.choice(["x", "y"], 200)
    battles = [battle(y, model_b=m, weight=int(w)) for y, w, m in zip(outcomes, weights, models, strict=True)]
    rates = win_rate(battles, "base", num_resamples=2)
    for model in ("x", "y"):
        mine = models == model
        mean = np.average(1 - outcomes[mine], weights=weights[mine])
        assert rates[model]["win_rate"] == pytest.approx(100 * mean, abs=1e-5)


def test_strength_passes_through_a_chain_of_battles():
    # x beats base 2:1, y beats x 3:1; so y's odds against base are 6 to 1.
    battles = [battle(0.0, weight=2, model_b="x"), battle(1.0, model_b="x")]
    battles += [battle(1.0, "y", "x", weight=3), battle(0.0, "y", "x")]
    rates = win_rate(battles, "base", num_resamples=2)
    assert rates["x"]["win_rate"] == pytest.approx(100 * 2 / 3, abs=1e-4)
    assert rates["y"]["win_rate"] == pytest.approx(100 * 6 / 7, abs=1e-4)


def test_weights_are_repeated_rows():
    weighted = win_rate([battle(0.0, weight=3), battle(1.0, weight=1)], "base", num_resamples=2)
    repeated = win_rate([battle(0.0)] * 3 + [battle(1.0)], "base", num_resamples=2)
    assert weighted["m"]["win_rate"] == pytest.approx(repeated["m"]["win_rate"])


def test_the_interval_is_the_bootstraps_of_a_binomial():
    # 400 questions with one battle each, half of them won: sd = 100 sqrt(.25 / 400) = 2.5 points.
    battles = [battle(float(n % 2), question_id=str(n)) for n in range(400)]
    metrics = win_rate(battles, "base", seed=1)["m"]
    for name, expected in (("low", 50 - 1.96 * 2.5), ("high", 50 + 1.96 * 2.5)):
        assert metrics[name] == pytest.approx(expected, abs=0.6)
        assert metrics[f"upstream_{name}"] == pytest.approx(expected, abs=0.6)


def test_three_copies_of_a_battle_narrow_only_the_upstream_interval():
    once = [battle(float(n % 2), question_id=str(n)) for n in range(400)]
    thrice = [battle(b.outcome, question_id=b.question_id, weight=3) for b in once]
    one, three = (win_rate(battles, "base", seed=1)["m"] for battles in (once, thrice))
    assert three["high"] - three["low"] == pytest.approx(one["high"] - one["low"])
    ratio = (three["upstream_high"] - three["upstream_low"]) / (one["upstream_high"] - one["upstream_low"])
    assert ratio == pytest.approx(1 / math.sqrt(3), abs=0.06)


def test_a_seed_gives_its_interval_again():
    battles = [battle(float(n % 3 == 0), question_id=str(n)) for n in range(30)]
    first, again, other = (win_rate(battles, "base", seed=s, num_resamples=20) for s in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("battles", "letter"),
    [
        ([], "0 battles do not compare any model with the baseline 'base'"),
        ([battle(1.0, "x", "y")], "do not compare x, y with the baseline 'base'"),
        ([battle(1.0), battle(1.0, "x", "y")], "do not compare x, y with"),
    ],
)
def test_models_that_never_met_the_baseline_are_named(battles, letter):
    with pytest.raises(DataError, match=letter):
        win_rate(battles, "base")


def public_battles(name):
    return read_games([str(SHARED / name)], baseline="gpt-4-0314").battles


def leaderboard(name):
    with (SHARED / name).open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


@needs_public_data
@pytest.mark.parametrize(
    ("battles", "board", "num_models"),
    [
        ("battles_official_models_gpt4-1106-judge.jsonl", "arena_hard_leaderboard_20240731.csv", 2),
        ("battles_wetzel_20240813.parquet", "leaderboard_wetzel_20240813.csv", 9),
    ],
)
def test_public_battles_give_their_leaderboard(battles, board, num_models):
    rates, published = win_rate(public_battles(battles), "gpt-4-0314", num_resamples=300), leaderboard(board)
    assert len(rates) == num_models
    for model, metrics in rates.items():
        assert metrics["win_rate"] == pytest.approx(float(published[model]["score"]), abs=0.01)
        assert metrics["upstream_low"] == pytest.approx(float(published[model]["rating_q025"]), abs=0.8)
        assert metrics["upstream_high"] == pytest.approx(float(published[model]["rating_q975"]), abs=0.8)
        wider = (metrics["high"] - metrics["low"]) / (metrics["upstream_high"] - metrics["upstream_low"])
        assert 1.2 < wider < 2.3


# ----------------------------------------------------------------------------- style


def test_markdown_is_counted_outside_fenced_code():
    answer = (
        "# Title\n## Part\n### \n#no\n1. one\n 2. two\n- a\n* b\n+ c\n**bold** and __too__ ** no\n```\n# x\n- y\n```\n"
    )
    assert markdown_counts(answer) == {
        "header_count": {"h1": 1, "h2": 1, "h3": 1, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 1, "__": 1},
    }
    assert style_of(answer, num_tokens=40) == Style(tokens=40, headers=3, lists=5, bolds=2)


def test_at_equal_styles_style_control_is_the_win_rate():
    battles = [battle(float(n % 5 < 2), question_id=str(n)) for n in range(500)]
    styles = {
        (model, str(n)): Style(tokens=n, headers=1, lists=0, bolds=2) for model in ("base", "m") for n in range(500)
    }
    plain = win_rate(battles, "base", num_resamples=2)["m"]["win_rate"]
    for centred in (True, False):
        control = style_controlled_win_rate(battles, styles, "base", centred=centred, num_resamples=2)
        assert control.models["m"]["win_rate"] == pytest.approx(plain, abs=0.01)
        assert control.coefficients == {"tokens": 0, "headers": 0, "lists": 0, "bolds": 0}


def length_only_world(num_battles, seed=0):
    """The model writes longer answers, and length alone decides: logit P = 4 (t_m - t_b)/(t_m + t_b + 1)."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.lognormal(6.3, 0.5, num_battles).astype(int), rng.lognormal(6.0, 0.5, num_battles).astype(int)
    p_model = 1 / (1 + np.exp(-4 * (ours - theirs) / (ours + theirs + 1)))
    battles = [battle(float(loses), question_id=str(n)) for n, loses in enumerate(rng.random(num_battles) > p_model)]
    styles = {("m", str(n)): Style(tokens=int(t), headers=0, lists=0, bolds=0) for n, t in enumerate(ours)}
    styles |= {("base", str(n)): Style(tokens=int(t), headers=0, lists=0, bolds=0) for n, t in enumerate(theirs)}
    return battles, styles


def test_where_only_length_decides_uncentred_control_finds_equals():
    battles, styles = length_only_world(20_000)
    plain = win_rate(battles, "base", num_resamples=2)["m"]["win_rate"]
    centred, uncentred = (
        style_controlled_win_rate(battles, styles, "base", centred=c, num_resamples=2) for c in (True, False)
    )
    assert plain > 60
    # Upstream's centring leaves the model's average surplus of length in its favour.
    assert centred.models["m"]["win_rate"] > plain + 1
    assert uncentred.models["m"]["win_rate"] == pytest.approx(50, abs=1.0)
    assert centred.coefficients["tokens"] > 0


def test_an_answer_given_twice_is_named_by_both_lines():
    answers = [ModelAnswer(question_id="q", model="m", output="x", num_tokens=1, place=f"a, line {n}") for n in (1, 5)]
    with pytest.raises(DataError, match="a, line 5: m answers question q again, as in a, line 1"):
        styles_of(answers)


def test_an_answer_without_style_is_named():
    styles = {("base", "q"): Style(tokens=1, headers=0, lists=0, bolds=0)}
    with pytest.raises(DataError, match="no answer of 'm' to question 'q' among the 1 answers given"):
        style_controlled_win_rate([battle(1.0)], styles, "base", centred=True)


@needs_public_data
def test_style_control_is_scikit_learns_regression_of_upstreams_doubled_rows():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    answers = pq.read_table(SHARED / "model_answer_wetzel.parquet").to_pylist()
    styles = {(a["model"], a["question_id"]): style_of(a["content"], num_tokens=a["token_len"]) for a in answers}
    models = sorted({model for model, _ in styles})
    battles = [b for b in public_battles("battles_wetzel_20240813.parquet") if b.model_b in models]
    ours = style_controlled_win_rate(battles, styles, "gpt-4-0314", centred=True, num_resamples=2)

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


def test_the_fit_solves_its_normal_equation():
    # One feature of value 1: sigmoid(theta) = mean, up to the ridge; here 3 (p - 3/4) weights + ridge theta = 0.
    [theta] = fit_logistic(np.ones((2, 1)), np.array([1.0, 0.5]), np.array([2.0, 2.0]), ridge=0.5)
    p = 1 / (1 + math.exp(-theta))
    assert 4 * (p - 0.75) + 0.5 * theta == pytest.approx(0, abs=1e-7)


# ----------------------------------------------------------------------------- files


def written(tmp_path, name, *rows):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def layouts(tmp_path, *games):
    """The same games in the v0.1 and in the v2 layout."""
    row = {"model": "m", "judge": "gpt-4o", "games": games}
    v0_1 = written(tmp_path, "v01.jsonl", {"question_id": "q", **row})
    return v0_1, written(tmp_path, "v2.jsonl", {"uid": "q", "category": "hard", "baseline": "base", **row})


def test_judgments_of_both_layouts_are_the_same_games(tmp_path):
    for file in layouts(tmp_path, {"score": "A>>B"}, {"score": "A=B"}):
        read = read_games([file], baseline="base")
        assert read.battles == [battle(1.0, weight=3), battle(0.5)]
        assert (read.judges, read.failures) == (("gpt-4o",), {"m": 0})


def test_a_file_is_read_by_the_rules_of_its_edition(tmp_path):
    v0_1, v2 = (read_games([f], baseline="base") for f in layouts(tmp_path, {"score": "A>>B"}, {"score": None}))
    assert (v0_1.battles, v2.battles) == ([battle(1.0, weight=3)], [])
    assert v0_1.failures == v2.failures == {"m": 1}


def test_a_game_that_is_missing_counts_as_failed(tmp_path):
    _, v2 = layouts(tmp_path, None, {"score": "A>B"})
    read = read_games([v2], baseline="base")
    assert (read.battles, read.failures) == ([], {"m": 1})


GOOD = {"uid": "q", "judge": "j", "model": "m", "baseline": "base", "games": [{"score": "A>B"}, {"score": "A>B"}]}


@pytest.mark.parametrize(
    ("change", "letter"),
    [
        ({"baseline": "other"}, r"x.jsonl, line 1: judged against 'other', not 'base'"),
        ({"games": [{"score": "A>B"}]}, r"field 'games': .* are not two games"),
        ({"games": [{"score": 1}, {"score": "A>B"}]}, r"field 'games': .* with a score like 'A>B'"),
        ({"model": None}, r"line 1, field 'model': None is no str"),
        ({"winner": "A"}, r"field 'winner': 'A' is none of model_a"),
    ],
)
def test_a_row_that_is_no_judgment_is_named(change, letter, tmp_path):
    with pytest.raises(DataError, match=letter):
        read_games([written(tmp_path, "x.jsonl", GOOD | change)], baseline="base")


def test_a_question_judged_twice_is_named_by_both_lines(tmp_path):
    files = [written(tmp_path, name, GOOD) for name in ("gpt.jsonl", "claude.jsonl")]
    with pytest.raises(DataError, match=r"claude.jsonl, line 1: 'm' is judged on question q again, as in .*gpt.jsonl"):
        read_games(files, baseline="base")


def test_a_line_that_a_kill_cut_short_is_named(tmp_path):
    whole = json.dumps(GOOD)
    (tmp_path / "x.jsonl").write_text(f"{whole}\n{whole[:-7]}")
    with pytest.raises(DataError, match=r"x.jsonl, line 2: no JSON"):
        read_games([str(tmp_path / "x.jsonl")], baseline="base")


def test_answers_of_both_layouts_give_the_same_style(tmp_path):
    text = "# Title\n- **a**"
    counted_inside = {"turns": [{"content": text, "token_len": 7}]}
    old = {"question_id": "q", "model_id": "m", "choices": [counted_inside]}
    middle = {**old, "choices": [{"turns": [{"content": text}]}], "conv_metadata": {"token_len": 7}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": {"answer": text}}]
    new = {"uid": "q", "model": "m", "messages": messages, "metadata": {"token_len": 7}}
    for row in (old, middle, new):
        styles = styles_of(read_answers([written(tmp_path, "a.jsonl", row)]))
        assert styles == {("m", "q"): Style(tokens=7, headers=1, lists=1, bolds=1)}


def test_answers_are_written_as_either_edition_reads_them(tmp_path):
    answer = ModelAnswer(question_id="q", model="tiny", output="## Bécause\n1. **x**", num_tokens=4)
    path = tmp_path / "model_answer" / "tiny.jsonl"
    write_answers(path, [answer], prompts={"q": "why ?"}, rules="v2")
    row = json.loads(path.read_text())
    assert (row["uid"], row["model"], row["messages"][0]["content"]) == ("q", "tiny", "why ?")
    assert row["messages"][-1]["content"]["answer"] == "## Bécause\n1. **x**"
    # Upstream's v2 takes the features by position.
    sums = [v if isinstance(v, int) else sum(v.values()) for v in row["metadata"].values()]
    assert sums == [4, 1, 1, 1]
    assert read_answers([str(path)]) == [answer]

    write_answers(path, [answer], prompts={"q": "why ?"}, rules="v0.1")
    row = json.loads(path.read_text())
    assert (row["question_id"], row["model_id"]) == ("q", "tiny")
    # Early readers take the length from the turn, later ones the features from conv_metadata.
    assert row["choices"] == [{"index": 0, "turns": [{"content": "## Bécause\n1. **x**", "token_len": 4}]}]
    assert [sum(v.values()) for v in list(row["conv_metadata"].values())[1:]] == [1, 1, 1]
    assert list(row["conv_metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
    assert read_answers([str(path)]) == [answer]


@pytest.mark.parametrize(
    ("turn", "letter"),
    [
        ({"content": "x"}, r"a.jsonl, line 1: no answer with its number of tokens \(KeyError"),
        ({"content": "x", "token_len": "7"}, "line 1: 'x' is no answer, or '7' no number of tokens"),
    ],
)
def test_an_answer_without_its_length_is_refused(turn, letter, tmp_path):
    row = {"question_id": "q", "model_id": "m", "choices": [{"turns": [turn]}]}
    with pytest.raises(DataError, match=letter):
        read_answers([written(tmp_path, "a.jsonl", row)])
