"""How much a response repeats itself."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.ragged import Ragged

NGRAM = 4
"""Tokens. Shorter runs of tokens occur twice in good prose."""

NUMBERED = 2**16
"""Tokens of a response to which numbers of 16 bits can be given: four of them are one number of 64 bits."""


def repeated_shares(responses: Ragged) -> np.ndarray:
    """[B] float64: the share of a response's 4-grams of tokens that have occurred in it before; 0 for a shorter one."""
    tokens, offsets = responses.values.numpy(), responses.offsets.tolist()
    numbers = np.empty(int(tokens.max(initial=0)) + 1, dtype=np.uint16)
    shares = np.zeros(len(responses))
    for row, (start, end) in enumerate(pairwise(offsets)):
        count = end - start - NGRAM + 1
        if count > 0:
            shares[row] = 1.0 - _distinct_ngrams(tokens[start:end], numbers) / count
    return shares


def _distinct_ngrams(tokens: np.ndarray, numbers: np.ndarray) -> int:
    """Writes to `numbers`, which has a place for every token."""
    count = len(tokens) - NGRAM + 1
    if len(tokens) > NUMBERED:
        return len({tuple(gram) for gram in np.lib.stride_tricks.sliding_window_view(tokens, NGRAM).tolist()})
    # A token's number is one of the places where it stands in the response.
    numbers[tokens] = np.arange(len(tokens), dtype=np.uint16)
    numbered = numbers[tokens]
    grams = np.ndarray(count, dtype=np.uint64, buffer=numbered, strides=numbered.strides).copy()
    grams.sort()
    return 1 + int(np.count_nonzero(grams[1:] != grams[:-1]))
