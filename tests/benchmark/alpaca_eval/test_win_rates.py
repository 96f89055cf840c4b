import codecs
import csv
import dataclasses
import importlib
import json
import logging
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn
import yaml
from scipy.optimize import brentq, least_squares

from pipeline.benchmark.alpaca_eval.annotations import Annotations, read_annotations
from pipeline.benchmark.alpaca_eval.model_outputs import ModelOutput, write_model_outputs
from pipeline.benchmark.alpaca_eval.win_rates import (
    Coefficients,
    GamedRows,
    fit_coefficients,
    is_extreme_change,
    length_controlled_win_rate,
    preferences_at_equal_length,
    raw_win_rate,
    read_gamed_rows,
)
from pipeline.benchmark.scored_answers import write_scored_answers
from pipeline.errors import DataError, ShapeError
from pipeline.records import Answer, RewardScore
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "alpaca_eval"
BASELINE = "gpt4_1106_preview"


def annotations(preferences, *, baseline_lengths=None, model_lengths=None, instructions=None, model="model"):
    rows = range(len(preferences))
    return Annotations(
        baseline=BASELINE,
        model=model,
        instructions=instructions or [f"instruction {i}" for i in rows],
        preferences=preferences,
        baseline_lengths=baseline_lengths if baseline_lengths is not None else [100] * len(preferences),
        model_lengths=model_lengths if model_lengths is not None else [50 + 10 * i for i in rows],
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


# ----------------------------------------------------------------------------- win rate


def test_the_win_rate_is_the_mean_preference_and_a_draw_counts_half():
    # p = 0, 1, 1/2, 1/4: mean 7/16, sum of squared deviations 35/64, standard error sqrt(35/64 / 3 / 4)
    result = raw_win_rate([1.0, 2.0, 1.5, 1.25])
    assert result["win_rate"] == pytest.approx(100 * 7 / 16)
    assert result["standard_error"] == pytest.approx(100 * math.sqrt(35 / 64 / 12))
    assert (result["n_wins"], result["n_wins_base"], result["n_draws"], result["n_total"]) == (1, 2, 1, 4)
    assert result["discrete_win_rate"] == 100 * 1.5 / 4


def test_a_zero_is_an_old_draw():
    assert raw_win_rate([0.0, 2.0, 1.0]) == raw_win_rate([1.5, 2.0, 1.0])


def test_an_unparsed_verdict_is_left_out_and_counted():
    assert raw_win_rate([None, 2.0, math.nan, 1.0]) == raw_win_rate([2.0, 1.0]) | {"n_unparsed": 2}


@pytest.mark.parametrize("value", [0.7, -1.0, 2.5])
def test_what_is_no_preference_is_refused_by_its_row(value):
    with pytest.raises(DataError, match=rf"preference {value:g} in row 1"):
        raw_win_rate([1.0, value])


@pytest.mark.parametrize("preferences", [[], [None, math.nan]])
def test_no_verdict_has_no_win_rate(preferences):
    with pytest.raises(DataError, match="at least one"):
        raw_win_rate(preferences)


# ----------------------------------------------------------------------------- length control, by hand


def test_the_length_controlled_win_rate_is_the_preference_at_equal_length():
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4: mean 5/8, standard error 1/8; lengths have no say.
    rows = annotations([1.0, 1.0], instructions=["easy", "hard"])
    result = length_controlled_win_rate(
        rows, {"hard": math.log(3), "easy": 0.0}, coefficients=Coefficients(-9.0, 1.0, 0.0)
    )
    assert result["length_controlled_winrate"] == pytest.approx(62.5)
    assert result["lc_standard_error"] == pytest.approx(12.5)
    assert result["win_rate"] == 0.0
    assert result["coefficients"] == {"length": -9.0, "difficulty": 1.0, "not_gamed": 0.0}


def planted_rows(truth, *, num_rows=600, seed=0):
    """Rows whose soft labels are the logistic model's own probabilities."""
    random = np.random.default_rng(seed)
    lengths, model_lengths = random.integers(100, 3000, (2, num_rows))
    difficulty = random.normal(0.0, 1.5, num_rows)
    standardised = (lengths - model_lengths) / np.std(lengths - model_lengths, ddof=1)
    p = sigmoid(truth.length * np.tanh(standardised) + truth.difficulty * difficulty + truth.not_gamed)
    return annotations(1.0 + p, baseline_lengths=lengths, model_lengths=model_lengths), difficulty


def test_the_fit_recovers_planted_coefficients():
    truth = Coefficients(length=-1.5, difficulty=0.8, not_gamed=-0.6)
    rows, difficulty = planted_rows(truth)
    assert fit_coefficients(rows, difficulty) == pytest.approx(truth, abs=0.02)
    result = length_controlled_win_rate(rows, difficulty)
    equal_length = 100 * sigmoid(truth.difficulty * difficulty + truth.not_gamed).mean()
    assert result["length_controlled_winrate"] == pytest.approx(equal_length, abs=0.3)
    assert result["variant"] == "length_controlled_noreg"


def test_difficulties_by_text_go_to_their_rows():
    rows, difficulty = planted_rows(Coefficients(-1.5, 0.8, -0.6), num_rows=100)
    by_text = {"not asked": 9.0} | dict(zip(rows.instructions[::-1], difficulty[::-1], strict=True))
    assert length_controlled_win_rate(rows, by_text) == length_controlled_win_rate(rows, difficulty)


def test_rows_without_a_verdict_train_nothing_but_are_predicted():
    rows, difficulty = planted_rows(Coefficients(-1.5, 0.8, -0.6), num_rows=200)
    preferences = [None if i < 20 else value for i, value in enumerate(rows.preferences)]
    holes = annotations(preferences, baseline_lengths=rows.baseline_lengths, model_lengths=rows.model_lengths)
    result = length_controlled_win_rate(holes, difficulty)
    p = preferences_at_equal_length(Coefficients(**result["coefficients"]), difficulty)
    assert len(p) == 200
    assert result["length_controlled_winrate"] == pytest.approx(100 * p.mean())
    assert (result["n_total"], result["n_unparsed"]) == (180, 20)


def test_the_baseline_against_itself_is_50():
    rows = annotations([1.5] * 3, model_lengths=[100] * 3, model=BASELINE)
    result = length_controlled_win_rate(rows, [0.0, 1.0, -2.0])
    assert (result["win_rate"], result["length_controlled_winrate"], result["lc_standard_error"]) == (50.0, 50.0, 0.0)


def test_without_difficulty_the_minimal_model_is_fitted():
    rows, _ = planted_rows(Coefficients(-1.5, 0.0, -0.6))
    result = length_controlled_win_rate(rows, None)
    assert result["variant"] == "length_controlled_minimal"
    assert result["length_controlled_winrate"] == pytest.approx(100 * sigmoid(-0.6), abs=0.3)
    note, other = result["notes"]
    assert "fitted without instruction difficulty and gamed rows" in note
    # Every instruction has the same prediction, so a standard error over instructions says nothing.
    assert result["lc_standard_error"] is None
    assert "has no standard error: the fit predicts the same for every instruction" in other


@pytest.mark.parametrize("difficulty", [None, [0.0] * 8])
def test_a_fit_that_finds_nothing_is_withheld(difficulty):
    # Four long answers win and lose as often as four short ones: the penalty leaves no coefficient.
    rows = annotations([2.0, 1.0] * 4, baseline_lengths=[100] * 8, model_lengths=[150, 150, 50, 50, 160, 160, 40, 40])
    result = length_controlled_win_rate(rows, difficulty)
    assert set(result["coefficients"].values()) == {0.0}
    assert (result["length_controlled_winrate"], result["lc_standard_error"]) == (None, None)
    assert "is withheld: the fit set every coefficient to 0" in result["notes"][-1]
    assert result["win_rate"] == 50.0


def test_the_result_says_whose_difficulty_it_stands_on():
    rows, difficulty = planted_rows(Coefficients(-1.0, 0.5, 0.0), num_rows=50)
    result = length_controlled_win_rate(rows, difficulty)
    difficulty_note, fit_note = result["notes"]
    assert BASELINE in difficulty_note
    assert "LC is not the leaderboard's" in fit_note
    assert json.loads(json.dumps(result)) == result


def test_another_baseline_is_said_not_to_compare_with_the_leaderboard():
    rows = dataclasses.replace(annotations([1.5, 1.5]), baseline="gpt-4o")
    result = length_controlled_win_rate(rows, [0.0, 1.0], coefficients=Coefficients(0.0, 0.0, 0.0))
    assert "gpt-4o" in result["notes"][1]


@pytest.mark.parametrize(
    ("raw", "length_controlled", "extreme"),
    # Of 20 a quarter is 5, of the 80 above it 20; of 50 it is 12.5 to both sides. At least 10 either way.
    [(20, 10.1, False), (20, 9.9, True), (20, 39.9, False), (20, 40.1, True), (50, 37.6, False), (50, 62.6, True)],
)
def test_a_change_of_a_quarter_of_the_room_is_extreme(raw, length_controlled, extreme):
    assert is_extreme_change(raw, length_controlled) is extreme


def test_an_extreme_change_is_noted():
    result = length_controlled_win_rate(annotations([1.0, 1.0]), [0.0, 0.0], coefficients=Coefficients(0.0, 1.0, 0.0))
    assert result["extreme_change"]
    assert "50.0 is far from the raw one, 0.0" in result["notes"][1]


# ----------------------------------------------------------------------------- what is refused


def test_a_repeated_instruction_is_refused():
    with pytest.raises(DataError, match="1 instructions occur more than once, first 'a'"):
        annotations([1.0, 2.0, 1.0], instructions=["a", "b", "a"])


def test_columns_of_different_length_are_refused():
    with pytest.raises(ShapeError, match="3 instructions, 3 preferences, 2 and 3 lengths"):
        annotations([1.0] * 3, baseline_lengths=[1, 2])


def test_a_fit_needs_one_difficulty_per_row():
    with pytest.raises(ShapeError, match="8 difficulties for 9 annotated rows"):
        fit_coefficients(annotations([1.2] * 9), np.zeros(8))


def test_an_instruction_without_difficulty_is_refused():
    with pytest.raises(DataError, match="1 instructions have no difficulty, first 'b'"):
        length_controlled_win_rate(annotations([1.0, 2.0], instructions=["a", "b"]), {"a": 0.0})


def test_difficulties_by_position_need_every_row():
    with pytest.raises(DataError, match="805 difficulties by position for 803 annotations"):
        length_controlled_win_rate(annotations([1.0] * 803), [0.0] * 805)


@pytest.mark.parametrize(
    ("preferences", "model_lengths", "reason"),
    [
        ([1.2] * 9, [107] * 9, "every answer is 7 characters longer"),
        ([1.2] * 4 + [None], [101, 99, 107, 90, 95], "5 folds, and 4 rows"),
        ([1.0] * 9, [101, 99, 107, 90, 95, 80, 120, 100, 90], "every preference is 1"),
        ([2.0] * 9, [101, 99, 107, 90, 95, 80, 120, 100, 90], "every preference is 2"),
    ],
)
def test_without_a_fit_the_raw_rate_stands_alone_and_says_why(preferences, model_lengths, reason):
    rows = annotations(preferences, model_lengths=model_lengths)
    result = length_controlled_win_rate(rows, [0.0] * len(preferences))
    assert {name: result[name] for name in raw_win_rate(preferences)} == raw_win_rate(preferences)
    assert (result["length_controlled_winrate"], result["lc_standard_error"], result["coefficients"]) == (None,) * 3
    assert not result["extreme_change"]
    assert reason in result["notes"][-1]
    with pytest.raises(DataError, match=reason):
        fit_coefficients(rows, np.zeros(len(preferences)))


def test_gamed_rows_need_the_difficulty():
    gamed = GamedRows(win_probabilities=[0.5], length_differences=[1.0], difficulty=[0.0])
    with pytest.raises(DataError, match="instruction difficulty"):
        length_controlled_win_rate(annotations([1.2] * 9), None, gamed=gamed)


# ----------------------------------------------------------------------------- files


def official_rows(*preferences, **changes):
    return [
        {
            "instruction": f"why {i} ?",
            "generator_1": BASELINE,
            "output_1": "because",
            "generator_2": "model",
            "output_2": "ünï"[: i + 1],
            "preference": preference,
            **changes,
        }
        for i, preference in enumerate(preferences)
    ]


def test_annotations_json_is_read_with_lengths_in_characters(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(official_rows(1.25, None)))
    assert read_annotations(path) == Annotations(
        baseline=BASELINE,
        model="model",
        instructions=["why 0 ?", "why 1 ?"],
        preferences=[1.25, None],
        baseline_lengths=[7, 7],
        model_lengths=[1, 2],
    )


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("{", "must hold a list"),
        ("[]", "holds no annotated pairs"),
        ("[3]", r"row 1 \(line 1\): 3 is JSON but no object"),
        (json.dumps(official_rows(1.0, output_2=None)), r"row 1 \(line 1\), field 'output_2'"),
        ('[{"preference": 1}]', r"row 1 \(line 1\), field 'generator_1'"),
        (json.dumps(official_rows(1.0, 0.7), indent=1), r"row 2 \(line 10\), field 'preference': 0.7"),
        (json.dumps(official_rows(1.0, "2")), r"row 2 \(line 1\), field 'preference': '2' is not a number"),
        (json.dumps(official_rows(1.0, True)), r"row 2 \(line 1\), field 'preference': True is not a number"),
        (json.dumps(official_rows(1.0, 2.5)), r"row 2 \(line 1\), field 'preference': 2.5 is not in \[1, 2\]"),
        (json.dumps(official_rows(1.0, math.inf)), r"row 2 \(line 1\), field 'preference': inf is not in \[1, 2\]"),
        (json.dumps(official_rows(1.0, 2.0), indent=1)[:-30], r"row 2 \(line 10\): no JSON .* cut short"),
        (json.dumps(official_rows(1.0))[:-1], r"row 1 \(line 1\): no comma or \] follows it"),
        (json.dumps(official_rows(1.0) * 2), r"row 2 \(line 1\): 'why 0 \?' is annotated already, in .* row 1"),
        (
            json.dumps(official_rows(1.0) + official_rows(1.0, 2.0, generator_1="other")[1:]),
            r"row 2 \(line 1\): other / model / *stands in a file of gpt4_1106_preview / model",
        ),
        (
            json.dumps(official_rows(1.0, annotator="a") + official_rows(1.0, 2.0, annotator="b")[1:]),
            r"row 2 \(line 1\): gpt4_1106_preview / model / b stands in a file of gpt4_1106_preview / model / a",
        ),
    ],
)
def test_a_file_of_other_things_is_refused_by_row_and_line(text, letter, tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"annotations\.json.*{letter}"):
        read_annotations(path)


