"""Preference data of several publishers, mapped to the one schema (docs/method.md section 8)."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, TypeGuard

import numpy as np

from pipeline.data.batching import stable_seed
from pipeline.data.chat import strip_thinking
from pipeline.data.files import Row, distinct, read_hub_rows, read_rows, require_distinct_files
from pipeline.data.prompts import parse_messages, prompt_of, split_conversation, with_columns_beside
from pipeline.errors import DataError
from pipeline.records import Message, PreferencePair

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


@dataclass(frozen=True, kw_only=True)
class PairsRead:
    """What the files of a run hold."""

    pairs: list[PreferencePair]
    left_out: Mapping[LeftOut, int]
    """Comparisons that gave no pair, by reason."""


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """One response with its annotated scores; an objective that was not annotated is absent."""

    response: str
    scores: Mapping[str, float]
    overall: float
    """What orders the responses of a prompt, on the annotators' scale."""


def read_pairs(
    sources: Sequence[str], data_format: str, objectives: Sequence[str], *, hub: bool, seed: int, max_left_out: float
) -> PairsRead:
    """Reads every source and maps it to pairs. Pairs with an empty response, or twice the same, are left out.

    Args:
        sources: files or directories, or hub data sets when `hub`.
        data_format: a key of `ADAPTERS`.
        objectives: the K objectives of the run, in order.
        seed: decides ties and the choice of the rejected response.
        max_left_out: share of the comparisons that may be left out for one of `FAULTS`.

    Raises:
        DataError: names file, line and field; or no pair is left, or too many are left out.
    """
    adapt = ADAPTERS[data_format]
    if not hub:
        require_distinct_files(sources)
    pairs: list[PreferencePair] = []
    left_out: Counter[LeftOut] = Counter()
    for source in sources:
        for read in adapt(_rows(source, hub), tuple(objectives), seed):
            outcome = read if isinstance(read, LeftOut) else fault_of([read.chosen], [read.rejected]) or read
            if isinstance(outcome, LeftOut):
                left_out[outcome] += 1
            else:
                pairs.append(outcome)
    _require_enough(pairs, left_out, sources, max_left_out)
    # Publishers give one id to all pairs of a prompt, or one to all rows. What follows from an id, such as a flipped
    # label, must not be the same for all of them.
    identities = distinct(pair.id for pair in pairs)
    return PairsRead(
        pairs=[replace(pair, id=identity) for pair, identity in zip(pairs, identities, strict=True)], left_out=left_out
    )


def left_out_counts(left_out: Mapping[LeftOut, int]) -> str:
    """The reasons with their counts, the most frequent first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} with {reason}" for reason, count in ordered)


def fault_of(chosen: Sequence[str], rejected: Sequence[str]) -> LeftOut | None:
    """Why these responses of one prompt cannot be compared; None where they can.

    A reward model does not read thoughts, so a response that is nothing else is empty.
    """
    better, worse = ({strip_thinking(text).strip() for text in side} for side in (chosen, rejected))
    if "" in better | worse:
        return LeftOut.EMPTY
    return LeftOut.IDENTICAL if better & worse else None


def _require_enough(
    pairs: Sequence[PreferencePair], left_out: Mapping[LeftOut, int], sources: Sequence[str], max_left_out: float
) -> None:
    names = ", ".join(sources) or "data.preferences = ()"
    if not pairs:
        counts = f"; left out: {left_out_counts(left_out)}" if left_out else ""
        raise DataError(f"no preference pair in {names}{counts}")
    require_few_faults(len(pairs), left_out, names, max_left_out, setting="data.max_left_out")


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


def split_by_prompt(
    pairs: Sequence[PreferencePair], heldout_fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(training, held-out) pairs; all pairs of one normalised prompt go to one side.

    Raises:
        DataError: one side is empty.
    """
    sides: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
    for pair in pairs:
        draw = stable_seed("split", seed, normalised_prompt(pair.prompt)) / 2**62
        sides[draw < heldout_fraction].append(pair)
    if not sides[0] or not sides[1]:
        raise DataError(
            f"splitting {len(pairs)} pairs by prompt with data.heldout_fraction = {heldout_fraction} leaves "
            f"{len(sides[0])} for training and {len(sides[1])} held out. Give more data, or another fraction."
        )
    return sides


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


def take_pairs(pairs: Sequence[PreferencePair], max_pairs: int | None, seed: int) -> list[PreferencePair]:
    """At most `max_pairs` of the pairs, chosen by seed, in their original order."""
    if max_pairs is None or max_pairs >= len(pairs):
        return list(pairs)
    chosen = np.random.default_rng(seed).choice(len(pairs), size=max_pairs, replace=False)
    return [pairs[i] for i in sorted(chosen)]


