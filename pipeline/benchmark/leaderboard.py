"""The paper's Table 1: a row for each policy, from the files that score_benchmark wrote (vrm_spec section 13)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError


@dataclass(frozen=True, kw_only=True)
class LeaderboardRow:
    """One policy; each cell is a number with what is known of its error, empty where the benchmark was not scored."""

    policy: str
    alpaca_eval_wr: str
    alpaca_eval_lc: str
    arena_hard_wr: str
    arena_hard_sc: str
    mt_bench: str


def read_scores(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Benchmark -> the content of its <benchmark>.json.

    Raises:
        DataError: a file that score_benchmark did not write, or two of one benchmark.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            scores = json.loads(file.read_text())
            benchmark, models = scores["benchmark"], scores["models"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} holds no scores ({error!r}); give a file that score_benchmark wrote") from error
        if benchmark not in ("alpaca_eval", "arena_hard", "mt_bench") or not isinstance(models, dict):
            raise DataError(f"{file} holds scores of {benchmark!r}, which has no column in the table")
        if benchmark in found:
            raise DataError(f"{file} is a second file of {benchmark}; score all models together, into one")
        found[benchmark] = scores
    return found


def leaderboard(policies: Sequence[str], scores: Mapping[str, Mapping[str, Any]]) -> list[LeaderboardRow]:
    """One row for each policy, in their order; none without scores.

    Raises:
        DataError: a benchmark whose scores are those of none of the policies.
    """
    for benchmark, content in scores.items():
        if not set(policies) & {*content["models"], *_baselines(content)}:
            raise DataError(
                f"the scores of {benchmark} are those of {', '.join(content['models'])}, none of which is compared "
                f"here ({', '.join(policies)}). Are the models named as in the files of answers?"
            )
    return [_row(policy, scores) for policy in policies] if scores else []


def notes(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers of each benchmark depend on, as sentences."""
    found = []
    if "alpaca_eval" in scores:
        models = scores["alpaca_eval"]["models"].values()
        found.append(f"AlpacaEval 2 against {', '.join(sorted({m['baseline'] for m in models}))}, ± standard error.")
        found += sorted({note for m in models for note in m["notes"]})
    if "arena_hard" in scores:
        arena = scores["arena_hard"]
        pool = ", ".join(sorted(arena["models"]))
        found.append(
            f"Arena-Hard against {arena['baseline']}, judged by {', '.join(arena['judges']) or 'an unnamed judge'}, "
            "95% intervals over questions."
        )
        if arena["style_control"]:
            found.append(
                f"SC is fitted over {pool} together; in brackets the uncentred one, of answers of equal style."
            )
    if "mt_bench" in scores:
        found.append(f"MT-Bench graded by {', '.join(scores['mt_bench']['judges'])}, 95% intervals over questions.")
    return found


def _row(policy: str, scores: Mapping[str, Mapping[str, Any]]) -> LeaderboardRow:
    alpaca, arena, mt = (
        scores.get(benchmark, {}).get("models", {}).get(policy)
        for benchmark in ("alpaca_eval", "arena_hard", "mt_bench")
    )
    control = scores.get("arena_hard", {}).get("style_control", {})
    return LeaderboardRow(
        policy=policy,
        alpaca_eval_wr=f"{alpaca['win_rate']:.2f} ± {alpaca['standard_error']:.2f}" if alpaca else "",
        # Without difficulties every instruction is predicted alike, and the standard error says nothing.
        alpaca_eval_lc=(
            f"{alpaca['length_controlled_winrate']:.2f}"
            + (f" ± {alpaca['lc_standard_error']:.2f}" if alpaca["lc_standard_error"] else "")
            if alpaca
            else ""
        ),
        arena_hard_wr=f"{arena['win_rate']:.1f} [{arena['low']:.1f}, {arena['high']:.1f}]" if arena else "",
        arena_hard_sc=(
            f"{control['sc_upstream']['models'][policy]['win_rate']:.1f} "
            f"({control['sc_uncentred']['models'][policy]['win_rate']:.1f})"
            if arena and control
            else ""
        ),
        mt_bench=f"{mt['average']:.2f} [{mt['low']:.2f}, {mt['high']:.2f}]" if mt else "",
    )


def _baselines(content: Mapping[str, Any]) -> set[str]:
    named = {content.get("baseline"), *(model.get("baseline") for model in content["models"].values())}
    return {name for name in named if name is not None}
