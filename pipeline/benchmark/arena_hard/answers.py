"""Arena-Hard's answer files, in the layouts of both editions.

v0.1 has the fields `question_id`, `choices` and `conv_metadata`. v2, since April 2025, has `uid`, `messages` and
`metadata`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.benchmark.arena_hard.battles import Rules
from pipeline.benchmark.arena_hard.style_control import StyleFeatures, markdown_counts, style_features
from pipeline.data.files import Row, read_rows
from pipeline.errors import DataError
from pipeline.stages.storage import write_text

ENCODINGS: dict[Rules, str] = {"v0.1": "cl100k_base", "v2": "o200k_base"}
"""Edition -> tiktoken encoding: that of gpt-3.5-turbo, and that of gpt-4o."""


@dataclass(frozen=True, kw_only=True)
class ArenaAnswer:
    """One answer of one model."""

    question_id: str
    model: str
    output: str
    num_tokens: int
    """Token count that the file gives."""
    place: str = field(default="an answer", compare=False, repr=False)
    """File and line of the answer."""


def read_arena_answers(files: Sequence[str]) -> list[ArenaAnswer]:
    """The answers of files in either layout.

    Raises:
        DataError: a row is not an answer with its number of tokens. Names file, line and field.
    """
    return [_answer(row) for file in files for row in read_rows(file)]


def answer_styles(answers: Sequence[ArenaAnswer]) -> dict[tuple[str, str], StyleFeatures]:
    """(model, question id) -> style of the answer.

    Raises:
        DataError: a model answers a question twice. Names both lines.
    """
    first: dict[tuple[str, str], ArenaAnswer] = {}
    for answer in answers:
        known = first.setdefault((answer.model, answer.question_id), answer)
        if known is not answer:
            raise DataError(
                f"{answer.place}: {answer.model} answers question {answer.question_id} again, as in {known.place}. "
                "Keep one."
            )
    return {key: style_features(answer.output, num_tokens=answer.num_tokens) for key, answer in first.items()}


def write_arena_answers(
    path: Path, answers: Sequence[ArenaAnswer], *, prompts: Mapping[str, str], rules: Rules
) -> None:
    """Writes answers in the layout of one edition, in one atomic step.

    Args:
        prompts: question id -> prompt of the question.
    """
    rows = []
    for answer in answers:
        identity = hashlib.sha256(f"{answer.model}\n{answer.question_id}\n{answer.output}".encode()).hexdigest()[:22]
        # Upstream's v2 reads these values by position, so the length must be first.
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
    """Counts tokens in the OpenAI encoding that style control uses; None where the encoding is not available.

    tiktoken downloads an encoding on first use. The directory TIKTOKEN_CACHE_DIR may already contain it.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(ENCODINGS[rules])
    except OSError:
        return None
    return lambda text: len(encoding.encode(text, disallowed_special=()))


def _answer(row: Row) -> ArenaAnswer:
    is_v2 = "uid" in row.values
    try:
        output, num_tokens = _v2_answer(row.values) if is_v2 else _v0_1_answer(row.values)
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{row.place}: no answer with its number of tokens ({error!r}). Give choices[0].turns[0].content with "
            "conv_metadata.token_len, or messages[-1].content.answer with metadata.token_len."
        ) from error
    if not isinstance(output, str) or not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
        raise DataError(f"{row.place}: {output!r:.40} is no answer, or {num_tokens!r:.40} no number of tokens")
    return ArenaAnswer(
        question_id=question_id_of(row),
        model=row.require("model" if is_v2 else "model_id", str),
        output=output,
        num_tokens=num_tokens,
        place=row.place,
    )


def _v2_answer(values: Mapping[str, Any]) -> tuple[Any, Any]:
    return values["messages"][-1]["content"]["answer"], values["metadata"]["token_len"]


def _v0_1_answer(values: Mapping[str, Any]) -> tuple[Any, Any]:
    turn = values["choices"][0]["turns"][0]
    # Early files have the token count inside the turn, later ones beside the turn.
    count_holder = turn if "token_len" in turn else values["conv_metadata"]
    return turn["content"], count_holder["token_len"]


def question_id_of(row: Row) -> str:
    """The question id of a row in either layout."""
    return row.require("uid" if "uid" in row.values else "question_id", str)
