"""A text about the data of a recipe, as its models will see it: sources, scores, lengths, overlap, and rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.chat import encode_prompt
from pipeline.data.collate import PairCollator, TokenisedPair, tokenise_pairs
from pipeline.data.preferences import normalised_prompt, take_pairs
from pipeline.data.score_statistics import MixtureStatistics, constant_scores
from pipeline.records import PreferencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.config.recipe import ExperimentConfig
    from pipeline.data.run_data import RunData

MEASURED = 2000
"""Lengths are measured on at most this many pairs of a source, and prompts: a preview takes seconds."""

QUANTILES = (0.05, 0.5, 0.95, 1.0)

UNLIMITED = 2**31


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The data of a recipe, and the tokenizers that its models read it with."""

    experiment: ExperimentConfig
    data: RunData
    reward_tokenizer: PreTrainedTokenizerBase
    policy_tokenizer: PreTrainedTokenizerBase
    rows: int
    """Training pairs of every source that are shown whole."""

    def text(self) -> str:
        """All parts, with a heading each; without pairs only those of the prompts."""
        if not self._names:
            parts = self._of_prompts()
        else:
            length = self.experiment.reward.max_length
            parts = {
                "Sources": self._sources(),
                "Scores of the training pairs, on the scale of their source": self._scores(),
                f"Tokens of a pair: prompt and longer response; reward.max_length = {length}": self._lengths(),
                **self._of_prompts(),
                "Prompts in two sources": self._shared_prompts(),
                "Rows as the reward model sees them": self._rows(),
            }
        return "\n\n".join(f"{heading}\n{'-' * len(heading)}\n{part}" for heading, part in parts.items())

    # ------------------------------------------------------------------ parts

    def _of_prompts(self) -> dict[str, str]:
        return {
            "Prompts for alignment": self._prompts(),
            "Training prompts in the evaluation files": self._contamination(),
        }

    def _sources(self) -> str:
        train, heldout = (Counter(pair.source for pair in side) for side in self._sides)
        table = [("source", "training pairs", "held-out pairs")]
        table += [(name, f"{train[name]:,}", f"{heldout[name]:,}") for name in self._names]
        return "\n".join([_table(table), "", *self.data.source_notes]).rstrip()

    def _scores(self) -> str:
        if not any(any(source.count) for source in self._statistics.sources.values()):
            return "none of the pairs has scores: they train the likelihood alone"
        shown = self._statistics.scale_sources
        constant = constant_scores(self.data.train_pairs)
        table = [("source", "objective", "responses", "mean", "sd", "")]
        for name, source in self._statistics.sources.items():
            for k, objective in enumerate(source.objectives):
                if source.count[k]:
                    scale = "the scale that is shown to people" if shown[k] == name and len(self._names) > 1 else ""
                    std = 0.0 if (name, objective) in constant else source.std[k]
                    numbers = f"{source.count[k]:,}", f"{source.mean[k]:.3g}", f"{std:.3g}"
                    table.append((name, objective, *numbers, scale))
        return _table(table)

    def _lengths(self) -> str:
        limit = self.experiment.reward.max_length
        table: list[tuple[str, ...]] = [("source", "5%", "median", "95%", "longest", "do not fit", "chosen is longer")]
        for name in self._names:
            measured = [
                (len(p.tokens.prompt_ids) + max(map(len, p.tokens.response_ids)), *map(len, p.tokens.response_ids))
                for p in self._tokenised(take_pairs(self._of(name), MEASURED, 0, salt="preview"))
            ]
            lengths, chosen, rejected = (np.array(column) for column in zip(*measured, strict=True))
            share = f"{(lengths > limit).mean():.1%}", f"{(chosen > rejected).mean():.1%}"
            table.append((name, *_quantiles(lengths), *share))
        return f"{_table(table)}\nTraining leaves out pairs that do not fit; an evaluation cuts their prompts."

    def _prompts(self) -> str:
        limit = self.experiment.alignment.max_prompt_tokens
        table: list[tuple[str, ...]] = [
            ("", "prompts", "5%", "median", "95%", "longest", f"above max_prompt_tokens = {limit}")
        ]
        for name, prompts in (("training", self.data.train_prompts), ("held out", self.data.heldout_prompts)):
            # Evenly spaced: prompts come in the order of their files.
            some = [prompts[i] for i in np.unique(np.linspace(0, len(prompts) - 1, MEASURED).astype(int))]
            lengths = np.array([len(encode_prompt(self.policy_tokenizer, messages)) for _, messages in some])
            table.append((name, f"{len(prompts):,}", *_quantiles(lengths), f"{(lengths > limit).mean():.1%}"))
        return _table(table)

    def _shared_prompts(self) -> str:
        prompts = {name: {normalised_prompt(pair.prompt) for pair in self._of(name)} for name in self._names}
        lines = [
            f"{a} and {b}: {len(prompts[a] & prompts[b]):,} of {len(prompts[a]):,} and {len(prompts[b]):,}"
            for a, b in combinations(prompts, 2)
            if prompts[a] & prompts[b]
        ]
        return "\n".join(lines or ["none"])

    def _contamination(self) -> str:
        found = self.data.contamination
        if found is None:
            return "the recipe names no evaluation files (data.evaluation_prompts, benchmark.prompts)"
        table = [("", "prompts", "the same", "13 words in a row")]
        table += [(f"file {f.file}", f"{f.prompts:,}", f"{f.exact:,}", f"{f.overlapping:,}") for f in found.files]
        table += [
            (f"source {name}", f"{source.prompts:,}", f"{source.exact:,}", f"{source.overlapping:,}")
            for name, source in found.sources.items()
        ]
        return f"{_table(table)}\nTraining leaves out the same ones, and keeps the others."

    def _rows(self) -> str:
        loss = self.experiment.reward.loss
        collate = PairCollator(
            statistics=self._statistics,
            temperature=loss.supervision_temperature,
            seed=self.experiment.seed,
            target_from=loss.target_from,
        )
        shown = []
        for name in self._names:
            training = [pair for pair in self.data.train_pairs if pair.source == name]
            for row in self._tokenised(training[: self.rows]):
                target = collate([row], 0).target[0].tolist()
                shown.append(self._row(row, dict(zip(self.experiment.objectives, target, strict=True))))
        return "\n\n".join(shown)

    def _row(self, row: TokenisedPair, target: Mapping[str, float]) -> str:
        pair = row.pair
        texts = [
            str(self.reward_tokenizer.decode(list(ids))) for ids in (row.tokens.prompt_ids, *row.tokens.response_ids)
        ]
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in target.items() if weight)
        margin = "unknown" if pair.margin is None else f"{pair.margin:g}"
        return "\n".join(
            [
                f"=== {pair.source}, {pair.id}",
                texts[0].rstrip("\n"),
                f"--- chosen ({_score_words(pair.scores_chosen)})",
                texts[1],
                f"--- rejected ({_score_words(pair.scores_rejected)})",
                texts[2],
                f"--- target weights: {weights or 'none'}; margin: {margin}",
            ]
        )

    # ------------------------------------------------------------------ pairs

    @property
    def _sides(self) -> tuple[Sequence[PreferencePair], Sequence[PreferencePair]]:
        return self.data.train_pairs, self.data.heldout_pairs

    @property
    def _names(self) -> list[str]:
        return list(dict.fromkeys(pair.source for side in self._sides for pair in side))

    @cached_property
    def _statistics(self) -> MixtureStatistics:
        return MixtureStatistics.of(self.data.train_pairs, self.experiment.objectives, heldout=self.data.heldout_pairs)

    def _of(self, name: str) -> list[PreferencePair]:
        return [pair for side in self._sides for pair in side if pair.source == name]

    def _tokenised(self, pairs: Sequence[PreferencePair]) -> list[TokenisedPair]:
        if not pairs:
            return []
        return tokenise_pairs(pairs, self.reward_tokenizer, max_length=UNLIMITED, drop_too_long=True)


def _score_words(scores: Mapping[str, float] | None) -> str:
    return ", ".join(f"{name} {score:g}" for name, score in (scores or {}).items()) or "no scores"


def _quantiles(lengths: np.ndarray) -> tuple[str, ...]:
    return tuple(f"{value:,.0f}" for value in np.quantile(lengths, QUANTILES))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their cells; numbers stand on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [
        all(not row[c] or row[c][0].isdigit() or row[c][0] == "-" for row in rows[1:]) for c in range(len(widths))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    )
