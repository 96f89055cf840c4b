"""Arena-Hard's files, as its code writes and reads them: answers, judgments, battles.

Two layouts are in use. v0.1: `question_id`, `choices`, `conv_metadata`. v2, since April 2025: `uid`, `messages`,
`metadata`. Both are read and written.
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

from pipeline.benchmark.arena_hard.win_rates import (
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
from pipeline.stages.storage import write_text

OFFICIAL_BASELINE = "gpt-4-0314"
"""Of v0.1, whose judgments do not name it."""

ENCODINGS: dict[Rules, str] = {"v0.1": "cl100k_base", "v2": "o200k_base"}
"""Of gpt-3.5-turbo and of gpt-4o."""

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
    """(model, question id) -> style.

    Raises:
        DataError: a model answers a question twice; names both lines.
    """
    first: dict[tuple[str, str], ModelAnswer] = {}
    for answer in answers:
        known = first.setdefault((answer.model, answer.question_id), answer)
        if known is not answer:
            raise DataError(
                f"{answer.place}: {answer.model} answers question {answer.question_id} again, as in {known.place}. "
                "Keep one."
            )
    return {key: style_of(answer.output, num_tokens=answer.num_tokens) for key, answer in first.items()}


def write_answers(path: Path, answers: Sequence[ModelAnswer], *, prompts: Mapping[str, str], rules: Rules) -> None:
    """Answers in the layout of either edition, whole or not at all.

    Args:
        prompts: question id -> what was asked.
    """
    rows = []
    for answer in answers:
        identity = hashlib.sha256(f"{answer.model}\n{answer.question_id}\n{answer.output}".encode()).hexdigest()[:22]
        # Upstream's v2 reads these by position: the length first.
        metadata = {"token_len": answer.num_tokens, **markdown_counts(answer.output)}
        if rules == "v2":
            row = {
                "uid": answer.question_id,
                "ans_id": identity,
                "model": answer.model,
                "messages": [
                    {"role": "user", "content": prompts[answer.question_id]},
                    {"role": "assistant", "content": {"answer": answer.output}},
                ],
                "tstamp": time.time(),
                "metadata": metadata,
            }
        else:
            row = {
                "question_id": answer.question_id,
                "answer_id": identity,
                "model_id": answer.model,
                "choices": [{"index": 0, "turns": [{"content": answer.output, "token_len": answer.num_tokens}]}],
                "tstamp": time.time(),
                "conv_metadata": metadata,
            }
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(str(path), "".join(rows))


def upstream_token_counter(rules: Rules) -> Callable[[str], int] | None:
    """What style control calls the length of an answer: tokens of OpenAI's encodings; None where they are not at hand.

    tiktoken downloads an encoding once; TIKTOKEN_CACHE_DIR names a directory that has it.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(ENCODINGS[rules])
    except OSError:
        return None
    return lambda text: len(encoding.encode(text, disallowed_special=()))


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
