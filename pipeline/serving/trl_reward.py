"""The scoring service as a TRL reward function.

trainer = GRPOTrainer(model, reward_funcs=VRMReward("http://127.0.0.1:8000"), ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from pipeline.errors import DataError
from pipeline.records import Message
from pipeline.serving.client import Client, ClientOptions, PromptInput
from pipeline.serving.protocol import ScoreAnswer


class VRMReward:
    """A callable with the signature TRL calls: (prompts, completions, **columns) -> rewards.

    It also gives TRL the standard deviation of each reward and the contribution of each objective. `log_metric` gets
    the means, `log_extra` the columns for the table of completions. It can be pickled.
    """

    __name__ = "vrm"
    """What TRL calls the reward in its logs."""

    def __init__(self, url: str, *, lcb: float = 0.0, **client_options: Unpack[ClientOptions]) -> None:
        """
        Args:
            url: URL of the service.
            lcb: gives reward - lcb * reward_std, so that an uncertain reward counts less.
            client_options: the other arguments of `Client`.
        """
        self._lcb = lcb
        self._scorer = Client(url, **client_options)

    def __call__(
        self,
        prompts: Sequence[PromptInput],
        completions: Sequence[str | Sequence[Message]],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[float]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One reward per completion. Other columns of the data set, and TRL's other arguments, are ignored.

        Raises:
            DataError: a completion that does not end with text of the assistant.
        """
        rows = [split_completion(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        answer = self._scorer.score_rows([prompt for prompt, _ in rows], [response for _, response in rows])
        for name, values in _columns(answer).items():
            if log_metric is not None:
                log_metric(name, sum(values) / len(values))
            if log_extra is not None:
                log_extra(name, values)
        return [score.reward - self._lcb * score.reward_std for score in answer.scores]


def split_completion(prompt: PromptInput, completion: str | Sequence[Message]) -> tuple[PromptInput, str]:
    """A prompt and its TRL completion as (everything before the last turn, the last turn's text).

    Text data sets give prompt and completion as strings, conversational ones as messages. A completion may have several
    turns.

    Raises:
        DataError: messages that are not text, or do not end with the assistant.
    """
    if isinstance(completion, str):
        return prompt, completion
    prompt_turns: Sequence[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [*prompt_turns, *completion]
    for turn in turns:
        if not isinstance(turn.get("content"), str):
            raise DataError(
                f"a {turn.get('role')!r} turn holds {type(turn.get('content')).__name__}: only text is scored"
            )
    if not completion or turns[-1]["role"] != "assistant":
        raise DataError("a completion to score must end with a turn of the assistant")
    return turns[:-1], turns[-1]["content"]


def _columns(answer: ScoreAnswer) -> dict[str, list[float]]:
    objectives = answer.scores[0].contributions
    return {
        "vrm/reward_std": [score.reward_std for score in answer.scores],
        **{f"vrm/{name}": [score.contributions[name] for score in answer.scores] for name in objectives},
    }
