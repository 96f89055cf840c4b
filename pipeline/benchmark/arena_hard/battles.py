"""Arena-Hard's battles: from the text of a judgment to the games that a win rate counts.

Two editions of Arena-Hard's code are in use and differ in small rules. `Rules` names the edition that applies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Rules = Literal["v0.1", "v2"]

LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")

LABEL_IN_SINGLE_BRACKETS = re.compile(r"\[([AB<>=]+)\]")

_OUTCOMES_V0_1 = {"A>>B": (1.0, 3), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, 3)}

OUTCOMES: Mapping[Rules, Mapping[str, tuple[float, int]]] = {
    "v0.1": _OUTCOMES_V0_1,
    "v2": _OUTCOMES_V0_1 | {"A<<B": (0.0, 3), "A<B": (0.0, 1), "B=A": (0.5, 1), "B<A": (1.0, 1), "B<<A": (1.0, 3)},
}
"""Verdict -> (share of the win that assistant A gets, weight). A clear win counts three times."""


@dataclass(frozen=True, kw_only=True)
class GamePair:
    """Two games of one model against the baseline on one question."""

    question_id: str
    model: str
    baseline: str
    judge: str
    verdicts: tuple[str | None, str | None]
    """Game 1 shows the baseline as assistant A, game 2 shows the model as A. None where the judge gave no label."""


@dataclass(frozen=True, kw_only=True)
class Battle:
    """One decided game."""

    question_id: str
    model_a: str
    model_b: str
    outcome: float
    """1 where model_a won, 0 where model_b won, 0.5 for a tie."""
    weight: int
    """Number of rows with which upstream's battle files repeat the game."""


def parse_verdict(judgment: str, rules: Rules) -> str | None:
    """The label that ends a judgment, or None if there is no valid label.

    v0.1 accepts [[label]], and refuses a judgment with several different labels. Where it finds none, upstream asks the
    judge once more. v2 takes the last [[label]] of the upper-cased text, or else the last [label]; it asks only once.
    """
    if rules == "v0.1":
        labels = set(LABEL.findall(judgment))
        return labels.pop() if len(labels) == 1 else None
    upper_case = judgment.upper()
    labels_in_order = LABEL.findall(upper_case) or LABEL_IN_SINGLE_BRACKETS.findall(upper_case)
    return labels_in_order[-1] if labels_in_order else None


def to_battles(game_pairs: Sequence[GamePair], rules: Rules) -> list[Battle]:
    """Battles with the baseline as model_a. v0.1 drops a failed game alone; v2 drops both games of its question."""
    battles = []
    for pair in game_pairs:
        games = [OUTCOMES[rules].get(verdict or "") for verdict in pair.verdicts]
        if rules == "v2" and None in games:
            continue
        for baseline_is_a, game in zip((True, False), games, strict=True):
            if game is not None:
                share_of_a, weight = game
                battles.append(
                    Battle(
                        question_id=pair.question_id,
                        model_a=pair.baseline,
                        model_b=pair.model,
                        outcome=share_of_a if baseline_is_a else 1.0 - share_of_a,
                        weight=weight,
                    )
                )
    return battles


def count_failures(game_pairs: Sequence[GamePair], rules: Rules) -> dict[str, int]:
    """Model -> number of games without a valid verdict."""
    failures = dict.fromkeys((pair.model for pair in game_pairs), 0)
    for pair in game_pairs:
        failures[pair.model] += sum(verdict not in OUTCOMES[rules] for verdict in pair.verdicts)
    return failures
