"""The table and the file of a judge's verdicts."""

import json
import os
import subprocess
import sys

import pytest

from jobs.score_benchmark import SCORERS, score_benchmark, score_benchmark_command
from pipeline.errors import DataError
from tests.support.paths import ROOT

parse = score_benchmark_command.options


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def arena_games(tmp_path):
    """x wins and ties, y loses, each on two questions."""
    rows = [
        {"uid": uid, "judge": "gpt-4o", "model": model, "baseline": "base", "games": [{"score": s} for s in verdicts]}
        for uid in ("q1", "q2")
        for model, verdicts in (("x", ("B>A", "A=B")), ("y", ("A>B", "B>A")))
    ]
    return jsonl(tmp_path / "judgments.jsonl", rows)


def arena_answers(tmp_path):
    rows = [
        {"question_id": uid, "model_id": model, "choices": [{"turns": [{"content": "x", "token_len": 5}]}]}
        for uid in ("q1", "q2")
        for model in ("base", "x", "y")
    ]
    return jsonl(tmp_path / "answers.jsonl", rows)


def arguments(tmp_path, benchmark, judgments, *more):
    return ["--benchmark", benchmark, "--judgments", judgments, "--out", str(tmp_path / "scores"), *more]


def test_arena_hard_ranks_the_models_and_keeps_what_the_numbers_depend_on(tmp_path):
    options = arguments(tmp_path, "arena_hard", arena_games(tmp_path), "--baseline", "base")
    table = score_benchmark(parse([*options, "--answers", arena_answers(tmp_path)]))
    header, first, second, judges = table.splitlines()
    assert judges == "judged by gpt-4o"
    assert header.split()[-5:] == ["questions", "failed", "games", "sc_upstream", "sc_uncentred"]
    assert first.split()[:2] == ["x", "75.00"]
    assert first.split()[-4:-2] == ["2", "0"]
    assert second.split()[0] == "y"
    metrics = json.loads((tmp_path / "scores" / "arena_hard.json").read_text())
    assert (metrics["baseline"], metrics["judges"], metrics["failures"]) == ("base", ["gpt-4o"], {"x": 0, "y": 0})
    assert sorted(metrics["style_control"]["sc_uncentred"]["models"]) == ["x", "y"]
    assert len(metrics["inputs"]) == 2


def test_mt_bench_shows_turns_and_categories(tmp_path):
    common = {"model": "m", "judge": ["gpt-4", "single-v1"], "user_prompt": "?", "judgment": "[[..]]"}
    grades = [(81, 1, 8), (81, 2, 6), (101, 1, 1), (102, 1, -1)]
    rows = [{**common, "question_id": q, "turn": turn, "score": s} for q, turn, s in grades]
    table = score_benchmark(parse(arguments(tmp_path, "mt_bench", jsonl(tmp_path / "j.jsonl", rows))))
    header, line, judges, note = table.splitlines()
    assert judges == "judged by gpt-4"
    assert note.startswith("A judgment without a verdict (null, NaN, MT-Bench's -1, an unknown label) counts as failed")
    assert header.split()[-3:] == ["humanities", "turns", "failed"]
    # model, average, its interval, turn 1, turn 2, writing, reasoning; the other categories are empty.
    assert line.split() == ["m", "5.00", "[1.00,", "7.00]", "4.50", "6.00", "7.00", "1.00", "4", "1"]
    metrics = json.loads((tmp_path / "scores" / "mt_bench.json").read_text())
    assert metrics["models"]["m"]["failures"] == 1
    assert metrics["verdict_rule"] == note
    assert metrics["judges"] == ["gpt-4"]


def test_alpaca_eval_ranks_models_by_their_length_controlled_rate(tmp_path):
    # Longer answers win: at equal length the model is worth less than its raw rate of 3/4.
    preferences, lengths = [2.0, 2.0, 2.0, 1.0, 2.0, 1.0, 2.0, 2.0], [90, 80, 70, 10, 60, 20, 50, 40]
    rows = [
        {
            "instruction": f"instruction {i}",
            "generator_1": "base",
            "generator_2": "long",
            "annotator": "weighted_gpt4",
            "output_1": "x" * 30,
            "output_2": "x" * length,
            "preference": preference,
        }
        for i, (preference, length) in enumerate(zip(preferences, lengths, strict=True))
    ]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(rows))
    header, line, judges, *notes = score_benchmark(
        parse(arguments(tmp_path, "alpaca_eval", str(annotations)))
    ).splitlines()
    assert header.split() == ["model", "win", "rate", "SE", "discrete", "length-controlled", "instructions", "unparsed"]
    assert line.split()[:2] == ["long", "75.00"]
    assert judges == "judged by weighted_gpt4"
    assert "fitted without instruction difficulty and gamed rows" in " ".join(notes)
    [model] = json.loads((tmp_path / "scores" / "alpaca_eval.json").read_text())["models"].values()
    assert model["length_controlled_winrate"] < 75.0
    assert (model["baseline"], model["variant"]) == ("base", "length_controlled_minimal")
    assert model["judge"] == "weighted_gpt4"