def first_of_each_prompt(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """One pair a normalised prompt, the first: independent trials where the prompts are."""
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        first.setdefault(normalised_prompt(pair.prompt), pair)
    return list(first.values())


# ----------------------------------------------------------------------------- adapters

Adapted = Iterator[PreferencePair | LeftOut]


def _from_pairs(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Adapted:
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
            scores_chosen=_scores(row, "scores_chosen", row.values.get("scores_chosen"), objectives),
            scores_rejected=_scores(row, "scores_rejected", row.values.get("scores_rejected"), objectives),
            source=str(row.values.get("source", "pairs")),
            margin=None if _is_missing(margin) else _number(row, "margin", margin),
        )


def _from_helpsteer2(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Adapted:
    """HelpSteer2: two responses a prompt; the one with the higher human helpfulness is chosen.

    Helpfulness alone decides: complexity and verbosity describe a response and do not praise it, so a weighted sum
    would reward length. Ties and responses without helpfulness are left out.
    Two layouts: one row a prompt with lists `responses` and `labels`, or NVIDIA's one row a response. Scores are 0-4
    or any smaller unit (0-1 in some copies); do not mix units in one run, statistics are taken over all of it.
    """
    for group in _helpsteer2_groups(rows, objectives):
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
            yield _pair(row, prompt, chosen, rejected, source="helpsteer2")


def _helpsteer2_groups(
    rows: Iterable[Row], objectives: tuple[str, ...]
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
                _helpsteer2_rated(row, text, label, objectives) for text, label in zip(texts, labels, strict=True)
            )
            yield row, messages, (first, second)
            continue
        rated = _helpsteer2_rated(row, _text(row, "response"), row.values, objectives)
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
    row: Row, response: str, values: Mapping[str, Any], objectives: tuple[str, ...]
) -> Annotated | None:
    known = [name for name, value in values.items() if isinstance(value, int | float)]
    for name in objectives:
        if name not in values:
            raise unknown_objective(name, known, row.place)
    if _is_missing(values.get("helpfulness")):
        return None
    return Annotated(
        response=response,
        scores=_scores(row, "labels", {name: values[name] for name in objectives}, objectives, high=4.0) or {},
        overall=_number(row, "labels.helpfulness", values["helpfulness"], 0.0, 4.0),
    )


def _from_ultrafeedback(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Adapted:
    """UltraFeedback, raw (four rated completions a prompt) or binarized (chosen and rejected); one pair a prompt.

    Prompts taken from TruthfulQA are left out: they are an evaluation set (docs/method.md section 8).
    """
    for row in rows:
        if str(row.values.get("source", "")).startswith("truthful_qa"):
            yield LeftOut.TRUTHFUL_QA
            continue
        binarized = "chosen" in row.values and "completions" not in row.values
        yield _binarized_pair(row) if binarized else _pair_of_completions(row, objectives, seed)


def _pair_of_completions(row: Row, objectives: tuple[str, ...], seed: int) -> PreferencePair | LeftOut:
    """Each completion has `annotations.<objective>.Rating`, "1".."5" or "N/A" (docs/method.md section 8).

    Chosen is the best mean rating (ties: most fives, then by seed), rejected is drawn by seed among the strictly lower.
    The overall score is not used: some of its upstream values are wrong.
    """
    prompt = prompt_of(row, ("instruction",))
    completions = row.values.get("completions")
    if not _is_list(completions, Mapping):
        raise DataError(f"{row.place}, field 'completions': {completions!r:.60} is no list of rated completions")
    rated = [a for a in (_ultrafeedback_rated(row, c, objectives) for c in completions) if a is not None]
    if not rated:
        return LeftOut.UNRATED
    rng = np.random.default_rng(stable_seed("ultrafeedback", seed, normalised_prompt(prompt)))
    order = [rated[i] for i in rng.permutation(len(rated))]
    best = max(order, key=lambda a: (a.overall, list(a.scores.values()).count(5.0)))
    lower = [a for a in order if a.overall < best.overall]
    return _pair(row, prompt, best, lower[0], source="ultrafeedback") if lower else LeftOut.TIE


def _ultrafeedback_rated(row: Row, completion: Mapping[str, Any], objectives: tuple[str, ...]) -> Annotated | None:
    """A completion with the mean of its known ratings; None when none is known."""
    response, annotations = completion.get("response"), completion.get("annotations")
    if not isinstance(response, str):
        raise DataError(f"{row.place}, field 'completions.response': {response!r:.60} is no text")
    if not isinstance(annotations, Mapping):
        raise DataError(f"{row.place}: a completion has no field 'annotations'")
    ratings = {}
    for name in objectives:
        if name not in annotations:
            raise unknown_objective(name, list(annotations), row.place)
        annotation = annotations[name]
        if annotation is not None and not isinstance(annotation, Mapping):
            raise DataError(f"{row.place}, field 'annotations.{name}': {annotation!r:.60} has no field 'Rating'")
        ratings[name] = annotation.get("Rating") if annotation else None
    scores = _scores(row, "annotations", ratings, objectives, low=1.0, high=5.0)
    if scores is None:
        return None
    return Annotated(response=response, scores=scores, overall=sum(scores.values()) / len(scores))


def _binarized_pair(row: Row) -> PreferencePair | LeftOut:
    """`chosen` and `rejected` as texts next to a `prompt`, or as conversations; overall scores, no objective scores.

    Without objective scores nothing supervises the weights. Equal scores are left out.
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
    return _unrated_pair(row, prompt, chosen, rejected, margin=margin, source="ultrafeedback")


def _from_hh_rlhf(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Adapted:
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
        yield _unrated_pair(row, prompt_turns, chosen["content"], rejected["content"], margin=None, source="hh_rlhf")


def _dialogue(row: Row, field: str, prompt: str) -> list[Message]:
    start, *turns = DIALOGUE_TURN.split(prompt + _text(row, field))
    messages: list[Message] = [
        {"role": {"Human": "user", "Assistant": "assistant"}[speaker], "content": text.strip()}
        for speaker, text in zip(turns[::2], turns[1::2], strict=True)
    ]
    if start.strip() or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{row.place}, field {field!r}: no dialogue of '\\n\\nHuman: ...' and '\\n\\nAssistant: ...' that ends "
            "with the assistant. For a prompt that is no dialogue use data.preferences_format=pairs."
        )
    return messages


def _from_webgpt(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Adapted:
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
        yield _unrated_pair(row, messages, answers[best], answers[1 - best], margin=margin, source="webgpt")


def _from_pku_saferlhf(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Adapted:
    """PKU-SafeRLHF: the safer of two responses is chosen. Its score `safety` is 3 - severity, if that is an objective.

    As PKU-Alignment publishes it (`response_0`, `response_1`, `safer_response_id`, `response_0_severity_level`, ...),
    or as `prompt`, `chosen` (the safer) and `rejected`. The publisher's other preference, helpfulness, is not read.
    """
    for row in rows:
        messages = prompt_of(row, ("prompt",))
        if "safer_response_id" not in row.values:
            yield _unrated_pair(row, messages, _text(row, "chosen"), _text(row, "rejected"), margin=None, source="pku")
            continue
        safer = int(_number(row, "safer_response_id", row.values["safer_response_id"], 0.0, 1.0))
        sides = []
        for side in (safer, 1 - safer):
            severity = row.values.get(f"response_{side}_severity_level")
            rated = "safety" in objectives and not _is_missing(severity)
            name = f"response_{side}_severity_level"
            scores = {"safety": 3.0 - _number(row, name, severity, 0.0, 3.0)} if rated else None
            sides.append((_text(row, f"response_{side}"), scores))
        (chosen, scores_chosen), (rejected, scores_rejected) = sides
        pair = _unrated_pair(row, messages, chosen, rejected, margin=None, source="pku")
        yield replace(pair, scores_chosen=scores_chosen, scores_rejected=scores_rejected)


HELPSTEER2_TURN = re.compile(r"\n?<extra_id_[01]>(\w+)(?:\n|$)")
HELPSTEER2_ROLES = {"System": "system", "User": "user", "Assistant": "assistant"}

DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant):")

ADAPTERS: dict[str, Callable[[Iterable[Row], tuple[str, ...], int], Adapted]] = {
    "pairs": _from_pairs,
    "helpsteer2": _from_helpsteer2,
    "ultrafeedback": _from_ultrafeedback,
    "hh_rlhf": _from_hh_rlhf,
    "webgpt": _from_webgpt,
    "pku_saferlhf": _from_pku_saferlhf,
}


# ----------------------------------------------------------------------------- fields


def _rows(source: str, hub: bool) -> Iterator[Row]:
    if hub:
        return read_hub_rows(source, "train", remedy='set data.source to "files"')
    return read_rows(source)


def _pair(
    row: Row, prompt: tuple[Message, ...], chosen: Annotated, rejected: Annotated, *, source: str
) -> PreferencePair:
    return PreferencePair(
        id=row.identity,
        prompt=prompt,
        chosen=chosen.response,
        rejected=rejected.response,
        scores_chosen=chosen.scores,
        scores_rejected=rejected.scores,
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
        raise DataError(f"{row.place}, field {field!r}: {value!r:.60} is no text")
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


def _scores(
    row: Row, field: str, values: Any, objectives: tuple[str, ...], *, low: float = 0.0, high: float = 10.0
) -> Mapping[str, float] | None:
    """The known scores among `values`; None when there are none. "N/A" and null mean: not annotated."""
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise DataError(f"{row.place}, field {field!r}: {values!r:.60} is no mapping from objective to score")
    for name in values:
        if name not in objectives:
            raise unknown_objective(name, objectives, f"{row.place}, field {field!r}")
    scores = {
        name: _number(row, f"{field}.{name}", values[name], low, high)
        for name in objectives
        if not _is_missing(values.get(name))
    }
    return scores or None


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
