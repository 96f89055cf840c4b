"""A reward model compares answers through the same port as an endpoint."""

import math

import pytest

from pipeline.benchmark.judges.collect_outcomes import collect_outcomes
from pipeline.benchmark.judges.judge import AnswerPair
from pipeline.benchmark.judges.reward_model_judge import RewardModelJudge
from pipeline.errors import ConfigError
from pipeline.records import RewardScore
from tests.benchmark.judges.echo_judge import ask


def score(mean, std=0.0):
    return RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())


class LengthScorer:
    """Reward = characters of the response."""

    def __init__(self):
        self.prompts = []

    def score(self, prompts, responses):
        self.prompts += prompts
        return [score(float(len(response))) for response in responses]


def pair_of(a, b):
    return AnswerPair(
        prompt=({"role": "user", "content": "q"},),
        answer_a=a,
        answer_b=b,
        verdict_a="[[A>B]]",
        verdict_b="[[B>A]]",
        verdict_tie="[[A=B]]",
    )


def test_the_reward_model_speaks_the_words_of_the_benchmark():
    scorer = LengthScorer()
    requests = [ask(str(i), pair=pair_of(*pair)) for i, pair in enumerate([("xx", "x"), ("x", "xx"), ("x", "y")])]
    first, second, tie = collect_outcomes(RewardModelJudge(scorer, model="vrm-0"), requests, None).outcomes
    assert [first.text, second.text, tie.text] == ["[[A>B]]", "[[B>A]]", "[[A=B]]"]
    p = 1 / (1 + math.exp(-1.0))
    assert first.first_token_logprobs == pytest.approx({"[[A>B]]": math.log(p), "[[B>A]]": math.log(1 - p)})
    assert tie.first_token_logprobs == pytest.approx({"[[A>B]]": math.log(0.5), "[[B>A]]": math.log(0.5)})
    assert scorer.prompts == [({"role": "user", "content": "q"},)] * 6


def test_every_pair_gets_its_own_verdict_across_scoring_batches():
    pairs = [("x" * (i % 7), "x" * (i % 5)) for i in range(150)]
    requests = [ask(str(i), pair=pair_of(*pair)) for i, pair in enumerate(pairs)]
    outcomes = collect_outcomes(RewardModelJudge(LengthScorer(), model="vrm-0"), requests, None).outcomes
    signs = {"[[A>B]]": -1, "[[B>A]]": 1, "[[A=B]]": 0}
    assert [signs[o.text] for o in outcomes] == [(len(b) > len(a)) - (len(b) < len(a)) for a, b in pairs]


def test_a_certain_verdict_has_finite_logprobs():
    [judgment] = collect_outcomes(
        RewardModelJudge(LengthScorer(), model="v"), [ask("a", pair=pair_of("", "x" * 5000))], None
    ).outcomes
    assert all(math.isfinite(value) for value in judgment.first_token_logprobs.values())


def test_a_reward_model_gives_no_grades():
    with pytest.raises(ConfigError, match="grades"):
        collect_outcomes(
            RewardModelJudge(LengthScorer(), model="v"), [ask("a", pair=pair_of("x", "y")), ask("b")], None
        )