@pytest.mark.parametrize("mark", [None, math.nan])
def test_a_row_without_a_preference_counts_as_failed(mark, tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(official_rows(1.0, mark, 2.0)))
    result = raw_win_rate(read_annotations(path).preferences)
    assert (result["win_rate"], result["n_total"], result["n_unparsed"]) == (50.0, 2, 1)


GAMED_COLUMNS = ("model", "index", "instruction_difficulty", "preference", "std_delta_len", "not_gamed_baseline")


def write_gamed_csv(path, columns):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(GAMED_COLUMNS)
        writer.writerows(zip(*columns, strict=True))


def test_gamed_rows_are_read_with_the_difficulty_of_each_instruction(tmp_path):
    path = tmp_path / "df_gamed.csv"
    difficulty = [0.5, -1.0, 0.5, -1.0]
    write_gamed_csv(path, ("vvcc", [0, 1, 0, 1], difficulty, [0.7, "", 0.2, 0.1], [-1.0, -0.5, 1.0, 2.0], [False] * 4))
    gamed, by_index = read_gamed_rows(path)
    assert by_index == [0.5, -1.0]
    assert gamed.length_differences == [-1.0, -0.5, 1.0, 2.0]
    assert gamed.win_probabilities == pytest.approx([0.7, math.nan, 0.2, 0.1], nan_ok=True)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "df_gamed.csv"
    header = "index,instruction_difficulty,preference,std_delta_len"
    path.write_bytes(codecs.BOM_UTF8 + f"{header}\n0,0.5,0.7,1.0\n".encode())
    gamed, by_index = read_gamed_rows(path)
    assert (by_index, gamed.win_probabilities) == ([0.5], [0.7])
    path.write_bytes(f"{header}\n0,0.5,0.7,\xff\n".encode("latin-1"))
    with pytest.raises(DataError, match="is no df_gamed"):
        read_gamed_rows(path)


