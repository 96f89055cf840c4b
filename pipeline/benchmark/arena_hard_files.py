"""Arena-Hard's files, as its code writes and reads them: answers, judgments, battles.

Two layouts are in use. v0.1: `question_id`, `choices`, `conv_metadata`. v2, since April 2025: `uid`, `messages`,
`metadata`. Both are read; answers are written as v2.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.benchmark.arena_hard import (
    Battle,
    Judgment,
    Rules,
    Style,
    count_failures,
    markdown_counts,
    style_of,
    to_battles,
)
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError
from pipeline.records import Answer

WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


@dataclass(frozen=True, kw_only=True)
class ModelAnswer:
    """One answer of one model, as it stands in an answer file."""

    question_id: str
    model: str
    output: str
    num_tokens: int
    """As the file counts them."""
    place: str = field(default="an answer", compare=False, repr=False)
    """File and line it was read from."""


@dataclass(frozen=True, kw_only=True)
class Games:
    """What judgment files hold together."""

    battles: list[Battle]
    judges: tuple[str, ...]
    """Empty where the files hold battles only."""
    failures: dict[str, int]
    """Model -> games without a verdict."""


def read_games(files: Sequence[str], *, baseline: str) -> Games:
    """Judgments, each by the rules of the edition it is laid out for, and upstream's battle files.

    A battle file holds {question_id, model_a, model_b, winner}, a clear win three times.

    Raises:
        DataError: names file, line and field: a judgment was made against another baseline, or is there twice.
    """
    battles: list[Battle] = []
    judges: set[str] = set()
    failures: Counter[str] = Counter()
    judged: dict[tuple[str, str], str] = {}
    for row in (row for file in files for row in read_rows(file)):
        if "winner" in row.values:
            battles.append(_battle(row))
            continue
        rules: Rules = "v2" if "uid" in row.values else "v0.1"
        judgment = _judgment(row, baseline)
        place = judged.setdefault((judgment.model, judgment.question_id), row.place)
        if place != row.place:
            raise DataError(
                f"{row.place}: {judgment.model!r} is judged on question {judgment.question_id} again, as in {place}. "
                "Keep one: judgments of two judges are two tables."
            )
        battles += to_battles([judgment], rules)
        judges.add(judgment.judge)
        failures.update(count_failures([judgment], rules))
    return Games(battles=battles, judges=tuple(sorted(judges)), failures=dict(failures))


def read_answers(files: Sequence[str]) -> list[ModelAnswer]:
    """Answers of either layout.

    Raises:
        DataError: names file, line and field; or a row does not say how many tokens its answer has.
    """
    return [_answer(row) for file in files for row in read_rows(file)]


def styles_of(answers: Sequence[ModelAnswer]) -> dict[tuple[str, str], Style]:
    """(model, question id) -> style."""
    return {(a.model, a.question_id): style_of(a.output, num_tokens=a.num_tokens) for a in answers}


def write_answers(path: Path, answers: Sequence[Answer], *, count_tokens: Callable[[str], int]) -> None:
    """Answers in the v2 layout; their `prompt_id` is the question's `uid`.

    Args:
        count_tokens: what style control calls length. Upstream: tiktoken with the encoding of gpt-4o.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for answer in answers:
            identity = f"{answer.generator}\n{answer.prompt_id}\n{answer.output}"
            row = {
                "uid": answer.prompt_id,
                "ans_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
                "model": answer.generator,
                "messages": [
                    {"role": "user", "content": answer.instruction},
                    {"role": "assistant", "content": {"answer": answer.output}},
                ],
                "tstamp": time.time(),
                # Upstream reads these by position: the length first.
                "metadata": {"token_len": count_tokens(answer.output), **markdown_counts(answer.output)},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _battle(row: Row) -> Battle:
    winner = row.require("winner", str)
    if winner not in WINNERS:
        raise DataError(f"{row.place}, field 'winner': {winner!r:.40} is none of {', '.join(WINNERS)}")
    return Battle(
        question_id=row.require("question_id", str),
        model_a=row.require("model_a", str),
        model_b=row.require("model_b", str),
        outcome=WINNERS[winner],
        weight=1,
    )


def _judgment(row: Row, baseline: str) -> Judgment:
    judged_against = row.values.get("baseline", baseline)  # v0.1 does not say
    if judged_against != baseline:
        raise DataError(f"{row.place}: judged against {judged_against!r}, not {baseline!r}. Give that baseline.")
    games = row.require("games", list)
    verdicts = [game.get("score") if isinstance(game, Mapping) else None for game in games]
    if len(games) != 2 or not all(verdict is None or isinstance(verdict, str) for verdict in verdicts):
        raise DataError(f"{row.place}, field 'games': {games!r:.60} are not two games with a score like 'A>B'")
    return Judgment(
        question_id=_question_id(row),
        model=row.require("model", str),
        baseline=baseline,
        judge=row.require("judge", str),
        verdicts=(verdicts[0], verdicts[1]),
    )


def _answer(row: Row) -> ModelAnswer:
    is_v2 = "uid" in row.values
    try:
        output, num_tokens = _v2_answer(row.values) if is_v2 else _v0_1_answer(row.values)
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{row.place}: no answer with its number of tokens ({error!r}). Give choices[0].turns[0].content with "
            "conv_metadata.token_len, or messages[-1].content.answer with metadata.token_len."
        ) from error
    if not isinstance(output, str) or not isinstance(num_tokens, int):
        raise DataError(f"{row.place}: {output!r:.40} is no answer, or {num_tokens!r:.40} no number of tokens")
    return ModelAnswer(
        question_id=_question_id(row),
        model=row.require("model" if is_v2 else "model_id", str),
        output=output,
        num_tokens=num_tokens,
        place=row.place,
    )


def _v2_answer(values: Mapping[str, Any]) -> tuple[Any, Any]:
    return values["messages"][-1]["content"]["answer"], values["metadata"]["token_len"]


def _v0_1_answer(values: Mapping[str, Any]) -> tuple[Any, Any]:
    turn = values["choices"][0]["turns"][0]
    # Early files count the tokens in the turn, later ones beside it.
    counted = turn if "token_len" in turn else values["conv_metadata"]
    return turn["content"], counted["token_len"]


def _question_id(row: Row) -> str:
    return row.require("uid" if "uid" in row.values else "question_id", str)
