"""One page from which a person can choose between policies.

    python jobs/compare_policies.py base/model_outputs.json aligned/model_outputs.json --out comparison.html
    python jobs/compare_policies.py answers/base answers/aligned --questions arena/question.jsonl mt/question.jsonl \\
        --judgments results/annotations.json model_judgment/gpt-4o/aligned.jsonl gpt-4_single.jsonl \\
        --scores scores/alpaca_eval.json scores/arena_hard.json scores/mt_bench.json --out comparison.html
    python jobs/compare_policies.py base/model_outputs.json aligned/model_outputs.json --questions planted.json \\
        --judgments gold/annotations.json --reward-model train_reward_model-.../result --out comparison.html

Reads answers of any generator in the layouts of AlpacaEval, Arena-Hard and MT-Bench. A path is a file of one policy, or
the directory that generate_benchmark wrote, with every benchmark in it. Answers of the pipeline's own benchmark carry
rewards; the reward model is then a judge as well, and --reward-model names its verified reasons. Every other policy is
compared with the first one. --judgments are files of judge_benchmark about these answers, --scores those of
score_benchmark.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.command_line import Command
from pipeline.errors import DataError


def compare_policies(options: argparse.Namespace) -> None:
    """Writes the page.

    Raises:
        DataError: a file cannot be read, or the page cannot be written.
    """
    try:
        html = _comparison_page(options)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(html)
    except OSError as error:
        raise DataError(str(error)) from error
    print(f"comparison: {options.out.resolve()}")


def _comparison_page(options: argparse.Namespace) -> str:
    from pipeline.benchmark.policy_comparison.judgment_files import read_judgments
    from pipeline.benchmark.policy_comparison.leaderboard import leaderboard, read_scores
    from pipeline.benchmark.policy_comparison.policy_answers import answer_files, read_policy_answers, read_questions
    from pipeline.models.reward_model_card import read_card

    card = read_card(options.reward_model) if options.reward_model else None
    questions = read_questions(options.questions)
    files = [file for place in options.answers for file in answer_files(place)]
    answers = [read_policy_answers(file, questions) for file in files]
    judgments, scores = read_judgments(options.judgments), read_scores(options.scores)
    # These bring torch, which --help and what is wrong with a file do without.
    from pipeline.benchmark.policy_comparison.contest import answer_summaries, build_contests
    from pipeline.evaluation.reasons import reasons_of_model
    from pipeline.reporting.comparison_page import comparison_page, judged_contests

    contests = build_contests(answers)
    return comparison_page(
        judged_contests(contests, judgments),
        leaderboard=leaderboard(
            tuple(dict.fromkeys(policy for contest in contests for policy in contest.policies)),
            scores,
            {
                contest.benchmark: {policy: means["words"] for policy, means in answer_summaries(contest).items()}
                for contest in contests
            },
        ),
        objectives=card.objectives if card else (),
        verified=reasons_of_model(card) if card else (),
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument("--reward-model", metavar="DIR", help="that scored the answers: names its verified reasons")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), metavar="FILE", help="%(default)s")


compare_policies_command = Command(documentation=__doc__, add_options=_add_options, run=compare_policies)

if __name__ == "__main__":
    compare_policies_command()