@pytest.mark.parametrize(
    "text", ["index\n0\n", "index,instruction_difficulty,preference,std_delta_len\n1,0.5,0.5,0.5\n"]
)
def test_a_file_that_is_no_df_gamed_is_refused(text, tmp_path):
    path = tmp_path / "df_gamed.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="is no df_gamed"):
        read_gamed_rows(path)


def test_a_byte_order_mark_is_no_part_of_the_gamed_rows(tmp_path):
    path = tmp_path / "df_gamed.csv"
    path.write_text("\ufeffindex,instruction_difficulty,preference,std_delta_len\n0,0.5,0.25,-1\n", encoding="utf-8")
    gamed, by_index = read_gamed_rows(path)
    assert (gamed.win_probabilities, by_index) == ([0.25], [0.5])


@pytest.mark.parametrize("row", ["0.5,85,0.5", "0.5,-0.1,0.5", "nan,0.5,0.5", "0.5,0.5,inf"])
def test_a_gamed_row_out_of_range_is_refused_by_its_line(row, tmp_path):
    path = tmp_path / "df_gamed.csv"
    path.write_text(f"index,instruction_difficulty,preference,std_delta_len\n0,0.5,0.5,0.5\n0,{row}\n")
    with pytest.raises(DataError, match=r"df_gamed.csv, line 3: preference"):
        read_gamed_rows(path)


