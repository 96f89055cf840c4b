"""Tables 1 and 2 of the paper's form, and the reading of each row in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.benchmark.alpaca_eval.annotations import Annotations
from pipeline.data.preferences import normalised_prompt
from pipeline.errors import DataError
from pipeline.evaluation.bootstrap import bootstrap_intervals
from pipeline.evaluation.pair_metrics import accuracy_metrics
from pipeline.experiments.findings import FinishedRun, Spread, spread
from pipeline.experiments.method_measurements import TABLE2
from pipeline.records import Metrics

JUDGES = {"gold": "gold", "reward": "VRM", "judge": "judge"}
"""Reading of the margins -> what the table calls the judge."""

BUDGET = {
    "budget/pairs": "pairs",
    "budget/pair_passes": "pair passes",
    "budget/steps": "optimiser steps",
    "budget/trained_tokens": "tokens trained",
    "budget/sampled_tokens": "tokens sampled",
    "budget/seconds": "seconds",
}
OTHER_COLUMNS = {
    "words": "words (start)",
    "kl/to_start": "KL to the start",
    "response/finished": "finished",
}


def comparison_tables(finished: Sequence[FinishedRun]) -> dict[str, Any]:
    """All numbers of both tables as plain data: what the markdown shows, and the values of each seed."""
    cells = _by_method(finished)
    return {
        "seeds": sorted({f.run.seed for f in finished}),
        "recipe": finished[0].run.recipe.name,
        "table1": {method: _policy_row(runs) for method, runs in cells.items()},
        "table2": {method: _reward_row(runs) for method, runs in cells.items()},
        "readings": {method: reading(method, runs) for method, runs in cells.items()},
    }


def win_rate(runs: Sequence[FinishedRun], judge: str) -> tuple[float, float, float]:
    """(value, low, high): share of prompts on which the aligned policy's answer is better than the start's.

    A tie counts one half. A judge of the benchmark room gives probabilities, which are averaged; prompts without a
    verdict do not count. The prompts of all seeds are pooled; the 95% interval resamples prompts, so it does not cover
    the variation with the seed.

    Args:
        judge: a key of `JUDGES` that all runs have.
    """
    margins = np.concatenate([np.array(f.result["margins"][judge], dtype=float) for f in runs])
    judged = ~np.isnan(margins)
    prompts = np.array([prompt for f in runs for prompt in f.result["prompts"]])[judged]
    margins = margins[judged]

    def statistic(rows: np.ndarray) -> Metrics:
        if judge == "judge":
            return {"win_rate": float(margins[rows].mean()) + 0.5}
        return {"win_rate": accuracy_metrics(margins[rows])["accuracy_tie_half"]}

    return statistic(np.arange(len(margins)))["win_rate"], *bootstrap_intervals(statistic, prompts, seed=0)["win_rate"]


def with_judgments(f: FinishedRun, annotations: Annotations) -> FinishedRun:
    """The cell with a judge's win probabilities minus one half, NaN where the judge gave no verdict.

    Args:
        annotations: the aligned policy's answers against the start's, to prompts of one turn.

    Raises:
        DataError: a prompt of the cell was not judged.
    """
    texts = [normalised_prompt([{"role": "user", "content": text}]) for text in annotations.instructions]
    probabilities = dict(zip(texts, annotations.win_probabilities(), strict=True))
    prompts = f.result["prompts"]
    missing = [prompt for prompt in prompts if prompt not in probabilities]
    if missing:
        raise DataError(
            f"the judgments of {f.run.variant.name}, seed {f.run.seed}, lack {len(missing)} of {len(prompts)} prompts, "
            f"first {missing[0]!r:.60}. Judge all answers of the cell."
        )
    found = [probabilities[prompt] for prompt in prompts]
    margins = {**f.result["margins"], "judge": [math.nan if p is None else p - 0.5 for p in found]}
    return FinishedRun(run=f.run, result={**f.result, "margins": margins})


def reading(method: str, runs: Sequence[FinishedRun]) -> str:
    """One sentence on a method as a policy, and one on its reward."""
    judge = _judges(runs)[0]
    rate, low, high = win_rate(runs, judge)
    verdict = "beats the start" if low > 0.5 else "loses to the start" if high < 0.5 else "is not told from the start"
    by_seed = [win_rate([f], judge) for f in runs]
    above = sum(lower > 0.5 for _, lower, _ in by_seed)
    words, start = _mean(runs, "words/aligned"), _mean(runs, "words/base")
    length = (
        "as long"
        if abs(words / start - 1) < 0.02
        else f"{abs(words / start - 1):.0%} " + ("longer" if words > start else "shorter")
    )
    reward = next(iter(_reward_row(runs).items()), None)
    sentence = (
        f"{method} {verdict} by {JUDGES[judge]}: {rate:.0%} [{low:.0%}, {high:.0%}] of its answers win, with an "
        f"interval above one half in {above} of {len(runs)} seeds; its answers are {length}, at a KL of "
        f"{_mean(runs, 'kl/to_start'):.1f} nats a response."
    )
    if reward is None:
        return sentence
    name, accuracy = reward
    return f"{sentence} Its reward orders {accuracy['mean']:.0%} of the {name.rpartition('/')[0]} as they are labelled."


def as_markdown(tables: Mapping[str, Any]) -> str:
    """Both tables, the budget and the readings."""
    seeds = ", ".join(map(str, tables["seeds"]))
    judges = next(iter(tables["table1"].values()))["win_rates"]
    policy_heads = ["method", *(f"{JUDGES[judge]} win rate %" for judge in judges), *OTHER_COLUMNS.values()]
    lines = [
        f"# Alignment methods, recipe {tables['recipe']}, seeds {seeds}",
        "",
        "One fine-tuned policy (the start) and one data set a seed. Win rates are against the start on held-out "
        "prompts; brackets hold 95% intervals over prompts of all seeds, and the rates of single seeds follow. KL in "
        "nats a response, from samples at temperature 1. VRM is also the reward that vrm_ppo was trained on.",
        "",
        "## Table 1: policies",
        "",
        _row(policy_heads),
        _row(["---"] * len(policy_heads)),
        *(_row(_policy_cells(method, row)) for method, row in tables["table1"].items()),
        "",
        "## Budget",
        "",
        _row(["method", *BUDGET.values()]),
        _row(["---"] * (len(BUDGET) + 1)),
        *(
            _row([method, *(f"{row['budget'][key]:,.0f}" for key in BUDGET)])
            for method, row in tables["table1"].items()
        ),
        "",
        "## Table 2: rewards",
        "",
        *_reward_table(tables["table2"]),
        "",
        "## Readings",
        "",
        *(f"- {sentence}" for sentence in tables["readings"].values()),
        "",
    ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------- rows


def _by_method(finished: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    cells: dict[str, list[FinishedRun]] = {}
    for f in finished:
        cells.setdefault(f.run.variant.name, []).append(f)
    return cells


def _judges(runs: Sequence[FinishedRun]) -> list[str]:
    return [judge for judge in JUDGES if all(judge in f.result["margins"] for f in runs)]


def _policy_row(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    rates = {}
    for judge in _judges(runs):
        value, low, high = win_rate(runs, judge)
        by_seed = {f.run.seed: win_rate([f], judge) for f in runs}
        rates[judge] = {"value": value, "low": low, "high": high, "by_seed": by_seed}
    return {
        "win_rates": rates,
        "words": _mean(runs, "words/aligned"),
        "words_of_the_start": _mean(runs, "words/base"),
        "kl/to_start": _mean(runs, "kl/to_start"),
        "response/finished": _mean(runs, "response/finished"),
        "budget": {key: _mean(runs, key) for key in BUDGET},
    }


def _reward_row(runs: Sequence[FinishedRun]) -> dict[str, dict[str, Any]]:
    """Benchmark and metric -> mean over seeds, with an interval over seeds or, of one seed, over rows."""
    names = [
        name.removeprefix(TABLE2)
        for name in runs[0].result["metrics"]
        if name.startswith(TABLE2) and not name.endswith(("/low", "/high"))
    ]
    row = {}
    for name in names:
        key = f"{TABLE2}{name}"
        found = spread([f.result["metrics"][key] for f in runs])
        if len(runs) == 1:
            metrics = runs[0].result["metrics"]
            low, high = metrics.get(f"{key}/low", math.nan), metrics.get(f"{key}/high", math.nan)
            found = Spread(values=found.values, mean=found.mean, low=low, high=high)
        interval = [None if math.isnan(end) else end for end in (found.low, found.high)]
        row[name] = {"mean": found.mean, "low": interval[0], "high": interval[1], "by_seed": list(found.values)}
    return row


def _mean(runs: Sequence[FinishedRun], metric: str) -> float:
    return float(np.mean([f.result["metrics"][metric] for f in runs]))


# ----------------------------------------------------------------------------- markdown


def _policy_cells(method: str, row: Mapping[str, Any]) -> list[str]:
    cells = [method]
    for rate in row["win_rates"].values():
        seeds = " ".join(f"{100 * value:.0f}" for value, _, _ in rate["by_seed"].values())
        cells.append(f"{100 * rate['value']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}] ({seeds})")
    return [
        *cells,
        f"{row['words']:.1f} ({row['words_of_the_start']:.1f})",
        f"{row['kl/to_start']:.2f}",
        f"{row['response/finished']:.0%}",
    ]


def _reward_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return [
        _row(["method", *(name.replace("/", ": ") for name in names)]),
        _row(["---"] * (len(names) + 1)),
        *(_row([method, *(_accuracy_cell(row.get(name)) for name in names)]) for method, row in rows.items()),
    ]


def _accuracy_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{100 * found['mean']:.1f}"
    return f"{100 * found['mean']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
