"""Preference data of several publishers, mapped to the one schema (vrm_spec section 7)."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.batching import stable_seed
from pipeline.data.files import Row, read_rows
from pipeline.data.prompts import as_messages
from pipeline.errors import DataError
from pipeline.records import Message, PreferencePair

NOT_AVAILABLE = {"N/A", "n/a", "", None}


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """One response with its annotated scores; an objective that was not annotated is absent."""

    response: str
    scores: Mapping[str, float]


def read_pairs(
    sources: Sequence[str], data_format: str, objectives: Sequence[str], *, hub: bool, seed: int
) -> list[PreferencePair]:
    """Reads every source and maps it to pairs.

    Args:
        sources: files or directories, or hub data sets when `hub`.
        data_format: a key of `ADAPTERS`.
        objectives: the K objectives of the run, in order.
        seed: decides ties and the choice of the rejected response.

    Raises:
        DataError: names file, line and field.
    """
    adapt = ADAPTERS[data_format]
    pairs = [pair for source in sources for pair in adapt(_rows(source, hub), tuple(objectives), seed)]
    if not pairs:
        raise DataError(f"no preference pair in {', '.join(sources) or 'data.preferences = ()'}")
    return pairs


def split_by_prompt(
    pairs: Sequence[PreferencePair], heldout_fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(training, held-out) pairs; all pairs of one normalised prompt stand on one side.

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


def shared_prompts(left: Iterable[Sequence[Message]], right: Iterable[Sequence[Message]]) -> int:
    """How many distinct normalised prompts stand on both sides."""
    return len({normalised_prompt(m) for m in left} & {normalised_prompt(m) for m in right})


def normalised_prompt(messages: Sequence[Message]) -> str:
    """Lower case, white space collapsed: the identity of a prompt for splitting and decontamination."""
    return " ".join(" ".join(m["content"] for m in messages).lower().split())


def take_pairs(pairs: Sequence[PreferencePair], max_pairs: int | None, seed: int) -> list[PreferencePair]:
    """At most `max_pairs` of them, chosen by seed, in their original order."""
    if max_pairs is None or max_pairs >= len(pairs):
        return list(pairs)
    chosen = np.random.default_rng(seed).choice(len(pairs), size=max_pairs, replace=False)
    return [pairs[i] for i in sorted(chosen)]


# ----------------------------------------------------------------------------- adapters


def _from_pairs(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Iterator[PreferencePair]:
    """The project's own schema: prompt, chosen, rejected and optionally scores, source, margin, id."""
    for row in rows:
        margin = row.values.get("margin")
        yield PreferencePair(
            id=str(row.values.get("id", row.place)),
            prompt=as_messages(row.values.get("prompt"), place=f"{row.place}, field 'prompt'"),
            chosen=_text(row, "chosen"),
            rejected=_text(row, "rejected"),
            scores_chosen=_scores(row, "scores_chosen", row.values.get("scores_chosen"), objectives),
            scores_rejected=_scores(row, "scores_rejected", row.values.get("scores_rejected"), objectives),
            source=str(row.values.get("source", "pairs")),
            margin=None if margin is None else _number(row, "margin", margin, -math.inf, math.inf),
        )


