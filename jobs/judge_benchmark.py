"""A judge's verdicts on benchmark answers, in the layout that the benchmark's own scorer reads.

    python jobs/judge_benchmark.py --benchmark alpaca_eval --answers aligned/model_outputs.json \\
        --baseline base/model_outputs.json --templates alpaca_eval_clf.txt \\
        --judge https://api.openai.com/v1 --model gpt-4-1106-preview --out results/annotations.json
    python jobs/judge_benchmark.py --benchmark arena_hard --questions question.jsonl \\
        --answers model_answer/ours.jsonl --baseline model_answer/gpt-4-0314.jsonl --templates judge_config.yaml \\
        --judge vrm:runs/tiny/stages/train_reward_model-.../result --out model_judgment/vrm/ours.jsonl
    python jobs/judge_benchmark.py --benchmark alpaca_eval --answers aligned/model_outputs.json \\
        --baseline base/model_outputs.json --judge gold:planted --out gold/annotations.json
    python jobs/judge_benchmark.py --benchmark mt_bench --questions question.jsonl \\
        --answers model_answer/ours.jsonl --references reference_answer/gpt-4.jsonl --templates judge_prompts.jsonl \\
        --judge replay:judgments.cache --out model_judgment/gpt-4_single.jsonl

The key of an endpoint is read from VRM_JUDGE_API_KEY (another variable: --api-key-env). gold:planted is the annotator
of the planted world, for its prompts alone. Every judgment is kept in <out>.cache as it comes. A run that was stopped
asks only for what is missing. <out>.summary.json counts requests, failures and costs. The exit code is 1 when requests
stayed unanswered; the same command then repeats those alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from jobs.command_line import Command
from pipeline.benchmark.alpaca_eval import judging as alpaca_eval_judging
from pipeline.benchmark.alpaca_eval.model_outputs import read_model_outputs
from pipeline.benchmark.arena_hard import judging as arena_hard_judging
from pipeline.benchmark.arena_hard.answers import read_arena_answers
from pipeline.benchmark.arena_hard.battles import parse_verdict
from pipeline.benchmark.arena_hard.questions import read_arena_questions
from pipeline.benchmark.judges.chat_judge import ChatJudge, ChatLimits
from pipeline.benchmark.judges.collect_outcomes import collect_outcomes
from pipeline.benchmark.judges.judge import Judge
from pipeline.benchmark.judges.judged_benchmark import JudgedBenchmark
from pipeline.benchmark.judges.judging_account import JudgingAccount, judging_account, read_price
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from pipeline.benchmark.judges.replay_judge import ReplayJudge
from pipeline.benchmark.mt_bench import judging as mt_bench_judging
from pipeline.benchmark.mt_bench.answers import read_mt_bench_answers
from pipeline.benchmark.mt_bench.grades import parse_grade
from pipeline.benchmark.mt_bench.questions import read_mt_bench_questions
from pipeline.data.files import content_fingerprint
from pipeline.errors import ConfigError
from pipeline.models.checkpoint_files import check_reward_model
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint

UNANSWERED = 1
"""Exit code: some requests have no judgment yet."""
PROGRESS_S = 10.0
SCORING_JUDGES = ("vrm:", "gold:")
"""Judges that score answers and compare the scores. They read no judge prompt."""
SCORING_TOKENS = 8192
"""Tokens the reward model scores at once."""


def open_alpaca_eval(options: argparse.Namespace) -> JudgedBenchmark:
    return alpaca_eval_judging.AlpacaEvalJudging(
        read_model_outputs(options.answers),
        read_model_outputs(options.baseline),
        alpaca_eval_judging.read_chatml(options.templates)
        if options.templates
        else alpaca_eval_judging.ANSWERS_ONLY_MESSAGES,
        annotator=options.templates.stem if options.templates else "scored",
    )


def open_arena_hard(options: argparse.Namespace) -> JudgedBenchmark:
    return arena_hard_judging.ArenaHardJudging(
        read_arena_questions(options.questions),
        read_arena_answers([str(options.answers)]),
        read_arena_answers([str(options.baseline)]),
        arena_hard_judging.read_arena_template(options.templates)
        if options.templates
        else arena_hard_judging.ANSWERS_ONLY_PROMPT,
        parse=partial(parse_verdict, rules="v2"),
    )


def open_mt_bench(options: argparse.Namespace) -> JudgedBenchmark:
    return mt_bench_judging.MTBenchJudging(
        read_mt_bench_questions(options.questions),
        read_mt_bench_answers([str(options.answers)]),
        read_mt_bench_answers([str(options.references)]),
        mt_bench_judging.read_grading_templates(options.templates),
        parse=parse_grade,
    )


class JudgingSetup(NamedTuple):
    """What a benchmark needs to be judged, and where its judgments go."""

    open: Callable[[argparse.Namespace], JudgedBenchmark]
    needs: set[str]
    """Files besides answers and templates."""
    suffix: str
    """Suffix of the file that the upstream scorer reads: .json holds a list, .jsonl one row a line."""


BENCHMARKS = {
    "alpaca_eval": JudgingSetup(open_alpaca_eval, {"baseline"}, ".json"),
    "arena_hard": JudgingSetup(open_arena_hard, {"baseline", "questions"}, ".jsonl"),
    "mt_bench": JudgingSetup(open_mt_bench, {"questions", "references"}, ".jsonl"),
}


def open_judge(options: argparse.Namespace) -> Judge:
    """The judge behind --judge, which `check_judge` has seen.

    Raises:
        DataError, CheckpointError: its file or directory cannot be used.
    """
    kind, _, place = options.judge.partition(":")
    match kind:
        case "replay":
            return ReplayJudge(Path(place))
        case "vrm":
            return open_reward_model(place)
        case "gold":
            return open_gold()
    limits = ChatLimits(
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        deadline_s=options.deadline_s,
    )
    api_key = os.environ.get(options.api_key_env, "").strip() or None
    return ChatJudge(options.judge, options.model, api_key=api_key, limits=limits)


def require_known_judge(judge: str) -> None:
    """Raises ConfigError for a word that names no judge."""
    kind, _, place = judge.partition(":")
    if kind not in ("http", "https", "replay", "vrm") and (kind, place) != ("gold", "planted"):
        raise ConfigError(f"--judge {judge!r}: give an endpoint (https://...), replay:FILE, vrm:DIR or gold:planted")


def check_judge(options: argparse.Namespace) -> None:
    """Looks at the judge without loading it.

    Raises:
        ConfigError: an endpoint without --model.
        CheckpointError: there is no reward model.
    """
    kind, _, place = options.judge.partition(":")
    if kind == "vrm":
        check_reward_model(place)
    if kind in ("http", "https") and options.model is None:
        raise ConfigError(f"the endpoint {options.judge} needs --model, the name of the model it shall serve")


def open_reward_model(directory: str) -> Judge:
    # Only this judge needs torch.
    import torch

    from pipeline.benchmark.judges.reward_model_judge import RewardModelJudge
    from pipeline.evaluation.reward_scorer import RewardModelScorer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = RewardModelScorer.load(directory, max_tokens_per_batch=SCORING_TOKENS, device=device)
    return RewardModelJudge(scorer, model=f"vrm-{directory_fingerprint(directory)[:12]}")


def open_gold() -> Judge:
    from pipeline.benchmark.judges.gold_scorer import GoldScorer
    from pipeline.benchmark.judges.reward_model_judge import RewardModelJudge

    return RewardModelJudge(GoldScorer(), model="gold-planted", name="gold")


def progress_line() -> Callable[[int, int], None]:
    """Says now and then on the terminal how far the judge is."""
    due = time.monotonic() + PROGRESS_S

    def progress(done: int, total: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + PROGRESS_S
            print(f"judged {done} of {total}", file=sys.stderr, flush=True)

    return progress


def judge_benchmark(options: argparse.Namespace) -> JudgingAccount:
    """Writes the rows and the summary. Reads every input before the first request."""
    check_judge(options)
    benchmark = BENCHMARKS[options.benchmark].open(options)
    judge = open_judge(options)
    price = None if options.prices is None else read_price(options.prices, judge.model)
    storage.require_writable(str(options.out.parent), needs_bytes=0)
    # A replay file may be edited and replayed again, so its judgments are cached nowhere else.
    remembers = not isinstance(judge, ReplayJudge)
    with JudgmentCache.open(options.cache) if remembers else nullcontext() as cache:
        collected = collect_outcomes(judge, benchmark.requests, cache, progress=progress_line())
    judged = benchmark.rows(collected.outcomes, judge)
    costs = judging_account(judge, collected, unparsed=judged.unparsed, price=price)
    if options.out.suffix == ".json":
        text = json.dumps(judged.rows, indent=1, ensure_ascii=False)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged.rows)
    storage.write_text(str(options.out), text)
    files = {name: getattr(options, name) for name in ("answers", "baseline", "questions", "references", "templates")}
    summary = {
        "benchmark": options.benchmark,
        "rows": len(judged.rows),
        **asdict(costs),
        "sampling": asdict(benchmark.requests[0].sampling) if benchmark.requests else None,
        "inputs": {name: content_fingerprint(str(file)) for name, file in files.items() if file is not None},
    }
    storage.write_text(str(options.out.with_suffix(".summary.json")), json.dumps(summary, indent=1, ensure_ascii=False))
    return costs


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark", required=True, choices=sorted(BENCHMARKS), metavar="NAME", help=", ".join(sorted(BENCHMARKS))
    )
    parser.add_argument("--answers", required=True, type=Path, metavar="FILE", help="of the model that is judged")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="the judge's prompts; vrm and gold read none")
    parser.add_argument("--judge", required=True, metavar="JUDGE", help="URL, vrm:DIR, gold:planted or replay:FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="annotations.json or judgments .jsonl")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="judgments so far (<out>.cache)")
    parser.add_argument("--prices", type=Path, metavar="FILE", help='{model: {"prompt": ..., "completion": ...}}, JSON')
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="its answers (alpaca_eval, arena_hard)")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="question.jsonl (arena_hard, mt_bench)")
    parser.add_argument("--references", type=Path, metavar="FILE", help="reference answers (mt_bench)")
    endpoint = parser.add_argument_group("endpoints only")
    endpoint.add_argument("--model", help="the judge's name at the endpoint")
    endpoint.add_argument("--api-key-env", default="VRM_JUDGE_API_KEY", metavar="NAME", help="of its key (%(default)s)")
    endpoint.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at a time (%(default)s)")
    endpoint.add_argument("--requests-per-minute", type=float, metavar="N", help="starts of requests, retries included")
    endpoint.add_argument(
        "--deadline-s", type=float, default=300.0, metavar="S", help="for a request and its retries (%(default)s)"
    )


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    # Before what depends on the judge: a word that names none has no prompts to ask for.
    require_known_judge(options.judge)
    _, needed, suffix = BENCHMARKS[options.benchmark]
    if options.out.suffix != suffix:
        parser.error(f"{options.benchmark} is written to a {suffix} file, not to {options.out}")
    for name in ("baseline", "questions", "references"):
        given = getattr(options, name) is not None
        if given != (name in needed):
            parser.error(f"{options.benchmark} {'has no' if given else 'needs'} --{name}")
    if options.templates is None and not (options.judge.startswith(SCORING_JUDGES) and "baseline" in needed):
        parser.error(f"{options.benchmark} needs --templates, the prompts that {options.judge} reads")
    if options.cache is None:
        options.cache = options.out.with_name(f"{options.out.name}.cache")


def _judge_and_report(options: argparse.Namespace) -> None:
    costs = judge_benchmark(options)
    lines = costs.lines()
    width = max(len(what) for what, _ in lines)
    print("\n".join(f"{what:<{width}}  {value}" for what, value in lines))
    if costs.unanswered:
        print(f"{sum(costs.unanswered.values())} unanswered; the same command asks for them again.", file=sys.stderr)
        sys.exit(UNANSWERED)


judge_benchmark_command = Command(
    documentation=__doc__, add_options=_add_options, check_options=_check_options, run=_judge_and_report
)

if __name__ == "__main__":
    judge_benchmark_command()
