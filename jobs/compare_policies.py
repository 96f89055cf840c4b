"""One page from which a person can choose between policies.

    python jobs/compare_policies.py base/model_outputs.json aligned/model_outputs.json --out comparison.html

Reads answers that generate_benchmark wrote, with their rewards. The first file is what the others are held against.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.errors import PipelineError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", nargs="+", type=Path, metavar="FILE", help="model_outputs.json of a policy")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"))
    parser.add_argument("--objectives", default="", help="their names, in the recipe's order: helpfulness,honesty,...")
    options = parser.parse_args()
    try:
        from pipeline.benchmark.answers import read_answers
        from pipeline.benchmark.comparison_page import comparison_page, contest

        objectives = tuple(filter(None, options.objectives.split(",")))
        page = comparison_page(contest([read_answers(file) for file in options.answers]), objectives)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page)
    except (PipelineError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"comparison: {options.out.resolve()}")


if __name__ == "__main__":
    main()
