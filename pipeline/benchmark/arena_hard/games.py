"""Arena-Hard's judgment files and battle files, in the layouts of both editions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.benchmark.arena_hard.answers import question_id_of
from pipeline.benchmark.arena_hard.battles import Battle, GamePair, Rules, count_failures, to_battles
from pipeline.data.files import Row, content_fingerprint, read_rows
from pipeline.errors import DataError

ARENA_HARD_BASELINE = "gpt-4-0314"
"""The baseline of v0.1, whose judgment files do not name it."""

WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


@dataclass(frozen=True, kw_only=True)
class Games:
    """All games of several judgment files."""

    battles: list[Battle]
    judges: tuple[str, ...]
    """Empty where all files are battle files, which name no judge."""
    failures: dict[str, int]
    """Model -> number of games without a verdict."""


def read_games(files: Sequence[str], *, baseline: str) -> Games:
    """Reads judgment files of either edition, and upstream's battle files.

    The layout of a judgment decides which edition's rules apply. A battle file holds {question_id, model_a, model_b,
    winner}, and repeats a clear win three times.

    Raises:
        DataError: a judgment was made against another baseline or occurs twice, also where a file is named twice; or
            two battle files are equal. Names file, line and field.
    """
    battles: list[Battle] = []
    judges: set[str] = set()
    failures: Counter[str] = Counter()
    places: dict[tuple[str, str], str] = {}
    battle_files: dict[int, str] = {}
    for n, row in ((n, row) for n, file in enumerate(files) for row in read_rows(file)):
        if "winner" in row.values:
            battle_files[n] = files[n]
            battles.append(_battle(row))
            continue
        rules: Rules = "v2" if "uid" in row.values else "v0.1"
        pair = _game_pair(row, baseline)
        judged = (pair.model, pair.question_id)
        if judged in places:
            raise DataError(
                f"{row.place}: {pair.model!r} is judged on question {pair.question_id} again, as in {places[judged]}. "
                "Keep one, and name each file once: judgments of two judges are two tables."
            )
        places[judged] = row.place
        battles += to_battles([pair], rules)
        judges.add(pair.judge)
        failures.update(count_failures([pair], rules))
    _require_distinct(list(battle_files.values()))
    return Games(battles=battles, judges=tuple(sorted(judges)), failures=dict(failures))


def _require_distinct(battle_files: Sequence[str]) -> None:
    """Battle files repeat rows on purpose, so a battle that counts twice shows only where two whole files are equal."""
    first: dict[str, str] = {}
    for file in battle_files:
        content = content_fingerprint(file)
        if content in first:
            raise DataError(f"{file} holds the same battles as {first[content]}. Name each file of battles once.")
        first[content] = file


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


def _game_pair(row: Row, baseline: str) -> GamePair:
    judged_against = row.values.get("baseline", baseline)  # v0.1 does not name the baseline
    if judged_against != baseline:
        raise DataError(f"{row.place}: judged against {judged_against!r}, not {baseline!r}. Give that baseline.")
    games = row.require("games", list)
    verdicts = [game.get("score") if isinstance(game, Mapping) else None for game in games]
    if len(games) != 2 or not all(verdict is None or isinstance(verdict, str) for verdict in verdicts):
        raise DataError(f"{row.place}, field 'games': {games!r:.60} are not two games with a score like 'A>B'")
    return GamePair(
        question_id=question_id_of(row),
        model=row.require("model", str),
        baseline=baseline,
        judge=row.require("judge", str),
        verdicts=(verdicts[0], verdicts[1]),
    )
