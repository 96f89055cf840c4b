"""Seconds of AlpacaEval's statistics, raw and length-controlled, for many models of 805 annotated instructions.

    python -m tests.performance.alpaca_eval_statistics_speed --models 50

Preferences are drawn from the logistic model that is fitted; two gamed models stand in for df_gamed.csv.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from pipeline.benchmark.alpaca_eval.annotations import Annotations
from pipeline.benchmark.alpaca_eval.win_rates import ALPACA_EVAL_BASELINE, GamedRows, length_controlled_win_rate
from tests.performance.processor import processor

INSTRUCTIONS = 805


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=50)
    options = parser.parse_args()
    print(processor())
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0.0, 1.5, INSTRUCTIONS)
    gaps = np.concatenate([rng.normal(-0.8, 1.0, INSTRUCTIONS), rng.normal(1.2, 1.0, INSTRUCTIONS)])
    twice = np.tile(difficulty, 2)
    gamed = GamedRows(
        win_probabilities=sigmoid(-1.6 * np.tanh(gaps) + 0.8 * twice), length_differences=gaps, difficulty=twice
    )
    models = [annotations(f"model {k}", difficulty, rng) for k in range(options.models)]
    for name, rows in (("with gamed rows", gamed), ("without", None)):
        start, cpu = time.perf_counter(), time.process_time()
        for model in models:
            length_controlled_win_rate(model, difficulty, gamed=rows)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
        print(f"{options.models} models x {INSTRUCTIONS} rows, {name}: {wall:.2f} s ({cpu:.2f} s of CPU)")


def annotations(model: str, difficulty: np.ndarray, rng: np.random.Generator) -> Annotations:
    lengths, ours = rng.integers(20, 4000, (2, INSTRUCTIONS))
    gap = (lengths - ours) / np.std(lengths - ours, ddof=1)
    logits = -1.2 * np.tanh(gap) + 0.7 * difficulty + 2.0 * rng.normal(size=INSTRUCTIONS) - rng.uniform(0, 3)
    return Annotations(
        baseline=ALPACA_EVAL_BASELINE,
        model=model,
        instructions=[f"instruction {i}" for i in range(INSTRUCTIONS)],
        preferences=(1.0 + sigmoid(logits)).tolist(),
        baseline_lengths=lengths.tolist(),
        model_lengths=ours.tolist(),
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


if __name__ == "__main__":
    main()
