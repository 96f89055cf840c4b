"""What a reward model says of several responses, as a table."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from pipeline.evaluation.reasons import named_contributions
from pipeline.serving.protocol import ExplainedReward

if TYPE_CHECKING:
    import pandas as pd

SHOWN_CHARS = 48
NO_REASONS = "No objective of this model is verified on held-out annotations, so the table shows no reasons."


@dataclass(frozen=True, kw_only=True)
class ScoreTable(Sequence[ExplainedReward]):
    """N responses and their rewards. A row is what the scoring service answers for the response.

    `print` shows rewards with their standard deviations, both in units of the reward. It shows a contribution only of
    an objective whose scores order held-out pairs as their annotators do. `rows` and `to_pandas` hold everything.
    """

    prompts: tuple[str, ...]
    """[N] the last turn of each prompt."""
    responses: tuple[str, ...]
    """[N]"""
    scores: tuple[ExplainedReward, ...]
    """[N] in the order of the responses."""
    verified_objectives: tuple[str, ...]
    """The objectives whose contributions are reasons."""

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, index: int) -> ExplainedReward: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ExplainedReward]: ...

    def __getitem__(self, index: int | slice) -> ExplainedReward | Sequence[ExplainedReward]:
        return self.scores[index]

    def __iter__(self) -> Iterator[ExplainedReward]:
        return iter(self.scores)

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict a response: prompt, response, `reward`, `reward_std`, and for each objective its `weight/`,
        `score/`, `rating/` (the score on the annotators' own scale, where there were annotations) and `contribution/`.
        Contributions to the reward are measured from the mean held-out response."""
        return [
            {"prompt": prompt, "response": response, "reward": score.reward, "reward_std": score.reward_std}
            | {f"weight/{name}": value for name, value in score.objective_weights.items()}
            | {f"score/{name}": value for name, value in score.objective_scores.items()}
            | {f"rating/{name}": value for name, value in score.ratings.items()}
            | {f"contribution/{name}": value for name, value in score.contributions.items()}
            for prompt, response, score in zip(self.prompts, self.responses, self.scores, strict=True)
        ]

    def to_pandas(self) -> pd.DataFrame:
        """`rows` as a data frame of N rows."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def __str__(self) -> str:
        header, *cells = self._cells()
        widths = [max(len(row[column]) for row in (header, *cells)) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *cells)
        ]
        return "\n".join([*lines, *self._remarks()])

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        header, *cells = [[html.escape(cell) for cell in row] for row in self._cells()]
        head = "".join(f"<th>{cell}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{remarks}"

    def _cells(self) -> list[list[str]]:
        """The header, then a row for each response: reward, standard deviation, the contributions that are reasons."""
        rows = []
        names: list[str] = []
        for response, score in zip(self.responses, self.scores, strict=True):
            reasons = named_contributions(
                tuple(score.contributions.values()), tuple(score.contributions), self.verified_objectives
            )
            names = [name for name, _ in reasons]
            parts = [f"{value:+.2f}" for _, value in reasons]
            rows.append([_shortened(response), f"{score.reward:.2f}", f"{score.reward_std:.2f}", *parts])
        return [["response", "reward", "sd", *names], *rows]

    def _remarks(self) -> list[str]:
        return [] if self.verified_objectives else [NO_REASONS]


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[: SHOWN_CHARS - 1]}…"
