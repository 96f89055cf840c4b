"""One page from which a person can choose between policies.

    python jobs/compare_policies.py base/model_outputs.json aligned/model_outputs.json --out comparison.html
    python jobs/compare_policies.py base/model_outputs.json aligned/model_outputs.json \\
        --judgments results/annotations.json --scores scores/alpaca_eval.json scores/mt_bench.json \\
        --categories planted.json --objectives helpfulness,honesty --out comparison.html

Reads answers of any generator; those of generate_benchmark carry rewards, and the reward model is then a judge as well.
The first file is what the others are held against. --judgments are files of judge_benchmark about these answers,
--scores those of score_benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError


def compare_policies(options: argparse.Namespace) -> None:
    """Writes the page."""
    from pipeline.benchmark import comparison_page as page
    from pipeline.benchmark import leaderboard
    from pipeline.benchmark.alpaca_eval import read_annotations

    categories = page.read_categories(options.categories) if options.categories else {}
    contest = page.contest([page.read_policy(file, categories) for file in options.answers])
    scores = leaderboard.read_scores(options.scores)
    html = page.comparison_page(
        contest,
        judged=[read_annotations(file) for file in options.judgments],
        leaderboard=leaderboard.leaderboard(contest.policies, scores),
        notes=leaderboard.notes(scores),
        objectives=tuple(filter(None, options.objectives.split(","))),
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(html)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", nargs="+", type=Path, metavar="FILE", help="model_outputs.json of a policy")
    parser.add_argument("--judgments", nargs="+", type=Path, default=[], metavar="FILE", help="annotations.json")
    parser.add_argument("--scores", nargs="+", type=Path, default=[], metavar="FILE", help="<benchmark>.json: Table 1")
    parser.add_argument("--categories", type=Path, metavar="FILE", help="planted.json, or question.jsonl")
    parser.add_argument("--objectives", default="", help="their names, in the recipe's order: helpfulness,honesty,...")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"))
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    try:
        compare_policies(options)
    except (PipelineError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"comparison: {options.out.resolve()}")


if __name__ == "__main__":
    main()
