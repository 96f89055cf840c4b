"""The sources of preference pairs: what each one holds, how much of it is used, and on which side its prompts stand."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.config.data import SourceConfig
from pipeline.data.batching import stable_seed
from pipeline.data.files import Row, distinct, read_hub_rows, read_rows
from pipeline.data.preferences import (
    ADAPTERS,
    PREFERRED,
    AnnotationColumns,
    LeftOut,
    fault_of,
    left_out_counts,
    normalised_prompt,
    require_few_faults,
    take_pairs,
)
from pipeline.errors import DataError
from pipeline.records import Message, PreferencePair

OVERALL = {PREFERRED, "score"}
"""Columns that judge a response as a whole. They are an objective only where a map says so."""

VALUES_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class SourceRead:
    """What one source gives to a run."""

    config: SourceConfig
    pairs: Sequence[PreferencePair]
    """The pairs that the run uses, in the order of the file."""
    num_usable: int
    """Pairs that the source holds."""
    left_out: Mapping[LeftOut, int]
    """Comparisons that gave no pair, by reason."""
    columns: tuple[str, ...]
    """Annotation columns of its rows, `preferred` aside."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def is_annotated(self) -> bool:
        return any(pair.scores_chosen or pair.scores_rejected for pair in self.pairs)

    def taking(self, count: int, seed: int) -> SourceRead:
        """The same source with at most `count` of its pairs."""
        return replace(self, pairs=take_pairs(self.pairs, count, seed, salt="source"))

    def note(self) -> str:
        """A sentence about the size of the source."""
        used = f"source {self.name}: {len(self.pairs):,} of {self.num_usable:,} pairs"
        if self.config.cap is not None and self.config.cap > self.num_usable:
            used += f", fewer than its cap of {self.config.cap:,}"
        if self.config.weight is not None:
            used += f" for a weight of {self.config.weight:g}"
        if self.config.side != "both":
            used += {"train": ", all for training", "heldout": ", all held out"}[self.config.side]
        if not self.is_annotated:
            used += ", without scores"
        return used + (f"; left out: {left_out_counts(self.left_out)}" if self.left_out else "")


def read_source(
    source: SourceConfig, place: str, objectives: Sequence[str], *, seed: int, max_left_out: float
) -> SourceRead:
    """Reads a source and maps it to pairs. Pairs with an empty response, or twice the same, are left out.

    Args:
        place: its file or directory, or its name on the hub.
        objectives: the K objectives of the run, in order.
        seed: decides ties, the choice of the rejected response, and the pairs of a cap.
        max_left_out: share of the comparisons that may be left out for one of `FAULTS`.

    Raises:
        DataError: names file, line and field; or a column of its map is missing, no pair is left, or too many are
            left out.
    """
    columns = AnnotationColumns.of(source.name, source.objectives, objectives)
    pairs: list[PreferencePair] = []
    left_out: Counter[LeftOut] = Counter()
    for read in ADAPTERS[source.format](_rows(source, place), columns, seed):
        outcome = read if isinstance(read, LeftOut) else fault_of([read.chosen], [read.rejected]) or read
        if isinstance(outcome, LeftOut):
            left_out[outcome] += 1
        else:
            pairs.append(_with_preferred(outcome, columns.objective_of.get(PREFERRED)))
    _require_enough(pairs, left_out, place, max_left_out, columns)
    if source.objectives is not None:
        columns.require_all(f"source {source.name!r}, {place}")
    # Publishers give one id to all pairs of a prompt, or one to all rows. What follows from an id, such as a flipped
    # label, must not be the same for all of them.
    identities = distinct(pair.id for pair in pairs)
    pairs = [replace(pair, id=identity) for pair, identity in zip(pairs, identities, strict=True)]
    read_whole = SourceRead(
        config=source, pairs=pairs, num_usable=len(pairs), left_out=left_out, columns=tuple(columns.found)
    )
    return read_whole if source.cap is None else read_whole.taking(source.cap, seed)


def _rows(source: SourceConfig, place: str) -> Iterator[Row]:
    if source.hub is not None:
        rows = read_hub_rows(place, source.hub_split, remedy="give its files as `path` in data.sources")
    else:
        rows = read_rows(place)
    return _matching_rows(rows, source, place) if source.where else rows


