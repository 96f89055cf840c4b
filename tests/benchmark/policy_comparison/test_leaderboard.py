"""The paper's Table 1 from the files of score_benchmark."""

import json

import pytest

from pipeline.benchmark.policy_comparison.leaderboard import leaderboard, leaderboard_notes, read_scores
from pipeline.errors import DataError

ALPACA = {
    "benchmark": "alpaca_eval",
    "judges": ["gpt-4-turbo"],
    "models": {
        "aligned": {
            "win_rate": 45.3,
            "standard_error": 1.5,
            "length_controlled_winrate": 50.38,
            "lc_standard_error": 0.4,
            "baseline": "base",
            "notes": ["The difficulty is AlpacaEval's."],
        }
    },
}
ARENA = {
    "benchmark": "arena_hard",
    "baseline": "gpt-4-0314",
    "judges": ["gpt-4o"],
    "models": {"aligned": {"win_rate": 65.5, "low": 60.0, "high": 70.0}},
    "style_control": {
        "sc_upstream": {"models": {"aligned": {"win_rate": 57.2}}},
        "sc_uncentred": {"models": {"aligned": {"win_rate": 48.0}}},
    },
}
MT = {
    "benchmark": "mt_bench",
    "judges": ["gpt-4"],
    "models": {
        name: {"average": average, "low": 7.0, "high": 8.0} for name, average in (("base", 7.5), ("aligned", 8))
    },
}
MT["models"]["aligned"]["turn_1"] = 8.2
ALL = {content["benchmark"]: content for content in (ALPACA, ARENA, MT)}


def test_a_row_is_that_of_the_papers_table_with_the_words_beside_the_rates():
    words = {"alpaca_eval": {"base": 99.6, "aligned": 120.2}}
    table = leaderboard(("base", "aligned"), ALL, words)
    assert table.columns == (
        *(
            ("AlpacaEval 2, judge: gpt-4-turbo", name)
            for name in ("WR ± standard error", "LC ± standard error", "words")
        ),
        *(("Arena-Hard, judge: gpt-4o", name) for name in ("WR [95% bootstrap]", "SC, no interval")),
        *(
            ("MT-Bench, judge: gpt-4", name)
            for name in ("average [95% bootstrap]", "turn 1, no interval", "turn 2, no interval")
        ),
    )
    assert dict(table.rows) == {
        "base": ("baseline", "", "100", "", "", "7.50 [7.00, 8.00]", "", ""),
        "aligned": (
            *("45.30 ± 1.50", "50.38 ± 0.40", "120"),
            *("65.5 [60.0, 70.0]", "57.2 (48.0)"),
            *("8.00 [7.00, 8.00]", "8.20", ""),
        ),
    }


def test_benchmarks_without_scores_have_no_column():
    table = leaderboard(("aligned",), {"arena_hard": ARENA}, {})
    assert [title for title, _ in table.columns] == ["Arena-Hard, judge: gpt-4o"] * 2


def test_what_the_numbers_depend_on_is_said():
    said = " ".join(leaderboard_notes(ALL))
    for part in ("against base", "difficulty is AlpacaEval's", "gpt-4-0314", "judged by gpt-4o", "graded by gpt-4"):
        assert part in said


def test_without_scores_there_is_no_table():
    assert leaderboard(("base", "aligned"), {}, {}) is None


def test_scores_of_other_models_are_refused():
    with pytest.raises(DataError, match=r"the scores of mt_bench are those of base, aligned, none .* \(ours\)"):
        leaderboard(("ours",), {"mt_bench": MT}, {})


@pytest.mark.parametrize(
    ("contents", "letter"),
    [
        ([MT, MT], "1.json is a second file of mt_bench"),
        ([{"benchmark": "rewardbench", "models": {}}], "no column"),
        ([{"models": {}}], "0.json holds no scores"),
        ([[]], "0.json holds no scores"),
    ],
)
def test_files_that_are_no_scores_are_refused(contents, letter, tmp_path):
    files = [tmp_path / f"{i}.json" for i in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=letter):
        read_scores(files)


@pytest.mark.parametrize(
    ("rate", "error", "cell"), [(50.38, 0.4, "50.38 ± 0.40"), (50.38, None, "50.38"), (None, None, "withheld")]
)
def test_a_rate_or_an_error_that_was_withheld_is_not_shown(rate, error, cell):
    model = ALPACA["models"]["aligned"] | {"length_controlled_winrate": rate, "lc_standard_error": error}
    table = leaderboard(["aligned"], {"alpaca_eval": ALPACA | {"models": {"aligned": model}}}, {})
    assert table.rows == (("aligned", ("45.30 ± 1.50", cell)),)
