"""Calls that share a batch in the scoring service."""

from pipeline.errors import DataError
from pipeline.records import RewardScore
from pipeline.serving.shared_batch import score_together

PROMPT = ({"role": "user", "content": "hi"},)


def score_of(length):
    return RewardScore(mean=float(length), std=0.0, objective_weights=(), objective_scores=())


class LengthScorer:
    """The reward of a response is its length; "refused" is refused."""

    def __init__(self):
        self.batches = []

    def score(self, prompts, responses):
        self.batches.append(len(responses))
        if "refused" in responses:
            raise DataError("refused")
        return [score_of(len(response)) for response in responses]


def call(*responses):
    return [PROMPT] * len(responses), list(responses)


def test_each_call_gets_its_own_rows_back_from_one_batch():
    scorer = LengthScorer()
    results = score_together(scorer, [call("a", "bb"), call(), call("ccc")])
    assert results == [[score_of(1), score_of(2)], [], [score_of(3)]]
    assert scorer.batches == [3]


def test_a_refused_call_does_not_fail_its_neighbours():
    first, second, third = score_together(LengthScorer(), [call("a"), call("refused", "x"), call("ccc")])
    assert (first, third) == ([score_of(1)], [score_of(3)])
    assert isinstance(second, DataError)


class SteerableScorer(LengthScorer):
    """Multiplies the length by a row's first factor."""

    def score(self, prompts, responses, factors=None):
        scores = super().score(prompts, responses)
        given = factors or [None] * len(scores)
        return [score_of(s.mean * (1 if f is None else f[0])) for s, f in zip(scores, given, strict=True)]


def test_calls_with_different_weights_share_a_batch_and_fail_alone():
    scorer = SteerableScorer()
    calls, factors = [call("a", "bb"), call("ccc"), call("refused")], [None, [(10.0,)], [(2.0,)]]
    first, second, third = score_together(scorer, calls, factors)
    assert (first, second) == ([score_of(1), score_of(2)], [score_of(30)])
    assert isinstance(third, DataError)
    assert scorer.batches == [4, 2, 1, 1]
