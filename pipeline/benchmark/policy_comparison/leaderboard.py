"""The paper's Table 1, one row per policy, from the files that score_benchmark wrote (docs/method.md section 15)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.files import read_json
from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """A table of policies by benchmarks. A cell is a number with its error where that is known, or is empty."""

    columns: tuple[tuple[str, str], ...]
    """(benchmark with its judges, metric with the kind of its interval)"""
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """(policy, cells)"""
    notes: tuple[str, ...]
    """Sentences that say what the numbers depend on."""


def read_scores(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Benchmark -> the content of <benchmark>.json.

    Raises:
        DataError: score_benchmark did not write a file, or two files are of one benchmark.
    """
    by_benchmark: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            scores = read_json(file)
            benchmark, models = scores["benchmark"], scores["models"]
        except (DataError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} holds no scores ({error!r}); give a file that score_benchmark wrote") from error
        if benchmark not in LEADERBOARD_COLUMNS or not isinstance(models, dict):
            raise DataError(f"{file} holds scores of {benchmark!r}, which has no column in the table")
        if benchmark in by_benchmark:
            raise DataError(f"{file} is a second file of {benchmark}; score all models together, into one")
        by_benchmark[benchmark] = scores
    return by_benchmark


def leaderboard(
    policies: Sequence[str],
    scores: Mapping[str, Mapping[str, Any]],
    words: Mapping[str, Mapping[str, float]],
) -> Leaderboard | None:
    """One row per policy, in the order given, over the benchmarks that have scores; None without scores.

    Args:
        scores: as `read_scores`.
        words: benchmark -> policy -> mean number of words per answer, shown beside the win rate.

    Raises:
        DataError: a benchmark has scores, but of none of the policies.
    """
    if not scores:
        return None
    for benchmark, content in scores.items():
        if not set(policies) & {*content["models"], *_baselines(content)}:
            raise DataError(
                f"the scores of {benchmark} are those of {', '.join(content['models'])}, none of which is compared "
                f"here ({', '.join(policies)}). Are the models named as in the files of answers?"
            )
    columns: list[tuple[str, str]] = []
    cells: dict[str, list[str]] = {policy: [] for policy in policies}
    for benchmark, (title, names, cells_of) in LEADERBOARD_COLUMNS.items():
        if benchmark not in scores:
            continue
        title = f"{title}, judge: {', '.join(scores[benchmark]['judges']) or 'unnamed'}"
        columns += [(title, name) for name in names]
        for policy in policies:
            cells[policy] += cells_of(scores[benchmark], policy)
        if benchmark in words:
            columns.append((title, "words"))
            for policy in policies:
                mean = words[benchmark].get(policy)
                cells[policy].append("" if mean is None else f"{mean:.0f}")
    return Leaderboard(
        columns=tuple(columns),
        rows=tuple((policy, tuple(row)) for policy, row in cells.items()),
        notes=tuple(leaderboard_notes(scores)),
    )


def leaderboard_notes(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences that say what the numbers of each benchmark depend on."""
    notes = []
    if "alpaca_eval" in scores:
        models = scores["alpaca_eval"]["models"].values()
        baselines = ", ".join(sorted({m["baseline"] for m in models}))
        notes.append(f"AlpacaEval 2 against {baselines}, ± standard error; LC is the win rate at equal length.")
        notes += sorted({note for m in models for note in m["notes"]})
    if "arena_hard" in scores:
        arena = scores["arena_hard"]
        pool = ", ".join(sorted(arena["models"]))
        notes.append(
            f"Arena-Hard against {arena['baseline']}, judged by {', '.join(arena['judges']) or 'an unnamed judge'}, "
            "95% intervals over questions."
        )
        if arena["style_control"]:
            notes.append(
                f"SC holds length and markdown equal, fitted over {pool} together, as upstream. The uncentred rate in "
                "brackets also removes the effect of the average answer being longer than the baseline's."
            )
    if "mt_bench" in scores:
        notes.append(f"MT-Bench graded by {', '.join(scores['mt_bench']['judges'])}, 95% intervals over questions.")
    return notes


def _alpaca_eval(scores: Mapping[str, Any], policy: str) -> tuple[str, ...]:
    m = scores["models"].get(policy)
    if m is None:
        return (_baseline(scores, policy), "")
    error = "" if m["lc_standard_error"] is None else f" ± {m['lc_standard_error']:.2f}"
    controlled = m["length_controlled_winrate"]
    return (
        f"{m['win_rate']:.2f} ± {m['standard_error']:.2f}",
        "withheld" if controlled is None else f"{controlled:.2f}{error}",
    )


def _arena_hard(scores: Mapping[str, Any], policy: str) -> tuple[str, ...]:
    m, control = scores["models"].get(policy), scores["style_control"]
    if m is None:
        return (_baseline(scores, policy), "")
    controlled = [control[name]["models"][policy]["win_rate"] for name in ("sc_upstream", "sc_uncentred") if control]
    return (
        f"{m['win_rate']:.1f} [{m['low']:.1f}, {m['high']:.1f}]",
        "{:.1f} ({:.1f})".format(*controlled) if controlled else "",
    )


def _mt_bench(scores: Mapping[str, Any], policy: str) -> tuple[str, ...]:
    m = scores["models"].get(policy)
    if m is None:
        return ("", "", "")
    turns = (f"{m[turn]:.2f}" if turn in m else "" for turn in ("turn_1", "turn_2"))
    return (f"{m['average']:.2f} [{m['low']:.2f}, {m['high']:.2f}]", *turns)


def _baseline(scores: Mapping[str, Any], policy: str) -> str:
    return "baseline" if policy in _baselines(scores) else ""


LEADERBOARD_COLUMNS = {
    "alpaca_eval": ("AlpacaEval 2", ("WR ± standard error", "LC ± standard error"), _alpaca_eval),
    "arena_hard": ("Arena-Hard", ("WR [95% bootstrap]", "SC, no interval"), _arena_hard),
    "mt_bench": ("MT-Bench", ("average [95% bootstrap]", "turn 1, no interval", "turn 2, no interval"), _mt_bench),
}
"""Benchmark -> (title, columns, function for the cells of a policy)."""


def _baselines(content: Mapping[str, Any]) -> set[str]:
    named = {content.get("baseline"), *(model.get("baseline") for model in content["models"].values())}
    return {name for name in named if name is not None}