# ----------------------------------------------------------------------------- the official leaderboard


def table(name):
    with (SHARED / name).open(newline="") as file:
        header, *rows = csv.reader(file)
        return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


@pytest.fixture(scope="module")
def leaderboard():
    if not SHARED.exists():
        pytest.skip("needs the public data folder beside the checkout")
    return table("leaderboard.csv")


@pytest.fixture(scope="module")
def official(leaderboard):
    """Model -> its official annotations, for the models of the leaderboard."""
    instructions = [
        json.loads(line)["instruction"] for line in (SHARED / "instructions.jsonl").read_text().splitlines()
    ]
    rows = {}
    for row in pq.read_table(SHARED / "annotations_weighted_gpt4_turbo.parquet").to_pylist():
        rows.setdefault(row["generator_2"], []).append(row)
    return {
        model: Annotations(
            baseline=BASELINE,
            model=model,
            instructions=[instructions[row["index"]] for row in rows[model]],
            preferences=[row["preference"] for row in rows[model]],
            baseline_lengths=[row["len_output_1"] for row in rows[model]],
            model_lengths=[row["len_output_2"] for row in rows[model]],
        )
        for model in rows.keys() & leaderboard.keys()
    }


@pytest.fixture(scope="module")
def official_coefficients(leaderboard):
    rows = {model: Coefficients(*map(float, row.values())) for model, row in table("lc_glm_weights.csv").items()}
    return {model: row for model, row in rows.items() if model in leaderboard}