def _matching_rows(rows: Iterable[Row], source: SourceConfig, place: str) -> Iterator[Row]:
    """The rows of `where`.

    Raises:
        DataError: there is none, or a row lacks one of the columns.
    """
    seen: dict[str, set[str]] = {column: set() for column in source.where}
    matched = False
    for row in rows:
        if is_of(row, source):
            matched = True
            yield row
        for column, values in seen.items():
            if len(values) < VALUES_SHOWN:
                values.add(str(row.values[column]))
    if not matched:
        found = "; ".join(f"{column} has {', '.join(sorted(values))}" for column, values in seen.items())
        raise DataError(f"{place}: no row has the values {dict(source.where)} of `where` of {source.name!r}. {found}.")


def is_of(row: Row, source: SourceConfig) -> bool:
    """Whether the row has the values of the source's `where`.

    Raises:
        DataError: it lacks one of the columns.
    """
    for column in source.where:
        if column not in row.values:
            raise DataError(
                f"{row.place}: data.sources `where` of source {source.name!r} names the column {column!r}; the row "
                f"has {', '.join(sorted(row.values))}"
            )
    return all(str(row.values[column]) == str(value) for column, value in source.where.items())


def _with_preferred(pair: PreferencePair, objective: str | None) -> PreferencePair:
    if objective is None:
        return pair
    return replace(
        pair,
        scores_chosen={**(pair.scores_chosen or {}), objective: 1.0},
        scores_rejected={**(pair.scores_rejected or {}), objective: 0.0},
    )


def _require_enough(
    pairs: Sequence[PreferencePair],
    left_out: Mapping[LeftOut, int],
    place: str,
    max_left_out: float,
    columns: AnnotationColumns,
) -> None:
    if not pairs:
        counts = f"; left out: {left_out_counts(left_out)}" if left_out else ""
        missing = f"; {columns.missing()}" if columns.found and columns.missing() else ""
        raise DataError(f"no preference pair in {place}{counts}{missing}")
    require_few_faults(len(pairs), left_out, place, max_left_out, setting="data.max_left_out")


# ----------------------------------------------------------------------------- the mixture


def in_their_shares(sources: Sequence[SourceRead], seed: int) -> list[SourceRead]:
    """The sources with as many pairs as their weights ask for; a source with too few gives all that it has.

    Where every source has a weight, the scarcest one gives all its pairs, and the mixture has the exact shares. Else
    the sources without a weight fix the size of the mixture. Which pairs a source gives does not depend on the others.
    """
    trained = [source for source in sources if source.config.side != "heldout"]
    total_weight = sum(source.config.weight or 0.0 for source in trained)
    if not total_weight:
        return list(sources)
    fixed = sum(len(source.pairs) for source in trained if source.config.weight is None)
    if fixed:
        per_weight = fixed / (1.0 - total_weight)
    else:
        per_weight = min(len(source.pairs) / source.config.weight for source in trained if source.config.weight)
    return [
        source
        if source.config.weight is None
        else source.taking(max(1, round(source.config.weight * per_weight)), seed)
        for source in sources
    ]


