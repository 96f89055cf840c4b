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
