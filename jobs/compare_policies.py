"""One page from which a person can choose between policies.

    python jobs/compare_policies.py base/model_outputs.json aligned/model_outputs.json --out comparison.html
    python jobs/compare_policies.py answers/base answers/aligned --questions arena/question.jsonl mt/question.jsonl \\
        --judgments results/annotations.json model_judgment/gpt-4o/aligned.jsonl gpt-4_single.jsonl \\
        --scores scores/alpaca_eval.json scores/arena_hard.json scores/mt_bench.json --out comparison.html
    python jobs/compare_policies.py base/model_outputs.json aligned/model_outputs.json --questions planted.json \\
        --judgments gold/annotations.json --objectives helpfulness,honesty --out comparison.html

Reads answers of any generator in the layouts of AlpacaEval, Arena-Hard and MT-Bench: a file of one policy, or the
directory that generate_benchmark wrote, with every benchmark in it. Its answers to our own prompts carry rewards, and
the reward model is then a judge as well. The first policy is what the others are held against. --judgments are files of
judge_benchmark about these answers, --scores those of score_benchmark.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError


def compare_policies(options: argparse.Namespace) -> None:
    """Writes the page."""
    from pipeline.benchmark.policy_comparison.contest import answer_summaries, build_contests
    from pipeline.benchmark.policy_comparison.judgment_files import read_judgments
    from pipeline.benchmark.policy_comparison.leaderboard import leaderboard, read_scores
    from pipeline.benchmark.policy_comparison.policy_answers import answer_files, read_policy_answers, read_questions
    from pipeline.reporting.comparison_page import comparison_page, judged_contests

    questions = read_questions(options.questions)
    files = [file for place in options.answers for file in answer_files(place)]
    contests = build_contests([read_policy_answers(file, questions) for file in files])
    html = comparison_page(
        judged_contests(contests, read_judgments(options.judgments)),
        leaderboard=leaderboard(
            tuple(dict.fromkeys(policy for contest in contests for policy in contest.policies)),
            read_scores(options.scores),
            {
                contest.benchmark: {policy: means["words"] for policy, means in answer_summaries(contest).items()}
                for contest in contests
            },
        ),
        objectives=tuple(filter(None, options.objectives.split(","))),
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(html)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", nargs="+", type=Path, metavar="PATH", help="a policy's answers: file or directory")
    parser.add_argument("--judgments", nargs="+", type=Path, default=[], metavar="FILE", help="of judge_benchmark")
    parser.add_argument("--scores", nargs="+", type=Path, default=[], metavar="FILE", help="<benchmark>.json: Table 1")
    parser.add_argument(
        "--questions",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="question.jsonl of Arena-Hard and MT-Bench; instructions.jsonl or planted.json add categories",
    )
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
