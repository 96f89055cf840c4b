"""Preference data of several publishers, mapped to the one schema (docs/method.md section 8)."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeGuard

import numpy as np

from pipeline.data.batching import stable_seed
from pipeline.data.chat import strip_thinking
from pipeline.data.files import Row
from pipeline.data.prompts import parse_messages, prompt_of, split_conversation, with_columns_beside
from pipeline.errors import DataError
from pipeline.records import Message, Metrics, PreferencePair

INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Unicode's Default_Ignorable_Code_Point: zero-width characters, soft hyphens, marks of direction and variation."""


class LeftOut(StrEnum):
    """Why a comparison of a file gives no pair."""

    EMPTY = "an empty response"
    IDENTICAL = "identical responses"
    OTHER_PROMPT = "responses to different conversations"
    ALONE = "one response alone"
    TIE = "responses rated alike"
    UNRATED = "a response without a rating"
    TRUTHFUL_QA = "a prompt of TruthfulQA"


FAULTS = {LeftOut.EMPTY, LeftOut.IDENTICAL, LeftOut.OTHER_PROMPT, LeftOut.ALONE}
"""What no annotator meant. Many of them say that the file is read as something else than it is."""


LEFT_OUT_PREFIX = "data/left_out/"

PREFERRED = "preferred"
"""The annotation column that every format has: 1 for the chosen response, 0 for the rejected one."""


