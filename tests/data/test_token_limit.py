"""What is too long is counted, and refused where it is most of the data."""

import pytest

from pipeline.data.collate import tokenise_pairs, tokenise_texts
from pipeline.data.prompts import tokenise_prompts
from pipeline.errors import DataError
from pipeline.records import PreferencePair

SHORT, LONG = "why ?", "why " * 50


def asks(text):
    return ({"role": "user", "content": text},)


def pair(prompt):
    return PreferencePair(
        id=prompt,
        prompt=asks(prompt),
        chosen="yes",
        rejected="no",
        scores_chosen=None,
        scores_rejected=None,
        source="pairs",
        margin=None,
    )


def prompts(tokenizer, texts, **options):
    return tokenise_prompts([(text, asks(text)) for text in texts], tokenizer, max_prompt_tokens=20, **options)


def test_most_prompts_too_long_are_refused_with_the_numbers_that_help(tokenizer):
    with pytest.raises(
        DataError,
        match=r"3 of 4 prompts exceed max_prompt_tokens = 20 tokens \(the median has \d+\); data.max_too_long allows a "
        r"share of 0.5\. Raise the limit or that share",
    ):
        prompts(tokenizer, [SHORT, LONG, LONG, LONG], max_too_long=0.5)


def test_a_share_that_is_allowed_is_left_out(tokenizer):
    assert len(prompts(tokenizer, [SHORT, SHORT, LONG, LONG], max_too_long=0.5)) == 2


def test_the_same_rule_holds_for_pairs_and_texts(tokenizer):
    pairs = [pair(SHORT), pair(LONG), pair(LONG + "?")]
    with pytest.raises(DataError, match=r"2 of 3 pairs exceed reward\.max_length = 30 tokens"):
        tokenise_pairs(pairs, tokenizer, max_length=30, drop_too_long=True, max_too_long=0.5)
    texts = [(asks(text), "yes") for text in (SHORT, LONG, LONG)]
    with pytest.raises(DataError, match=r"2 of 3 texts exceed sft\.max_length = 30 tokens"):
        tokenise_texts(texts, tokenizer, max_length=30, max_too_long=0.5)
