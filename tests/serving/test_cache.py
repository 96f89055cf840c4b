"""Scores are remembered by content, and the oldest are forgotten."""

import pytest

from pipeline.records import RewardScore
from pipeline.serving.cache import ScoreCache, row_key

HI = ({"role": "user", "content": "hi"},)


def score(mean):
    return RewardScore(mean=mean, std=0.0, objective_weights=(), objective_scores=())


def test_the_least_recently_used_score_is_forgotten():
    cache = ScoreCache(2)
    cache.put(b"a", score(1.0))
    cache.put(b"b", score(2.0))
    assert cache.get(b"a") == score(1.0)
    cache.put(b"c", score(3.0))
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c")) == (score(1.0), None, score(3.0))
    assert (len(cache), cache.hits, cache.misses) == (2, 3, 1)


def test_a_cache_of_nothing_remembers_nothing():
    cache = ScoreCache(0)
    cache.put(b"a", score(1.0))
    assert (cache.get(b"a"), len(cache)) == (None, 0)


def test_a_score_seen_again_is_kept_once():
    cache = ScoreCache(2)
    for _ in range(3):
        cache.put(b"a", score(1.0))
    assert len(cache) == 1


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (HI, "y"),
        (({"role": "system", "content": "hi"},), "x"),
        (({"role": "user", "content": "h"},), "ix"),
        ((*HI, {"role": "assistant", "content": "x"}), ""),
        ((*HI, *HI), "x"),
        (({"role": "user", "content": 'hi"], ["x'},), ""),
    ],
)
def test_rows_that_differ_anywhere_have_different_keys(prompt, response):
    assert row_key(prompt, response) != row_key(HI, "x")


def test_the_order_of_a_messages_fields_does_not_matter():
    assert row_key(({"content": "hi", "role": "user"},), "x") == row_key(HI, "x")