class AnnotationColumns:
    """The annotation columns of one source: which objective each one is, and which its rows have."""

    def __init__(self, source: str, objective_of: Mapping[str, str], *, refuse_others: bool) -> None:
        """
        Args:
            source: name of the source.
            objective_of: column -> objective, of the columns to read.
            refuse_others: in the project's own schema, another column is a mistake.
        """
        self.source = source
        self.objective_of = objective_of
        self.refuse_others = refuse_others
        self.found: dict[str, None] = {}
        """Columns that a row had, in the order of their appearance."""
        self.has_scores = False
        """Whether a row had a score of an objective: a column may be there and hold none."""

    @classmethod
    def of(cls, source: str, given: Mapping[str, str] | None, objectives: Sequence[str]) -> AnnotationColumns:
        """The columns of a source's map; without a map, the columns that are named as an objective."""
        if given is None:
            return cls(source, {objective: objective for objective in objectives}, refuse_others=True)
        return cls(source, given, refuse_others=False)

    def scores(
        self, row: Row, field: str, values: Mapping[str, Any], *, low: float = 0.0, high: float = 10.0
    ) -> dict[str, float]:
        """Objective -> score, of the columns that are annotated. "N/A" and null mean: not annotated."""
        self.found.update(dict.fromkeys(values))
        scores = {
            objective: _number(row, f"{field}.{column}", values[column], low, high)
            for column, objective in self.objective_of.items()
            if not _is_missing(values.get(column))
        }
        self.has_scores = self.has_scores or bool(scores)
        return scores

    def require_all(self, place: str) -> None:
        """Raises where no row has a column of the map.

        Raises:
            DataError: names the columns that were found.
        """
        if missing := self.missing():
            raise DataError(f"{place}: {missing}")

    def missing(self) -> str:
        """A sentence about the first column that no row has; empty where there is none."""
        missing = [column for column in self.objective_of if column not in {*self.found, PREFERRED}]
        if not missing:
            return ""
        near = difflib.get_close_matches(missing[0], self.found, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        found = ", ".join([*self.found, PREFERRED])
        return f"no row has the annotation column {missing[0]!r}. The columns found are {found}.{hint}"


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """One response with its annotated scores; an objective that was not annotated is absent."""

    response: str
    scores: Mapping[str, float]
    overall: float
    """What orders the responses of a prompt, on the annotators' scale."""
    fives: int = 0
    """How many of UltraFeedback's ratings are the best one."""


def left_out_counts(left_out: Mapping[LeftOut, int]) -> str:
    """The reasons with their counts, the most frequent first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} with {reason}" for reason, count in ordered)


def left_out_metrics(left_out: Mapping[str, Mapping[LeftOut, int]]) -> Metrics:
    """`data/left_out/<source>/<reason>`, from the counts by source and reason."""
    return {
        f"{LEFT_OUT_PREFIX}{source}/{reason.replace(' ', '_')}": float(count)
        for source, counts in left_out.items()
        for reason, count in counts.items()
    }


def fault_of(chosen: Sequence[str], rejected: Sequence[str]) -> LeftOut | None:
    """Why these responses of one prompt cannot be compared; None where they can.

    A reward model does not read thoughts, so a response that is nothing else is empty.
    """
    better, worse = ({strip_thinking(text).strip() for text in side} for side in (chosen, rejected))
    if "" in better | worse:
        return LeftOut.EMPTY
    return LeftOut.IDENTICAL if better & worse else None


def require_few_faults(
    num_kept: int, left_out: Mapping[LeftOut, int], names: str, max_left_out: float, *, setting: str
) -> None:
    """Refuses files of which too many comparisons are left out for one of `FAULTS`.

    Args:
        names: the files, for the message.
        max_left_out: share of the comparisons that may be left out, from the setting of that name.

    Raises:
        DataError: names the reasons with their counts.
    """
    faults = {reason: count for reason, count in left_out.items() if reason in FAULTS}
    num_faults, num_read = sum(faults.values()), num_kept + sum(left_out.values())
    if num_faults > max_left_out * num_read:
        raise DataError(
            f"{names}: {num_faults} of {num_read} comparisons cannot be used ({left_out_counts(faults)}), more than "
            f"{setting} = {max_left_out} allows. Correct the data or its format, or raise the setting."
        )


def require_annotations(pairs: Sequence[PreferencePair], *, scores: bool, margins: bool) -> None:
    """Refuses pairs that a loss cannot learn from; what one pair lacks is left out, what all lack is a mistake.

    Raises:
        DataError: no pair has scores, or none has a margin, where these are required; or a margin is negative.
    """
    if scores and not any(p.scores_chosen or p.scores_rejected for p in pairs):
        raise DataError(
            f"none of {len(pairs)} training pairs has objective scores, and this reward model learns from nothing else "
            "(reward.head = 'regression'). Give annotated pairs, or another head."
        )
    if margins and all(p.margin is None for p in pairs):
        raise DataError(
            f"none of {len(pairs)} training pairs has a margin, which reward.pair_loss.form asks for. "
            "Give pairs with a field 'margin', or use the form 'bt'."
        )
    for pair in pairs if margins else ():
        if pair.margin is not None and pair.margin < 0:
            raise DataError(
                f"pair {pair.id!r} has margin {pair.margin}: its chosen response was rated worse. "
                "Swap the two, or drop it."
            )


def shared_prompts(left: Iterable[Sequence[Message]], right: Iterable[Sequence[Message]]) -> int:
    """How many distinct normalised prompts are on both sides."""
    return len({normalised_prompt(m) for m in left} & {normalised_prompt(m) for m in right})


def normalised_prompt(messages: Sequence[Message]) -> str:
    """The identity of a prompt for splitting, decontamination and overlap; the text that is trained on stays as it is.

    Lower case, white space collapsed, characters that show nothing removed, and composed (Unicode's NFC), since the
    same word can be written with one accented letter or with a letter and an accent.
    """
    text = " ".join(m["content"] for m in messages)
    if not text.isascii():
        text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    # Lowering may take a composed letter apart.
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())


def take_pairs(pairs: Sequence[PreferencePair], count: int, seed: int, *, salt: str) -> list[PreferencePair]:
    """At most `count` of the pairs, in their order. A pair's content alone decides with the seed whether it is chosen.

    Args:
        salt: choices with another salt are independent of this one.
    """
    if count >= len(pairs):
        return list(pairs)
    draws = [stable_seed("take", salt, seed, *_content(pair)) for pair in pairs]
    chosen = sorted(range(len(pairs)), key=draws.__getitem__)[:count]
    return [pairs[i] for i in sorted(chosen)]


def _content(pair: PreferencePair) -> tuple[str, ...]:
    scores = [sorted((side or {}).items()) for side in (pair.scores_chosen, pair.scores_rejected)]
    turns = [(turn["role"], turn["content"]) for turn in pair.prompt]
    return repr(turns), pair.chosen, pair.rejected, repr((scores, pair.margin))


def first_of_each_prompt(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """One pair a normalised prompt, the first: independent trials where the prompts are."""
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        first.setdefault(normalised_prompt(pair.prompt), pair)
    return list(first.values())


# ----------------------------------------------------------------------------- adapters

Adapted = Iterator[PreferencePair | LeftOut]


def _from_pairs(rows: Iterable[Row], columns: AnnotationColumns, seed: int) -> Adapted:
    """The project's own schema: prompt, chosen, rejected and optionally scores, source, margin, id."""
    for row in rows:
        conversations = _conversations(row)
        if isinstance(conversations, LeftOut):
            yield conversations
            continue
        prompt, chosen, rejected = conversations
        margin = row.values.get("margin")
        yield PreferencePair(
            id=row.identity,
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            scores_chosen=_own_scores(row, "scores_chosen", columns),
            scores_rejected=_own_scores(row, "scores_rejected", columns),
            source=columns.source,
            margin=None if _is_missing(margin) else _number(row, "margin", margin),
        )


def _from_helpsteer2(rows: Iterable[Row], columns: AnnotationColumns, seed: int) -> Adapted:
    """HelpSteer2: two responses a prompt; the one with the higher human helpfulness is chosen.

    Helpfulness alone decides: complexity and verbosity describe a response and do not praise it, so a weighted sum
    would reward length. Ties and responses without helpfulness are left out.
    Two layouts: one row a prompt with lists `responses` and `labels`, or NVIDIA's one row a response. Scores are 0-4
    or any smaller unit (0-1 in some copies); do not mix units in one source, statistics are taken over all of it.
    """
    for group in _helpsteer2_groups(rows, columns):
        if isinstance(group, LeftOut):
            yield group
            continue
        row, prompt, (first, second) = group
        if first is None or second is None:
            yield LeftOut.UNRATED
        elif first.overall == second.overall:
            yield LeftOut.TIE
        else:
            chosen, rejected = (first, second) if first.overall > second.overall else (second, first)
            yield _pair(row, prompt, chosen, rejected, source=columns.source)


def _helpsteer2_groups(
    rows: Iterable[Row], columns: AnnotationColumns
) -> Iterator[tuple[Row, tuple[Message, ...], tuple[Annotated | None, Annotated | None]] | LeftOut]:
    """Yields row, prompt and both responses; a response is None if its helpfulness is not annotated."""
    waiting: tuple[Any, Annotated | None] | None = None
    for row in rows:
        prompt = row.values.get("prompt")
        messages = _helpsteer2_turns(prompt_of(row, ("prompt",)), place=f"{row.place}, field 'prompt'")
        if "responses" in row.values:
            texts, labels = row.values["responses"], row.values.get("labels")
            if not (_is_list(texts, str) and _is_list(labels, Mapping) and len(texts) == len(labels) == 2):
                raise DataError(f"{row.place}: 'responses' must be a list of two texts, 'labels' of their two ratings")
            first, second = (
                _helpsteer2_rated(row, text, label, columns) for text, label in zip(texts, labels, strict=True)
            )
            yield row, messages, (first, second)
            continue
        rated = _helpsteer2_rated(row, _text(row, "response"), row.values, columns)
        if waiting is not None and waiting[0] == prompt:
            yield row, messages, (waiting[1], rated)
            waiting = None
        else:
            if waiting is not None:
                yield LeftOut.ALONE
            waiting = (prompt, rated)
    if waiting is not None:
        yield LeftOut.ALONE


def _helpsteer2_turns(messages: tuple[Message, ...], *, place: str) -> tuple[Message, ...]:
    """The turns of a prompt in HelpSteer2's markup: the user, then "<extra_id_1>Assistant" and "<extra_id_1>User"."""
    *earlier, last = messages
    start, *marked = HELPSTEER2_TURN.split(last["content"])
    if not marked:
        return messages
    speakers = ["User", *marked[::2]]
    if unknown := {*speakers} - {*HELPSTEER2_ROLES}:
        raise DataError(f"{place}: a turn of {min(unknown)!r:.40}; known are {', '.join(HELPSTEER2_ROLES)}")
    turns = [
        {"role": HELPSTEER2_ROLES[speaker], "content": text}
        for speaker, text in zip(speakers, [start, *marked[1::2]], strict=True)
    ]
    # A system turn comes first and leaves nothing before it; an open turn of the assistant waits for the response.
    turns = turns[not start.strip() :]
    turns = turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    if not turns or turns[-1]["role"] != "user":
        raise DataError(f"{place}: the last turn is not the user's. Leave such rows out.")
    return parse_messages([*earlier, *turns], place=place)


def _helpsteer2_rated(
    row: Row, response: str, values: Mapping[str, Any], columns: AnnotationColumns
) -> Annotated | None:
    if _is_missing(values.get("helpfulness")):
        return None
    # NVIDIA's rows hold the texts beside the ratings.
    not_ratings = {"prompt", "response", "id"}
    labels = {name: value for name, value in values.items() if name not in not_ratings}
    return Annotated(
        response=response,
        scores=columns.scores(row, "labels", labels, high=4.0),
        overall=_number(row, "labels.helpfulness", values["helpfulness"], 0.0, 4.0),
    )


def _from_ultrafeedback(rows: Iterable[Row], columns: AnnotationColumns, seed: int) -> Adapted:
    """UltraFeedback, raw (four rated completions a prompt) or binarized (chosen and rejected); one pair a prompt.

    Prompts taken from TruthfulQA are left out: they are an evaluation set (docs/method.md section 8).
    """
    for row in rows:
        if str(row.values.get("source", "")).startswith("truthful_qa"):
            yield LeftOut.TRUTHFUL_QA
            continue
        binarized = "chosen" in row.values and "completions" not in row.values
        yield _binarized_pair(row, columns) if binarized else _pair_of_completions(row, columns, seed)


def _pair_of_completions(row: Row, columns: AnnotationColumns, seed: int) -> PreferencePair | LeftOut:
    """Each completion has `annotations.<objective>.Rating`, "1".."5" or "N/A" (docs/method.md section 8).

    Chosen is the best mean rating over the source's columns, or over all where it reads none (ties: most fives, then by
    seed); rejected is drawn by seed among the strictly lower. The overall score is not used: some of its upstream
    values are wrong.
    """
    prompt = prompt_of(row, ("instruction",))
    completions = row.values.get("completions")
    if not _is_list(completions, Mapping):
        raise DataError(f"{row.place}, field 'completions': {completions!r:.60} is no list of rated completions")
    rated = [a for a in (_ultrafeedback_rated(row, c, columns) for c in completions) if a is not None]
    if not rated:
        return LeftOut.UNRATED
    rng = np.random.default_rng(stable_seed("ultrafeedback", seed, normalised_prompt(prompt)))
    order = [rated[i] for i in rng.permutation(len(rated))]
    best = max(order, key=lambda a: (a.overall, a.fives))
    lower = [a for a in order if a.overall < best.overall]
    return _pair(row, prompt, best, lower[0], source=columns.source) if lower else LeftOut.TIE


def _ultrafeedback_rated(row: Row, completion: Mapping[str, Any], columns: AnnotationColumns) -> Annotated | None:
    """A completion with the mean of its known ratings; None when none is known."""
    response, annotations = completion.get("response"), completion.get("annotations")
    if not isinstance(response, str):
        raise DataError(f"{row.place}, field 'completions.response': {response!r:.60} is no text")
    if not isinstance(annotations, Mapping):
        raise DataError(f"{row.place}: a completion has no field 'annotations'")
    ratings = {}
    for name, annotation in annotations.items():
        if annotation is not None and not isinstance(annotation, Mapping):
            raise DataError(f"{row.place}, field 'annotations.{name}': {annotation!r:.60} has no field 'Rating'")
        ratings[name] = annotation.get("Rating") if annotation else None
    scores = columns.scores(row, "annotations", ratings, low=1.0, high=5.0)
    read = [*scores.values()]
    if not columns.objective_of:
        read = [_number(row, f"annotations.{k}", v, 1.0, 5.0) for k, v in ratings.items() if not _is_missing(v)]
    if not read:
        return None
    return Annotated(response=response, scores=scores, overall=sum(read) / len(read), fives=read.count(5.0))


def _binarized_pair(row: Row, columns: AnnotationColumns) -> PreferencePair | LeftOut:
    """`chosen` and `rejected` as texts next to a `prompt`, or as conversations, with one overall `score` each.

    Equal scores are left out.
    """
    conversations = _conversations(row)
    if isinstance(conversations, LeftOut):
        return conversations
    prompt, chosen, rejected = conversations
    high, low = row.values.get("score_chosen"), row.values.get("score_rejected")
    margin = None
    if not _is_missing(high) and not _is_missing(low):
        margin = _number(row, "score_chosen", high, 0.0, 10.0) - _number(row, "score_rejected", low, 0.0, 10.0)
    if margin == 0:
        return LeftOut.TIE
    if margin is not None and margin < 0 and chosen != rejected:
        raise DataError(f"{row.place}: score_chosen = {high} is below score_rejected = {low}")
    pair = _unrated_pair(row, prompt, chosen, rejected, margin=margin, source=columns.source)
    return _with_overall_scores(row, pair, high, low, columns)


def _from_hh_rlhf(rows: Iterable[Row], columns: AnnotationColumns, seed: int) -> Adapted:
    """HH-RLHF: dialogues of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." that differ in the last answer.

    `chosen` and `rejected` are whole dialogues, as Anthropic publishes them, or the answers next to a `prompt`. A pair
    is left out if its dialogues differ earlier, for then they answer different prompts.
    """
    for row in rows:
        prompt = "" if _is_missing(row.values.get("prompt")) else _text(row, "prompt")
        dialogues = [_dialogue(row, field, prompt) for field in ("chosen", "rejected")]
        (*prompt_turns, chosen), (*other_turns, rejected) = dialogues
        if prompt_turns != other_turns:
            yield LeftOut.OTHER_PROMPT
            continue
        answers = chosen["content"], rejected["content"]
        yield _unrated_pair(row, prompt_turns, *answers, margin=None, source=columns.source)


def _dialogue(row: Row, field: str, prompt: str) -> list[Message]:
    start, *turns = DIALOGUE_TURN.split(prompt + _text(row, field))
    messages: list[Message] = [
        {"role": {"Human": "user", "Assistant": "assistant"}[speaker], "content": text.strip()}
        for speaker, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    if start.strip() or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{row.place}, field {field!r}: no dialogue of '\\n\\nHuman: ...' and '\\n\\nAssistant: ...' that ends "
            "with the assistant. For a prompt that is no dialogue use the format 'pairs'."
        )
    return messages


def _from_webgpt(rows: Iterable[Row], columns: AnnotationColumns, seed: int) -> Adapted:
    """WebGPT comparisons: two answers with preference scores, whose difference is the margin. Ties are left out.

    As OpenAI publishes them (`question.full_text`, `answer_0`, `answer_1`, `score_0`, `score_1`), or as `prompt`,
    `chosen`, `rejected` and the list of both `score`s.
    """
    for row in rows:
        if "question" in row.values:
            question = row.values["question"]
            prompt = question.get("full_text") if isinstance(question, Mapping) else question
            answers = [_text(row, "answer_0"), _text(row, "answer_1")]
            scores = [_number(row, name, row.values.get(name)) for name in ("score_0", "score_1")]
        else:
            prompt, answers = row.values.get("prompt"), [_text(row, "chosen"), _text(row, "rejected")]
            both = row.values.get("score")
            if not _is_list(both) or len(both) != 2:
                raise DataError(f"{row.place}, field 'score': {both!r:.60} is no list of two scores")
            scores = [_number(row, "score", score) for score in both]
        if scores[0] == scores[1]:
            yield LeftOut.TIE
            continue
        best = int(scores[1] > scores[0])
        field = "question" if "question" in row.values else "prompt"
        messages = with_columns_beside(row, field, parse_messages(prompt, place=f"{row.place}, field {field!r}"))
        margin = abs(scores[0] - scores[1])
        pair = _unrated_pair(row, messages, answers[best], answers[1 - best], margin=margin, source=columns.source)
        yield _with_overall_scores(row, pair, scores[best], scores[1 - best], columns)


def _from_pku_saferlhf(rows: Iterable[Row], columns: AnnotationColumns, seed: int) -> Adapted:
    """PKU-SafeRLHF: the safer of two responses is chosen. Columns: `safety`, 3 - severity, and `is_safe`, 0 or 1.

    As PKU-Alignment publishes it (`response_0`, `response_1`, `safer_response_id`, `response_0_severity_level`, ...),
    or as `prompt`, `chosen` (the safer) and `rejected`. The publisher's other preference, helpfulness, is not read.
    """
    for row in rows:
        messages = prompt_of(row, ("prompt",))
        if "safer_response_id" not in row.values:
            texts = _text(row, "chosen"), _text(row, "rejected")
            yield _unrated_pair(row, messages, *texts, margin=None, source=columns.source)
            continue
        safer = int(_number(row, "safer_response_id", row.values["safer_response_id"], 0.0, 1.0))
        chosen, rejected = (_text(row, f"response_{side}") for side in (safer, 1 - safer))
        scores_chosen, scores_rejected = (
            columns.scores(row, f"response_{side}", _pku_annotations(row, side), high=3.0) or None
            for side in (safer, 1 - safer)
        )
        pair = _unrated_pair(row, messages, chosen, rejected, margin=None, source=columns.source)
        yield replace(pair, scores_chosen=scores_chosen, scores_rejected=scores_rejected)


def _pku_annotations(row: Row, side: int) -> dict[str, Any]:
    name = f"response_{side}_severity_level"
    severity, is_safe = row.values.get(name), row.values.get(f"is_response_{side}_safe")
    annotations: dict[str, Any] = {}
    if not _is_missing(severity):
        annotations["safety"] = 3.0 - _number(row, name, severity, 0.0, 3.0)
    if isinstance(is_safe, bool):
        annotations["is_safe"] = float(is_safe)
    return annotations


HELPSTEER2_TURN = re.compile(r"\n?<extra_id_[01]>(\w+)(?:\n|$)")
HELPSTEER2_ROLES = {"System": "system", "User": "user", "Assistant": "assistant"}

DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")

ADAPTERS: dict[str, Callable[[Iterable[Row], AnnotationColumns, int], Adapted]] = {
    "pairs": _from_pairs,
    "helpsteer2": _from_helpsteer2,
    "ultrafeedback": _from_ultrafeedback,
    "hh_rlhf": _from_hh_rlhf,
    "webgpt": _from_webgpt,
    "pku_saferlhf": _from_pku_saferlhf,
}


# ----------------------------------------------------------------------------- fields


def _pair(
    row: Row, prompt: tuple[Message, ...], chosen: Annotated, rejected: Annotated, *, source: str
) -> PreferencePair:
    return PreferencePair(
        id=row.identity,
        prompt=prompt,
        chosen=chosen.response,
        rejected=rejected.response,
        scores_chosen=chosen.scores or None,
        scores_rejected=rejected.scores or None,
        source=source,
        margin=chosen.overall - rejected.overall,
    )


def _unrated_pair(
    row: Row, prompt: Sequence[Message], chosen: str, rejected: str, *, margin: float | None, source: str
) -> PreferencePair:
    return PreferencePair(
        id=row.identity,
        prompt=tuple(prompt),
        chosen=chosen,
        rejected=rejected,
        scores_chosen=None,
        scores_rejected=None,
        source=source,
        margin=margin,
    )


def _text(row: Row, field: str) -> str:
    value = row.values.get(field)
    if not isinstance(value, str):
        found = f"; {row.found}" if value is None else ""
        raise DataError(f"{row.place}, field {field!r}: {value!r:.60} is no text{found}")
    return value


def _conversations(row: Row) -> tuple[tuple[Message, ...], str, str] | LeftOut:
    """(prompt, chosen response, rejected response). Each side is a text, or a conversation that ends with it.

    A conversation brings the turns before the response, which a field `prompt` may repeat in part or in whole.
    """
    (history, chosen), (other_history, rejected) = (_history_and_response(row, side) for side in ("chosen", "rejected"))
    if history != other_history:
        return LeftOut.OTHER_PROMPT
    given = row.values.get("prompt")
    of_conversations = with_columns_beside(row, "chosen", history) if history else ()
    if history and given is None:
        return of_conversations, chosen, rejected
    prompt = prompt_of(row, ("prompt",))
    # UltraFeedback's `prompt` is the first user turn; other publishers' is the whole history, with the system turn.
    repeats = not history or prompt[-len(history) :] == history
    return prompt if repeats else of_conversations, chosen, rejected


def _history_and_response(row: Row, field: str) -> tuple[tuple[Message, ...], str]:
    value = row.values.get(field)
    if _is_list(value) and value:
        return split_conversation(value, place=f"{row.place}, field {field!r}")
    return (), _text(row, field)


def _is_list(value: Any, kind: type = object) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_missing(value: Any) -> bool:
    """Not annotated: absent, null, empty or "N/A"."""
    return value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A"))


def _own_scores(row: Row, field: str, columns: AnnotationColumns) -> Mapping[str, float] | None:
    """The known scores in a field of the project's own schema; None when there are none."""
    values = row.values.get(field)
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise DataError(f"{row.place}, field {field!r}: {values!r:.60} is no mapping from objective to score")
    for name in values if columns.refuse_others else ():
        if name not in columns.objective_of:
            raise unknown_objective(name, [*columns.objective_of], f"{row.place}, field {field!r}")
    return columns.scores(row, field, values) or None


def _with_overall_scores(
    row: Row, pair: PreferencePair, chosen: Any, rejected: Any, columns: AnnotationColumns
) -> PreferencePair:
    """The pair with its overall scores as the annotation column `score`."""
    scores_chosen, scores_rejected = (
        columns.scores(row, "score", {"score": value}, low=-math.inf, high=math.inf) or None
        for value in (chosen, rejected)
    )
    return replace(pair, scores_chosen=scores_chosen, scores_rejected=scores_rejected)


def _number(row: Row, field: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f'{row.place}, field {field!r}: {value!r:.40} is no number and not "N/A"') from error
    if not math.isfinite(number):
        raise DataError(f"{row.place}, field {field!r}: {value!r:.40} is no finite number")
    if not low <= number <= high:
        raise DataError(f"{row.place}, field {field!r}: {number} is outside [{low}, {high}]")
    return number


def unknown_objective(name: str, known: Sequence[str], place: str) -> DataError:
    """The error about an objective that the data or the recipe does not know; names the most similar known one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return DataError(f"{place}: unknown objective {name!r}; known are {', '.join(sorted(known))}.{hint}")