@pytest.fixture(scope="module")
def difficulty(leaderboard):
    """[805] an estimate: the official difficulties are not in the folder."""
    return np.array([float(*row.values()) for row in table("instruction_difficulty_estimated.csv").values()])


@pytest.fixture(scope="module")
def difficulty_by_text(official, difficulty):
    return dict(zip(official[BASELINE].instructions, difficulty, strict=True))


def official_lc(leaderboard, models):
    return np.array([float(leaderboard[model]["length_controlled_winrate"]) for model in models])


def test_every_win_rate_is_the_official_one(official, leaderboard):
    assert len(official) == 29
    for model, rows in official.items():
        result = raw_win_rate(rows.preferences)
        for name in ("win_rate", "standard_error", "discrete_win_rate"):
            assert result[name] == pytest.approx(float(leaderboard[model][name]), abs=1e-9), (model, name)
        for name in ("n_wins", "n_wins_base", "n_draws", "n_total"):
            assert result[name] == int(leaderboard[model][name]), (model, name)


def equal_length_win_rates(coefficients, difficulty):
    return np.array([100 * preferences_at_equal_length(row, difficulty).mean() for row in coefficients])


@pytest.fixture(scope="module")
def official_scale(official, official_coefficients, leaderboard, difficulty):
    """[805] the estimated difficulty on the scale of the official one, from models that no test here scores.

    The estimate orders the instructions, its scale is off. Each of the 142 models without public annotations has
    official coefficients and an official LC, which one quartic of the estimate reconciles for all of them.
    """
    others = sorted(official_coefficients.keys() - official.keys())
    coefficients, goal = [official_coefficients[m] for m in others], official_lc(leaderboard, others)
    assert len(others) == 142

    def errors(quartic):
        return equal_length_win_rates(coefficients, np.polyval(quartic, difficulty)) - goal

    return np.polyval(least_squares(errors, [0, 0, 0, 1, 0]).x, difficulty)


def test_official_coefficients_give_the_official_length_controlled_win_rates(
    official, official_coefficients, leaderboard, official_scale
):
    by_text = dict(zip(official[BASELINE].instructions, official_scale, strict=True))
    errors = {
        model: length_controlled_win_rate(rows, by_text, coefficients=official_coefficients[model])[
            "length_controlled_winrate"
        ]
        - float(leaderboard[model]["length_controlled_winrate"])
        for model, rows in official.items()
    }
    assert len(errors) == 29
    assert np.mean(np.abs(list(errors.values()))) < 0.02
    assert max(errors.values(), key=abs) == pytest.approx(0.0, abs=0.15)


