"""Policies, answers and judgments for the tests of their comparison."""

import dataclasses
import json

from pipeline.benchmark.alpaca_eval.annotations import Annotations
from pipeline.benchmark.arena_hard.battles import Battle
from pipeline.benchmark.mt_bench import grades as mt_bench
from pipeline.benchmark.policy_comparison.contest import (
    build_contest,
)
from pipeline.benchmark.policy_comparison.policy_answers import (
    PolicyAnswers,
    Questions,
)
from pipeline.records import RewardScore

NO_QUESTIONS = Questions(turns={}, categories={})


def score(reward):
    return RewardScore(mean=reward, std=0.5, objective_weights=(0.25, 0.75), objective_scores=(reward, reward))


def answers_of(policy, rewards, *, prompts=("p", "q", "r", "s"), output="an answer", categories=(), **changes):
    answers = PolicyAnswers(
        benchmark="alpaca_eval",
        policy=policy,
        turns={prompt: (prompt,) for prompt in prompts},
        outputs=dict.fromkeys(prompts, (output,)),
        rewards={prompt: score(reward) for prompt, reward in zip(prompts, rewards, strict=False)},
        categories=dict(zip(prompts, categories, strict=False)),
    )
    return dataclasses.replace(answers, **changes)


def judged(preferences, *, model="aligned", baseline="base", prompts=("p", "q", "r", "s"), judge="gpt"):
    lengths = [1] * len(prompts)
    return Annotations(
        baseline=baseline,
        model=model,
        instructions=prompts,
        preferences=preferences,
        baseline_lengths=lengths,
        model_lengths=lengths,
        judge=judge,
    )


BASE = answers_of("base", [1.0, 1.0, 1.0, 1.0])

ALIGNED = answers_of("aligned", [2.0, 0.0, 1.0, 3.0], output="# Title\n- one\n- **two**")

TWO = build_contest([BASE, ALIGNED])


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ARENA_QUESTION = {"uid": "u1", "category": "hard", "prompt": "prove it"}

MT_QUESTION = {"question_id": 81, "category": "writing", "turns": ["write", "write again"]}


def arena_answer(model, uid="u1", output="proof"):
    reply = {"role": "assistant", "content": {"answer": output}}
    return {"uid": uid, "model": model, "messages": [reply], "metadata": {"token_len": 1}}


def mt_answer(model, number=81, turns=("first", "second")):
    return {"question_id": number, "model_id": model, "choices": [{"index": 0, "turns": turns}]}


def arena(*policies):
    return build_contest([answers_of(policy, [], benchmark="arena_hard") for policy in policies])


def game(question_id, outcome, weight=1, model="m"):
    return Battle(question_id=question_id, model_a="base", model_b=model, outcome=outcome, weight=weight)


def grade(model, number, turn, value, judge="gpt-4"):
    return mt_bench.TurnGrade(
        question_id=number,
        model=model,
        judge=judge,
        template="single-v1",
        turn=turn,
        user_prompt="?",
        judgment="[[..]]",
        score=value,
    )


def graded():
    two_turns = {str(number): ("a", "b") for number in (81, 82, 83)}
    return build_contest(
        [answers_of(name, [], benchmark="mt_bench", turns=two_turns, outputs=two_turns) for name in ("base", "m")]
    )


def grades_of(model, *pairs):
    return [grade(model, 81 + i, turn + 1, value) for i, pair in enumerate(pairs) for turn, value in enumerate(pair)]