def require_known_objectives(sources: Sequence[SourceRead], objectives: Sequence[str]) -> None:
    """Refuses an objective that no source annotates, where some source annotates anything.

    Raises:
        DataError: names the objective, and the columns that were found.
    """
    readable = [source for source in sources if source.config.objectives != {}]
    given: set[str] = set()
    for source in readable:
        of_source = source.config.objectives
        by_name = {column: column for column in source.columns} if of_source is None else of_source
        given.update(by_name.values())
    columns = [column for source in readable for column in source.columns if column not in OVERALL]
    missing = [objective for objective in objectives if objective not in given]
    if not missing or not (columns or any(source.config.objectives for source in readable)):
        return
    near = difflib.get_close_matches(missing[0], columns, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    found = "; ".join(f"{source.name}: {', '.join(source.columns) or 'none'}" for source in readable)
    raise DataError(
        f"unknown objective {missing[0]!r}: no source annotates it. The annotation columns found are: {found}.{hint} "
        "Correct the name, map a column to it in data.sources[...].objectives, or take it out of `objectives`."
    )


def asks_for_scores(source: SourceConfig, score_weight: float | None) -> bool:
    """Whether a source must have scores: it maps columns to objectives, or the recipe sets the weight of their loss."""
    return bool(source.objectives) or (source.objectives is None and bool(score_weight))


def require_usable_annotations(sources: Sequence[SourceRead], score_weight: float | None) -> None:
    """Refuses a source that was to have scores and has none.

    Args:
        score_weight: what the recipe sets; None leaves it to the head, which learns scores where there are any.

    Raises:
        DataError: names the source and the columns that were found.
    """
    for source in sources:
        is_trained = source.config.side != "heldout"
        if is_trained and asks_for_scores(source.config, score_weight) and not source.is_annotated:
            asking = (
                "its map of `objectives`"
                if source.config.objectives
                else f"reward.loss.score_weight = {score_weight or 0.0:g}"
            )
            raise DataError(
                f"source {source.name!r} has no usable annotation, but {asking} asks for scores. Its "
                f"annotation columns are {', '.join([*source.columns, PREFERRED])}: map one to an "
                "objective in data.sources[...].objectives, or write `objectives: none` there."
            )


@dataclass(frozen=True, kw_only=True)
class HeldoutRule:
    """Which prompts are held out: one rule for the pairs of all sources and for the prompts of alignment."""

    claimed: Mapping[str, bool]
    """Normalised prompt -> held out, of the sources that stand on one side as a whole."""
    fraction: float
    """Share of the other prompts that is held out."""
    seed: int

    @classmethod
    def of(cls, sources: Sequence[SourceRead], fraction: float, seed: int) -> HeldoutRule:
        """
        Raises:
            DataError: one source claims a prompt for training, another one for evaluation.
        """
        owners: dict[str, dict[str, str]] = {"train": {}, "heldout": {}}
        for source in sources:
            if source.config.side != "both":
                owners[source.config.side].update({normalised_prompt(p.prompt): source.name for p in source.pairs})
        both = owners["train"].keys() & owners["heldout"].keys()
        if both:
            counts = Counter((owners["train"][text], owners["heldout"][text]) for text in both)
            listed = "; ".join(f"{n} of {a!r} and {b!r}" for (a, b), n in sorted(counts.items()))
            raise DataError(
                f"{len(both)} prompts are claimed for training by one source (side: train) and held out by another "
                f"(side: heldout): {listed}. The first is {min(both)!r:.80}. A prompt stands on one side: give the "
                "training source side: both, so that such prompts are held out, or take them out of one file."
            )
        claimed = dict.fromkeys(owners["train"], False) | dict.fromkeys(owners["heldout"], True)
        return cls(claimed=claimed, fraction=fraction, seed=seed)

    def holds_out(self, messages: Sequence[Message]) -> bool:
        text = normalised_prompt(messages)
        drawn = stable_seed("split", self.seed, text) / 2**62 < self.fraction
        return self.claimed.get(text, drawn)

    def split(self, pairs: Sequence[PreferencePair]) -> tuple[list[PreferencePair], list[PreferencePair]]:
        """(training, held-out) pairs; all pairs of one normalised prompt go to one side.

        Raises:
            DataError: one side is empty.
        """
        sides: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
        for pair in pairs:
            sides[self.holds_out(pair.prompt)].append(pair)
        if not sides[0] or not sides[1]:
            raise DataError(
                f"splitting {len(pairs)} pairs by prompt with data.heldout_fraction = {self.fraction} leaves "
                f"{len(sides[0])} for training and {len(sides[1])} held out. Give more data, or another fraction."
            )
        return sides

    def moved(self, sources: Sequence[SourceRead]) -> list[str]:
        """A sentence for each source whose pairs follow the side that another source claims for their prompt."""
        notes = []
        for source in sources:
            if source.config.side == "both":
                count = sum(normalised_prompt(pair.prompt) in self.claimed for pair in source.pairs)
                if count:
                    notes.append(
                        f"source {source.name}: {count:,} pairs share a prompt with a source that is all for training "
                        "or all held out, and stand on its side"
                    )
        return notes