def test_the_scale_of_the_estimated_difficulty_is_what_errs(official, official_coefficients, leaderboard, difficulty):
    models = sorted(official)
    errors = equal_length_win_rates([official_coefficients[m] for m in models], difficulty) - official_lc(
        leaderboard, models
    )
    assert np.mean(np.abs(errors)) < 0.15
    assert [m for m, error in zip(models, errors, strict=True) if abs(error) > 0.3] == ["FuseChat-Gemma-2-9B-Instruct"]


@pytest.fixture(scope="module")
def stand_in_gamed_rows(official, official_coefficients, leaderboard, difficulty):
    """What df_gamed.csv must be like: it is not in the folder, but its two models are on the leaderboard.

    Each prefers as its official coefficients say. Length differences are normal; their mean is the official one, and
    their spread, in characters, that which gives the official win rate.
    """
    noise = np.random.default_rng(0).standard_normal(len(difficulty))
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    probabilities, differences = [], []
    for model in (f"{BASELINE}_verbose", f"{BASELINE}_concise"):
        a, b, c = official_coefficients[model]
        shift = np.mean(official[BASELINE].baseline_lengths) - float(leaderboard[model]["avg_length"])

        def p(spread, a=a, b=b, c=c, shift=shift):
            return sigmoid(a * np.tanh(shift / spread + noise) + b * difficulty + c)

        goal = float(leaderboard[model]["win_rate"])
        spread = brentq(lambda spread, p=p, goal=goal: 100 * p(spread).mean() - goal, 300, 1500)
        probabilities.append(p(spread))
        differences.append(shift / spread + noise)
    return GamedRows(
        win_probabilities=np.concatenate(probabilities),
        length_differences=np.concatenate(differences),
        difficulty=np.tile(difficulty, 2),
    )


def test_our_own_fit_is_half_a_point_from_the_leaderboard(
    official, leaderboard, difficulty_by_text, stand_in_gamed_rows
):
    errors = [
        length_controlled_win_rate(rows, difficulty_by_text, gamed=stand_in_gamed_rows)["length_controlled_winrate"]
        - float(leaderboard[model]["length_controlled_winrate"])
        for model, rows in official.items()
    ]
    assert np.mean(np.abs(errors)) < 0.6
    assert np.max(np.abs(errors)) < 1.5


def test_what_a_fit_lacks_costs_what_its_note_says(official, leaderboard, difficulty_by_text):
    for known, mean, largest in ((difficulty_by_text, 1.19, 16), (None, 6.75, 27)):
        errors = [
            abs(
                length_controlled_win_rate(rows, known)["length_controlled_winrate"]
                - float(leaderboard[model]["length_controlled_winrate"])
            )
            for model, rows in official.items()
        ]
        assert np.mean(errors) == pytest.approx(mean, abs=0.05)
        assert largest < max(errors) < largest + 1


def test_the_official_coefficients_of_phi_2_are_those_of_shifted_rows(
    official, official_coefficients, difficulty, difficulty_by_text, stand_in_gamed_rows
):
    """It answers 803 instructions; row i is not instruction i. Joined by text, difficulty counts twice as much."""
    rows, reference = official["phi-2"], official_coefficients["phi-2"]
    joined = np.array([difficulty_by_text[text] for text in rows.instructions])
    by_text = fit_coefficients(rows, joined, stand_in_gamed_rows)
    by_position = fit_coefficients(rows, difficulty[: len(rows.instructions)], stand_in_gamed_rows)
    assert by_position == pytest.approx(reference, abs=0.15)
    assert by_text.difficulty > 1.7 * reference.difficulty


def test_gamed_rows_tell_short_from_bad(official, leaderboard, difficulty_by_text, stand_in_gamed_rows):
    # All answers of this model are the same 68 characters: nothing in its own rows does.
    gamed_model, official_lc = official["gpt4_gamed"], float(leaderboard["gpt4_gamed"]["length_controlled_winrate"])
    without = length_controlled_win_rate(gamed_model, difficulty_by_text)
    assert without["length_controlled_winrate"] - official_lc > 10
    assert without["extreme_change"]
    with_gamed_rows = length_controlled_win_rate(gamed_model, difficulty_by_text, gamed=stand_in_gamed_rows)
    assert with_gamed_rows["length_controlled_winrate"] == pytest.approx(official_lc, abs=1.5)


# ----------------------------------------------------------------------------- the reference implementation