def _from_helpsteer2(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Iterator[PreferencePair]:
    """HelpSteer2: two responses a prompt; the one with the higher human helpfulness is chosen, ties are left out.

    Two layouts: one row a prompt with lists `responses` and `labels`, or NVIDIA's one row a response.
    """
    for row, prompt, responses in _helpsteer2_groups(rows, objectives):
        first, second = responses
        gap = first.scores["helpfulness"] - second.scores["helpfulness"]
        if gap != 0:
            chosen, rejected = (first, second) if gap > 0 else (second, first)
            yield _pair(row, prompt, chosen, rejected, source="helpsteer2", margin=abs(gap))


def _helpsteer2_groups(
    rows: Iterable[Row], objectives: tuple[str, ...]
) -> Iterator[tuple[Row, tuple[Message, ...], list[Annotated]]]:
    waiting: tuple[Any, Annotated] | None = None
    for row in rows:
        prompt = row.values.get("prompt")
        messages = as_messages(prompt, place=f"{row.place}, field 'prompt'")
        if "responses" in row.values:
            texts, labels = row.values["responses"], row.values.get("labels")
            if not isinstance(labels, list) or len(labels) != len(texts) or len(texts) != 2:
                raise DataError(f"{row.place}: fields 'responses' and 'labels' must be lists of two")
            yield (
                row,
                messages,
                [
                    Annotated(response=text, scores=_helpsteer2_scores(row, label, objectives))
                    for text, label in zip(texts, labels, strict=True)
                ],
            )
            continue
        annotated = Annotated(response=_text(row, "response"), scores=_helpsteer2_scores(row, row.values, objectives))
        if waiting is not None and waiting[0] == prompt:
            yield row, messages, [waiting[1], annotated]
            waiting = None
        else:
            waiting = (prompt, annotated)


def _helpsteer2_scores(row: Row, values: Mapping[str, Any], objectives: tuple[str, ...]) -> Mapping[str, float]:
    wanted = {name: values.get(name) for name in (*objectives, "helpfulness")}
    missing = [name for name in objectives if name not in values]
    if missing:
        raise unknown_objective(missing[0], [k for k, v in values.items() if isinstance(v, int | float)], row.place)
    return _scores(row, "labels", wanted, tuple(wanted), low=0.0, high=4.0) or {}


def _from_ultrafeedback(rows: Iterable[Row], objectives: tuple[str, ...], seed: int) -> Iterator[PreferencePair]:
    """UltraFeedback, raw: four completions a prompt, each with `annotations.<objective>.Rating` ("1".."5" or "N/A").

    One pair a prompt (vrm_spec section 7.2): chosen is the best mean rating (ties: most fives, then by seed),
    rejected is drawn by seed among the strictly lower. The overall score is not used: some of
    its upstream values are wrong.
    """
    for row in rows:
        prompt = as_messages(row.values.get("instruction"), place=f"{row.place}, field 'instruction'")
        if str(row.values.get("source", "")).startswith("truthful_qa"):
            continue
        rated = []
        for completion in row.values.get("completions") or []:
            scores = _ultrafeedback_scores(row, completion, objectives)
            if scores:
                rated.append(Annotated(response=completion["response"], scores=scores))
        if not rated:
            continue
        rng = np.random.default_rng(stable_seed("ultrafeedback", seed, normalised_prompt(prompt)))
        order = [rated[i] for i in rng.permutation(len(rated))]
        best = max(order, key=lambda a: (_mean(a.scores), list(a.scores.values()).count(5.0)))
        lower = [a for a in order if _mean(a.scores) < _mean(best.scores)]
        if lower:
            margin = _mean(best.scores) - _mean(lower[0].scores)
            yield _pair(row, prompt, best, lower[0], source="ultrafeedback", margin=margin)


def _ultrafeedback_scores(row: Row, completion: Mapping[str, Any], objectives: tuple[str, ...]) -> Mapping[str, float]:
    annotations = completion.get("annotations")
    if not isinstance(annotations, Mapping):
        raise DataError(f"{row.place}: a completion has no field 'annotations'")
    for objective in objectives:
        if objective not in annotations:
            raise unknown_objective(objective, list(annotations), row.place)
    ratings = {name: (annotations[name] or {}).get("Rating") for name in objectives}
    return _scores(row, "annotations", ratings, objectives, low=1.0, high=5.0) or {}


ADAPTERS: dict[str, Callable[[Iterable[Row], tuple[str, ...], int], Iterator[PreferencePair]]] = {
    "pairs": _from_pairs,
    "helpsteer2": _from_helpsteer2,
    "ultrafeedback": _from_ultrafeedback,
}


# ----------------------------------------------------------------------------- fields


def _rows(source: str, hub: bool) -> Iterator[Row]:
    if not hub:
        yield from read_rows(source)
        return
    from datasets import load_dataset

    for number, values in enumerate(load_dataset(source, split="train", streaming=True), start=1):
        yield Row(place=f"{source}, row {number}", number=number, values=values)


def _pair(
    row: Row, prompt: tuple[Message, ...], chosen: Annotated, rejected: Annotated, *, source: str, margin: float
) -> PreferencePair:
    digest = hashlib.sha256(normalised_prompt(prompt).encode()).hexdigest()[:12]
    return PreferencePair(
        id=str(row.values.get("id", f"{source}-{digest}")),
        prompt=prompt,
        chosen=chosen.response,
        rejected=rejected.response,
        scores_chosen=chosen.scores,
        scores_rejected=rejected.scores,
        source=source,
        margin=margin,
    )


def _text(row: Row, field: str) -> str:
    value = row.values.get(field)
    if not isinstance(value, str):
        raise DataError(f"{row.place}, field {field!r}: {value!r:.60} is no text")
    return value


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
        if values.get(name) not in NOT_AVAILABLE
    }
    return scores or None


def _number(row: Row, field: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f'{row.place}, field {field!r}: {value!r:.40} is no number and not "N/A"') from error
    if not low <= number <= high or math.isnan(number):
        raise DataError(f"{row.place}, field {field!r}: {number} is outside [{low}, {high}]")
    return number


def unknown_objective(name: str, known: Sequence[str], place: str) -> DataError:
    """The letter about an objective that the data or the recipe does not know, with its nearest neighbour."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return DataError(f"{place}: unknown objective {name!r}; known are {', '.join(sorted(known))}.{hint}")


def _mean(scores: Mapping[str, float]) -> float:
    return sum(scores.values()) / len(scores)
