"""The reward model as a judge: its verdict follows the probability that one answer beats the other."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

from pipeline.benchmark.judges.judge import AnswerPair, JudgeRequest, Judgment, RecordOutcome
from pipeline.errors import ConfigError
from pipeline.objectives.reward_comparison import compare_rewards
from pipeline.ports import RewardScorer

PAIRS_AT_ONCE = 64
"""Pairs in one scoring batch. A killed run loses at most the judgments of one batch."""


class RewardModelJudge:
    """Implements `Judge` with any `RewardScorer`; reads the pair of a request, not its messages."""

    def __init__(self, scorer: RewardScorer, *, model: str, name: str = "vrm") -> None:
        """`model` identifies the content of the checkpoint, because judgments are stored under this name."""
        self.name, self.model = name, model
        self._scorer = scorer

    def judge(self, requests: Sequence[JudgeRequest], record: RecordOutcome) -> None:
        """Verdicts in the benchmark's notation, with ln P(a) and ln P(b) as their log-probabilities.

        The verdict is never a strong one ([[A>>B]]): the model's training data does not say how much better an answer
        must be for that.

        Raises:
            ConfigError: a request asks for a grade.
        """
        pairs = [request.pair for request in requests if request.pair is not None]
        if len(pairs) < len(requests):
            raise ConfigError(
                "a reward model compares two answers; this benchmark asks for grades from 1 to 10. "
                "Give an endpoint or a replay file as --judge."
            )
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            batch = pairs[start : start + PAIRS_AT_ONCE]
            scores = self._scorer.score(
                [pair.prompt for pair in batch for _ in range(2)],
                [answer for pair in batch for answer in (pair.answer_a, pair.answer_b)],
            )
            for i, pair in enumerate(batch):
                record(start + i, _judgment(pair, compare_rewards(scores[2 * i + 1], scores[2 * i]).probability))


def _judgment(pair: AnswerPair, b_beats_a: float) -> Judgment:
    winner = pair.verdict_b if b_beats_a > 0.5 else pair.verdict_a
    logprobs = {pair.verdict_a: _log(1.0 - b_beats_a), pair.verdict_b: _log(b_beats_a)}
    return Judgment(
        text=pair.verdict_tie if b_beats_a == 0.5 else winner,
        first_token_logprobs=logprobs,
        finish_reason="stop",
        prompt_tokens=0,
        completion_tokens=0,
        time=time.time(),
    )


def _log(probability: float) -> float:
    return math.log(max(probability, sys.float_info.min))
