"""Scores of a judge's verdicts: a table on the terminal and <benchmark>.json in --out.

    python jobs/score_benchmark.py --benchmark arena_hard --judgments model_judgment/gpt-4o/*.jsonl \\
        --baseline gpt-4-1106-preview --answers model_answer/*.jsonl --out runs/scores
    python jobs/score_benchmark.py --benchmark mt_bench --judgments gpt-4_single.jsonl --out runs/scores
    python jobs/score_benchmark.py --benchmark alpaca_eval --judgments aligned/annotations.json \\
        --gamed df_gamed.csv --out runs/scores

Needs no cluster. Arena-Hard's models are fitted together: with --answers, style-controlled rates depend on which are
given.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.command_line import Command
from pipeline.benchmark.alpaca_eval.annotations import read_annotations
from pipeline.benchmark.arena_hard.answers import answer_styles, read_arena_answers
from pipeline.benchmark.arena_hard.games import ARENA_HARD_BASELINE, read_games
from pipeline.benchmark.arena_hard.style_control import style_controlled_win_rates
from pipeline.benchmark.arena_hard.win_rates import bradley_terry_win_rates
from pipeline.benchmark.mt_bench import grades as mt_bench
from pipeline.benchmark.verdict_number import VERDICT_RULE
from pipeline.data.files import content_fingerprint
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a benchmark says: all of it for the file, the headline for the terminal."""

    judges: list[str]
    """Sorted; a file that names none has judge "unnamed"."""
    metrics: dict[str, Any]
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]
    """What to know of the numbers, to stand below them."""
    num_failed: int
    """Judgments and games without a verdict, of all models."""


def score_arena_hard(options: argparse.Namespace) -> Scored:
    """Win rates over the baseline; style-controlled ones too where answers are given."""
    games = read_games(options.judgments, baseline=options.baseline)
    models = bradley_terry_win_rates(games.battles, options.baseline, seed=options.seed)
    questions = Counter(model for model, _ in {(battle.model_b, battle.question_id) for battle in games.battles})
    header = ["model", "win rate", "95% over questions", "95% as upstream", "questions", "failed games"]
    columns = {
        model: [
            _number(m["win_rate"]),
            _interval(m["low"], m["high"]),
            _interval(m["upstream_low"], m["upstream_high"]),
            str(questions[model]),
            str(games.failures.get(model, 0)),
        ]
        for model, m in models.items()
    }
    controlled = {}
    if options.answers:
        styles = answer_styles(read_arena_answers(options.answers))
        for name, centred in (("sc_upstream", True), ("sc_uncentred", False)):
            controlled[name] = style_controlled_win_rates(
                games.battles, styles, options.baseline, centred=centred, seed=options.seed
            )
            header.append(name)
            for model, m in controlled[name].models.items():
                columns[model].append(_number(m["win_rate"]))
    metrics = {
        "baseline": options.baseline,
        "failures": games.failures,
        "models": models,
        "style_control": {name: asdict(control) for name, control in controlled.items()},
    }
    ranked = sorted(columns, key=lambda model: -models[model]["win_rate"])
    return Scored(
        judges=sorted(games.judges),
        metrics=metrics,
        header=tuple(header),
        rows=[(model, *columns[model]) for model in ranked],
        notes=[],
        num_failed=sum(games.failures.values()),
    )


def score_mt_bench(options: argparse.Namespace) -> Scored:
    """Mean grades."""
    judgments = mt_bench.read_grades(options.judgments)
    models = mt_bench.mean_grades(judgments, seed=options.seed)
    ranked = sorted(models, key=lambda model: -models[model]["average"])
    keys = ("average", "turn_1", "turn_2", *(f"category/{name}" for name in mt_bench.MT_BENCH_CATEGORIES))
    rows = []
    for model in ranked:
        m = models[model]
        grades = [_number(m[key]) if key in m else "" for key in keys]
        counts = (f"{m['judgments']:.0f}", f"{m['failures']:.0f}")
        rows.append((model, grades[0], _interval(m["low"], m["high"]), *grades[1:], *counts))
    return Scored(
        judges=sorted({judgment.judge for judgment in judgments}),
        metrics={"models": models},
        header=(
            "model",
            "average",
            "95% over questions",
            "turn 1",
            "turn 2",
            *mt_bench.MT_BENCH_CATEGORIES,
            "turns",
            "failed",
        ),
        rows=rows,
        notes=[],
        num_failed=int(sum(m["failures"] for m in models.values())),
    )