def annotations_of(path, model, baseline):
    rows = [
        {"instruction": str(i), "generator_1": baseline, "generator_2": model, "output_1": "x" * i, "output_2": "xx"}
        | {"preference": 1.2}
        for i in range(8)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize(
    ("model", "baseline", "message"),
    [
        ("b", "gpt-4o", r"2\.json: judged against 'gpt-4o', the files before it against 'gpt-4'"),
        ("a", "gpt-4", r"2\.json: 'a' is judged in a file before it"),
    ],
)
def test_alpaca_eval_files_that_do_not_make_one_table_are_refused(tmp_path, model, baseline, message):
    files = [annotations_of(tmp_path / "1.json", "a", "gpt-4"), annotations_of(tmp_path / "2.json", model, baseline)]
    with pytest.raises(DataError, match=message):
        score_benchmark(parse(["--benchmark", "alpaca_eval", "--judgments", *files, "--out", str(tmp_path / "scores")]))


def test_a_withheld_rate_is_said_and_ranked_last(tmp_path):
    decided = annotations_of(tmp_path / "1.json", "decided", "gpt-4")
    rows = json.loads((tmp_path / "1.json").read_text())
    draws = [row | {"generator_2": "draws", "preference": 1.5} for row in rows]
    (tmp_path / "2.json").write_text(json.dumps(draws))
    files = [str(tmp_path / "2.json"), decided]
    options = parse(["--benchmark", "alpaca_eval", "--judgments", *files, "--out", str(tmp_path / "scores")])
    _, first, second, *notes = score_benchmark(options).splitlines()
    assert (first.split()[0], second.split()[0]) == ("decided", "draws")
    assert second.split()[4] == "withheld"
    assert "The length-controlled win rate of draws is withheld" in " ".join(notes)
    models = json.loads((tmp_path / "scores" / "alpaca_eval.json").read_text())["models"]
    assert models["draws"]["length_controlled_winrate"] is None


@pytest.mark.parametrize("num_rows", [1, 3])
def test_few_verdicts_have_a_raw_rate_and_no_length_controlled_one(num_rows, tmp_path):
    file = tmp_path / "1.json"
    annotations_of(file, "few", "gpt-4")
    file.write_text(json.dumps(json.loads(file.read_text())[:num_rows]))
    out = tmp_path / "scores"
    _, line, *notes = score_benchmark(
        parse(["--benchmark", "alpaca_eval", "--judgments", str(file), "--out", str(out)])
    ).splitlines()
    assert line.split()[1] == "20.00"
    assert "withheld" in line
    assert f"5 folds, and {num_rows} rows have a preference" in " ".join(notes)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    [model] = json.loads((out / "alpaca_eval.json").read_text(), parse_constant=refuse)["models"].values()
    assert model["win_rate"] == pytest.approx(20.0)
    assert (model["standard_error"] is None) == (num_rows == 1)


def test_an_alpaca_eval_file_counts_once_however_it_is_named(tmp_path):
    file, link = annotations_of(tmp_path / "1.json", "a", "gpt-4"), tmp_path / "link.json"
    link.symlink_to(file)
    for again in (file, os.path.relpath(file), str(link)):
        options = parse(["--benchmark", "alpaca_eval", "--judgments", file, again, "--out", str(tmp_path / "scores")])
        with pytest.raises(DataError, match="'a' is judged in a file before it"):
            score_benchmark(options)


def test_the_same_judgments_give_the_same_file(tmp_path):
    options = parse(arguments(tmp_path, "arena_hard", arena_games(tmp_path), "--baseline", "base"))
    files = []
    for _ in range(2):
        score_benchmark(options)
        files.append((tmp_path / "scores" / "arena_hard.json").read_text())
    assert files[0] == files[1]


def test_a_flag_of_another_benchmark_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(arguments(tmp_path, "mt_bench", "j.jsonl", "--baseline", "base"))
    assert "--baseline and --answers mean nothing to mt_bench" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", sorted(SCORERS))
def test_a_bad_file_is_an_error_message_and_writes_nothing(benchmark, tmp_path):
    command = [sys.executable, "-m", "jobs.score_benchmark"]
    command += arguments(tmp_path, benchmark, jsonl(tmp_path / "j.jsonl", [{"uid": "q"}]))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "DataError: " in done.stderr
    assert "j.jsonl, line 1, field" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "scores").exists()
