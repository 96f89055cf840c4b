"""The answers of one policy to one benchmark, read from the answer files of each benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.benchmark.alpaca_eval.model_outputs import read_model_outputs
from pipeline.benchmark.arena_hard.answers import read_arena_answers
from pipeline.benchmark.arena_hard.questions import arena_question
from pipeline.benchmark.judges.judged_benchmark import answers_of_one_model
from pipeline.benchmark.mt_bench.answers import read_mt_bench_answers
from pipeline.benchmark.mt_bench.questions import mt_bench_question
from pipeline.benchmark.scored_answers import read_scored_answers
from pipeline.data.files import read_json, read_rows
from pipeline.errors import DataError
from pipeline.records import RewardScore

ALPACA_EVAL, ARENA_HARD, MT_BENCH = "alpaca_eval", "arena_hard", "mt_bench"

BENCHMARK_TITLES = {ALPACA_EVAL: "AlpacaEval", ARENA_HARD: "Arena-Hard", MT_BENCH: "MT-Bench"}

ANSWER_FILES = ("model_outputs.json", "v2/model_answer/*.jsonl", "model_answer/*.jsonl")
"""Answer files below a directory of generate_benchmark. Arena-Hard's v0.1 files repeat the answers of its v2 files."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Texts and categories of questions, which answer files do not contain."""

    turns: Mapping[int | str, tuple[str, ...]]
    """Question id -> the user's text of each turn, for MT-Bench (int ids) and Arena-Hard (str ids)."""
    categories: Mapping[str, str]
    """Question id, prompt id or instruction -> category."""


@dataclass(frozen=True, kw_only=True)
class PolicyAnswers:
    """All answers of one policy to one benchmark. A prompt is a question id; in AlpacaEval, the instruction itself."""

    benchmark: str
    policy: str
    turns: Mapping[str, tuple[str, ...]]
    """Prompt -> the user's text of each turn."""
    outputs: Mapping[str, tuple[str, ...]]
    """Prompt -> the answer to each turn."""
    rewards: Mapping[str, RewardScore]
    """Prompt -> reward of the answer; empty where no reward model scored the answers."""
    categories: Mapping[str, str]
    """Prompt -> category, where it is known."""


def read_questions(files: Sequence[Path]) -> Questions:
    """Reads question files of the benchmarks, and generate_benchmark's `planted.json`.

    Raises:
        DataError: a file is neither of them. Names file and line.
    """
    turns: dict[int | str, tuple[str, ...]] = {}
    categories: dict[str, str] = {}
    for file in files:
        if file.name == "planted.json":
            categories |= _planted_kinds(file)
            continue
        for row in read_rows(str(file)):
            if "instruction" in row.values:
                categories[row.require("instruction", str)] = row.require("dataset", str)
            elif isinstance(row.values.get("question_id"), int):
                mt_bench = mt_bench_question(row)
                turns[mt_bench.question_id], categories[str(mt_bench.question_id)] = mt_bench.turns, mt_bench.category
            elif "uid" in row.values or "question_id" in row.values:
                arena = arena_question(row)
                turns[arena.question_id], categories[arena.question_id] = (arena.prompt,), arena.category
            else:
                raise DataError(f"{row.place}: not a question; it has neither uid, question_id nor instruction")
    return Questions(turns=turns, categories=categories)


def _planted_kinds(file: Path) -> dict[str, str]:
    try:
        kinds = read_json(file)["kinds"]
        return {str(prompt_id): str(kind) for prompt_id, kind in kinds.items()}
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} holds no kinds of prompts ({error!r}); give the planted.json of generate_benchmark"
        ) from error


def answer_files(place: Path) -> list[Path]:
    """The file itself, or the answer file of each benchmark in a directory that generate_benchmark wrote.

    Raises:
        DataError: the directory has no answers.
    """
    if not place.is_dir():
        return [place]
    files = [file for pattern in ANSWER_FILES for file in sorted(place.glob(pattern))]
    if not files:
        raise DataError(f"{place} holds no answers: none of {', '.join(ANSWER_FILES)}. Give the file itself.")
    return files


def read_policy_answers(file: Path, questions: Questions) -> PolicyAnswers:
    """The answers of one policy to any of the benchmarks.

    Args:
        questions: must hold the questions of Arena-Hard and MT-Bench. An AlpacaEval instruction that is not there has
            the `dataset` of its row as category.

    Raises:
        DataError: the answers are of several models or of none, answer an unknown question or a question twice, or
            only some have rewards. Names file and line.
    """
    first = next(read_rows(str(file)), None)
    match None if first is None else first.values.get("question_id", first.values.get("uid")):
        case int():
            return _mt_bench_answers(file, questions)
        case str():
            return _arena_hard_answers(file, questions)
    return _alpaca_eval_answers(file, questions)


def _alpaca_eval_answers(file: Path, questions: Questions) -> PolicyAnswers:
    """`model_outputs.json`. Answers to generate_benchmark's own prompts have rewards, others have none."""
    rows = read_model_outputs(file)
    scored = read_scored_answers(file) if '"reward_mean"' in file.read_text() else []
    categories = {row.instruction: row.dataset for row in rows if row.dataset is not None}
    categories |= {
        row.instruction: questions.categories[row.instruction]
        for row in rows
        if row.instruction in questions.categories
    }
    categories |= {
        a.instruction: questions.categories[a.prompt_id] for a in scored if a.prompt_id in questions.categories
    }
    return PolicyAnswers(
        benchmark=ALPACA_EVAL,
        policy=rows[0].generator,
        turns={row.instruction: (row.instruction,) for row in rows},
        outputs={row.instruction: (row.output,) for row in rows},
        rewards={answer.instruction: answer.score for answer in scored},
        categories=categories,
    )


def _arena_hard_answers(file: Path, questions: Questions) -> PolicyAnswers:
    answers = read_arena_answers([str(file)])
    policy, by_question = answers_of_one_model(answers, [], known=_known_ids(str, questions, file), what="answers")
    return PolicyAnswers(
        benchmark=ARENA_HARD,
        policy=policy,
        turns={uid: questions.turns[uid] for uid in by_question},
        outputs={uid: (answer.output,) for uid, answer in by_question.items()},
        rewards={},
        categories={uid: questions.categories[uid] for uid in by_question},
    )


def _mt_bench_answers(file: Path, questions: Questions) -> PolicyAnswers:
    answers = read_mt_bench_answers([str(file)])
    policy, by_question = answers_of_one_model(answers, [], known=_known_ids(int, questions, file), what="answers")
    for number, answer in by_question.items():
        if len(answer.turns) != len(questions.turns[number]):
            raise DataError(
                f"{answer.place}: {policy} answers {len(answer.turns)} of the {len(questions.turns[number])} turns "
                f"of question {number}. Answer them all, or leave the question out."
            )
    return PolicyAnswers(
        benchmark=MT_BENCH,
        policy=policy,
        turns={str(number): questions.turns[number] for number in by_question},
        outputs={str(number): answer.turns for number, answer in by_question.items()},
        rewards={},
        categories={str(number): questions.categories[str(number)] for number in by_question},
    )


def _known_ids(kind: type, questions: Questions, file: Path) -> list[int | str]:
    known = [question_id for question_id in questions.turns if isinstance(question_id, kind)]
    if not known:
        raise DataError(f"{file} does not contain the questions. Give the benchmark's question.jsonl as --questions.")
    return known