@pytest.mark.parametrize(
    ("model", "coefficients", "lc", "error"),
    # alpaca_eval 0.6.6 with scikit-learn 1.9.1, `length_controlled_noreg`, on these rows and the estimated difficulty;
    # two models whose penalty depends on the solver's draws.
    [
        ("alpaca-farm-ppo-sim-gpt4-20k", (-2.958257258, 1.345537195, -4.043472345), 7.429994613, 0.583537111),
        ("claude-instant-1.2", (-1.980232374, 1.286830166, -1.590290248), 24.670459141, 0.963395735),
    ],
)
def test_the_fit_is_that_of_the_reference_implementation(official, difficulty_by_text, model, coefficients, lc, error):
    result = length_controlled_win_rate(official[model], difficulty_by_text)
    assert result["coefficients"] == pytest.approx(Coefficients(*coefficients)._asdict(), abs=1e-6)
    assert result["length_controlled_winrate"] == pytest.approx(lc, abs=1e-6)
    assert result["lc_standard_error"] == pytest.approx(error, abs=1e-6)


@pytest.fixture
def gamed_csv(tmp_path):
    """A df_gamed.csv with 805 instructions of two gamed models, one verdict unparsed."""
    random = np.random.default_rng(1)
    difficulty = np.tile(random.normal(0.0, 1.5, 805), 2)
    differences = np.concatenate([random.normal(-0.8, 1.0, 805), random.normal(1.2, 1.0, 805)])
    p = sigmoid(-1.6 * np.tanh(differences) + 0.8 * difficulty + random.normal(size=1610))
    models = ["verbose"] * 805 + ["concise"] * 805
    path = tmp_path / "df_gamed.csv"
    write_gamed_csv(path, (models, [*range(805)] * 2, difficulty, [*p[:-1], ""], differences, [False] * 1610))
    return path


def judged_rows(seed, difficulty):
    """805 official rows with noisy preferences; old draws, certain verdicts and unparsed ones among them."""
    random = np.random.default_rng(seed)
    lengths, model_lengths = random.integers(20, 4000, (2, 805))
    standardised = (lengths - model_lengths) / np.std(lengths - model_lengths, ddof=1)
    noise = 2.0 * random.normal(size=805) - random.uniform(0, 3)
    preferences = 1.0 + sigmoid(-1.2 * np.tanh(standardised) + 0.7 * np.array(difficulty) + noise)
    preferences[:7] = [0.0, 1.5, 1.0, 2.0, math.nan, math.nan, 0.0]
    return [
        {
            "instruction": f"instruction {i}",
            "generator_1": BASELINE,
            "output_1": "x" * lengths[i],
            "generator_2": "model",
            "output_2": "y" * model_lengths[i],
            "preference": None if math.isnan(preferences[i]) else preferences[i],
            "annotator": "judge",
        }
        for i in range(805)
    ]


def test_the_fit_with_gamed_rows_is_that_of_the_reference_implementation(gamed_csv, tmp_path):
    gamed, difficulty = read_gamed_rows(gamed_csv)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(judged_rows(3, difficulty)))
    result = length_controlled_win_rate(read_annotations(path), difficulty, gamed=gamed)
    # alpaca_eval 0.6.6 with scikit-learn 1.9.1, `length_controlled_v1`, on the same two files.
    assert result["length_controlled_winrate"] == pytest.approx(27.272554606, abs=1e-6)
    assert result["lc_standard_error"] == pytest.approx(0.471326850, abs=1e-6)
    assert list(result["coefficients"].values()) == pytest.approx([-0.866656040, 0.493702103, -1.037552838], abs=1e-6)


@pytest.fixture
def upstream():
    """alpaca_eval's own module; what it sets for the whole process is set back."""
    level = logging.getLogger().level
    module = pytest.importorskip(
        "alpaca_eval.metrics.glm_winrate",
        reason="needs the peer package alpaca_eval 0.6.6, and pkg_resources (setuptools < 81)",
        exc_type=ImportError,
    )
    with sklearn.config_context():
        yield module
    logging.getLogger().setLevel(level)