def score_alpaca_eval(options: argparse.Namespace) -> Scored:
    """Raw and length-controlled win rates over the baseline, a model per file."""
    from pipeline.benchmark.alpaca_eval import (
        win_rates as alpaca_eval,  # brings scikit-learn, which --help does without
    )

    gamed, difficulty = alpaca_eval.read_gamed_rows(options.gamed) if options.gamed else (None, None)
    models: dict[str, dict[str, Any]] = {}
    rows = []
    for file in options.judgments:
        annotations = read_annotations(Path(file))
        if annotations.model in models:
            raise DataError(f"{file}: {annotations.model!r} is judged in a file before it, too; give one of them.")
        others = {m["baseline"] for m in models.values()} - {annotations.baseline}
        if others:
            raise DataError(
                f"{file}: judged against {annotations.baseline!r}, the files before it against {others.pop()!r}. "
                "Score them apart."
            )
        m = alpaca_eval.length_controlled_win_rate(annotations, difficulty, gamed=gamed)
        # A single verdict has no standard error, and JSON no NaN.
        error = None if math.isnan(m["standard_error"]) else m["standard_error"]
        judge = annotations.judge or "unnamed"
        models[annotations.model] = m | {"standard_error": error, "baseline": annotations.baseline, "judge": judge}
        rows.append(
            (
                annotations.model,
                _number(m["win_rate"]),
                "" if error is None else _number(error),
                _number(m["discrete_win_rate"]),
                "withheld" if m["length_controlled_winrate"] is None else _number(m["length_controlled_winrate"]),
                "far from the raw one" if m["extreme_change"] else "",
                str(len(annotations.instructions)),
                str(m["n_unparsed"]),
            )
        )
    return Scored(
        judges=sorted({m["judge"] for m in models.values()}),
        metrics={"models": models},
        header=("model", "win rate", "SE", "discrete", "length-controlled", "", "instructions", "unparsed"),
        rows=sorted(rows, key=lambda row: _alpaca_eval_rank(models[row[0]])),
        notes=sorted({note for m in models.values() for note in m["notes"]}),
        num_failed=sum(m["n_unparsed"] for m in models.values()),
    )


def _alpaca_eval_rank(model: dict[str, Any]) -> tuple[bool, float]:
    """By the length-controlled win rate; models without one come last, by the win rate."""
    length_controlled = model["length_controlled_winrate"]
    return length_controlled is None, -(model["win_rate"] if length_controlled is None else length_controlled)


SCORERS: dict[str, Callable[[argparse.Namespace], Scored]] = {
    "alpaca_eval": score_alpaca_eval,
    "arena_hard": score_arena_hard,
    "mt_bench": score_mt_bench,
}


def score_benchmark(options: argparse.Namespace) -> str:
    """Writes the metrics; returns the table, and what to know of it."""
    scored = SCORERS[options.benchmark](options)
    inputs = {
        file: content_fingerprint(file)
        for file in (*options.judgments, *(options.answers or ()), *_as_list(options.gamed))
    }
    metrics = {
        "benchmark": options.benchmark,
        "judges": scored.judges,
        **scored.metrics,
        "verdict_rule": VERDICT_RULE,
        "seed": options.seed,
        "inputs": inputs,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.benchmark}.json").write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    return "\n".join(
        [
            aligned_columns(scored.header, scored.rows),
            f"judged by {', '.join(scored.judges)}",
            *scored.notes,
            *([VERDICT_RULE] if scored.num_failed else []),
        ]
    )


def aligned_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in (header, *rows)
    )


def _as_list(file: Path | None) -> list[str]:
    return [] if file is None else [str(file)]


def _number(value: float) -> str:
    return f"{value:.2f}"


def _interval(low: float, high: float) -> str:
    return f"[{low:.2f}, {high:.2f}]"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark", required=True, choices=sorted(SCORERS), metavar="NAME", help=", ".join(sorted(SCORERS))
    )
    parser.add_argument("--judgments", required=True, nargs="+", metavar="FILE", help="as the judge's job writes them")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where <benchmark>.json is written")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    arena = parser.add_argument_group("arena_hard only")
    arena.add_argument(
        "--baseline",
        metavar="MODEL",
        help=f"the model that the judge compared with ({ARENA_HARD_BASELINE})",
    )
    arena.add_argument("--answers", nargs="+", metavar="FILE", help="all models' answers: adds style control")
    alpaca = parser.add_argument_group("alpaca_eval only")
    alpaca.add_argument("--gamed", type=Path, metavar="FILE", help="df_gamed.csv: length control as on the leaderboard")


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.gamed and options.benchmark != "alpaca_eval":
        parser.error(f"--gamed means nothing to {options.benchmark}")
    if options.benchmark == "arena_hard":
        options.baseline = options.baseline or ARENA_HARD_BASELINE
    elif options.baseline or options.answers:
        parser.error(f"--baseline and --answers mean nothing to {options.benchmark}")


score_benchmark_command = Command(
    documentation=__doc__,
    add_options=_add_options,
    check_options=_check_options,
    run=lambda options: print(score_benchmark(options)),
)

if __name__ == "__main__":
    score_benchmark_command()