@pytest.mark.filterwarnings("ignore")  # alpaca_eval's: it calls scikit-learn by names that will go.
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variant", ["length_controlled_v1", "length_controlled_noreg", "length_controlled_minimal"])
def test_every_number_is_that_of_alpaca_eval(upstream, gamed_csv, monkeypatch, tmp_path, variant, seed):
    monkeypatch.setattr(upstream, "hf_hub_download", lambda **_: gamed_csv)
    gamed, difficulty = read_gamed_rows(gamed_csv)
    rows = judged_rows(seed, difficulty)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    ours = length_controlled_win_rate(
        read_annotations(path),
        None if variant.endswith("minimal") else difficulty,
        gamed=gamed if variant.endswith("v1") else None,
    )
    theirs = upstream.get_length_controlled_winrate(rows, glm_name=variant, save_weights_dir=tmp_path)
    [weights] = csv.DictReader((tmp_path / variant / f"baseline_{BASELINE}.csv").open())
    assert ours["variant"] == variant
    if variant.endswith("minimal"):  # every prediction is the same: what upstream reports is rounding
        assert ours["lc_standard_error"] is None
        assert theirs.pop("lc_standard_error") < 1e-12
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    coefficients = [value for value in ours["coefficients"].values() if value != 0.0]
    assert coefficients == pytest.approx([float(value) for value in list(weights.values())[1:]], abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_an_extreme_change_is_one_to_alpaca_eval_too(upstream):
    for raw in range(0, 101, 4):
        for lc in np.arange(0.3, 100.0, 1.7).tolist():
            assert is_extreme_change(raw, lc) is bool(upstream.get_is_extreme_changes(raw, lc))


@pytest.mark.filterwarnings("ignore")
def test_the_baseline_against_itself_is_that_of_alpaca_eval(upstream, tmp_path):
    rows = official_rows(1.5, 0.0, 1.5, generator_2=BASELINE, annotator="judge")
    theirs = upstream.get_length_controlled_winrate(rows, save_weights_dir=None)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    ours = length_controlled_win_rate(read_annotations(path), [0.0, 1.0, 2.0])
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs)


def written_by_the_stage(path, answers):
    write_scored_answers(path, answers, dataset="tiny")


def written_by_the_job(path, answers):
    rows = [ModelOutput(instruction=a.instruction, output=a.output, generator=a.generator, dataset="") for a in answers]
    write_model_outputs(path, rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [written_by_the_stage, written_by_the_job])
def test_alpaca_eval_judges_our_model_outputs_and_we_read_its_annotations(upstream, tmp_path, write):
    """The whole way round: our answers, its annotator with a judge that always says "b", our statistics."""
    main = importlib.import_module("alpaca_eval.main")
    paths = {}
    for generator, text in (("base", "because {}"), ("aligned", "ünïcode {}\n\nfor a reason")):
        paths[generator] = tmp_path / generator / "model_outputs.json"
        score = RewardScore(mean=0.5, std=0.1, objective_weights=(0.25, 0.75), objective_scores=(-1.0, 1.0))
        answers = [
            Answer(
                prompt_id=f"p{i}",
                instruction=f"why {i} ?",
                # The first two answers of both are the same: a draw without asking the judge.
                output=text.format(i) if i > 1 else "because",
                generator=generator,
                score=score,
            )
            for i in range(12)
        ]
        write(paths[generator], answers)
    judge = tmp_path / "judge"
    judge.mkdir()
    (judge / "prompt.txt").write_text("{instruction} {output_1} {output_2}")
    config = {
        "prompt_template": "judge/prompt.txt",
        "fn_completions": "test_completions",
        "completions_kwargs": {"value": "b"},
        "fn_completion_parser": "regex_parser",
        "completion_parser_kwargs": {"outputs_to_match": {1: "a", 2: "b"}},
    }
    (judge / "configs.yaml").write_text(yaml.safe_dump({"judge": config}))
    out = tmp_path / "out"
    out.mkdir()
    leaderboard, _ = main.evaluate(
        model_outputs=paths["aligned"],
        reference_outputs=paths["base"],
        annotators_config=str(judge),
        precomputed_leaderboard=None,
        output_path=str(out),
        fn_metric="get_winrate",
        sort_by="win_rate",
        is_return_instead_of_print=True,
    )
    rows = read_annotations(out / "annotations.json")
    assert (rows.baseline, rows.model) == ("base", "aligned")
    lengths = {f"why {i} ?": len(f"ünïcode {i}\n\nfor a reason") if i > 1 else len("because") for i in range(12)}
    assert dict(zip(rows.instructions, rows.model_lengths, strict=True)) == lengths
    ours, theirs = raw_win_rate(rows.preferences), leaderboard.loc["aligned"].to_dict()
    assert ours["n_draws"] == 2
    assert {name: theirs[name] for name in ours.keys() & theirs.keys()} == pytest.approx(
        {name: ours[name] for name in ours.keys() & theirs.keys()}
    )
    assert {"win_rate", "standard_error", "discrete_win_rate", "n_wins"} <= theirs.keys()
