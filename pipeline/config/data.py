"""Where preference pairs, texts and prompts come from."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Frozen, NonNegative, Positive


class PlantedConfig(Frozen):
    """Sizes and noise of the planted world (`pipeline/data/planted.py`), a test world with known truth."""

    num_train_pairs: Count = 4096
    """Pairs that the reward model trains on."""
    num_heldout_pairs: Count = 512
    """Pairs that are held out, without label noise."""
    num_sft_texts: Count = 4096
    """Demonstrations for fine-tuning."""
    num_train_prompts: Count = 1024
    """Prompts that alignment samples responses to."""
    num_heldout_prompts: Count = 128
    """Prompts on which the finished policy answers."""
    label_temperature: Positive = 0.1
    """Bradley-Terry temperature of the labels: P(chosen is better) = sigmoid(gold gap / temperature)."""
    rating_noise: NonNegative = 0.3
    """Standard deviation of the Gaussian noise added to the annotated objective scores (1-5 scale)."""


class SourceConfig(Frozen):
    """One source of preference pairs. A recipe with several of them trains on their mixture."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """What metrics and messages call the source. Where it is not given: the name of the file or of the data set."""
    path: str | None = None
    """A file (JSONL, JSON or Parquet), or a directory of such files."""
    hub: str | None = None
    """Instead of `path`: the name of a data set of the Hugging Face hub."""
    hub_split: str = "train"
    """Split of the hub data set."""
    format: Literal["pairs", "helpsteer2", "ultrafeedback", "hh_rlhf", "webgpt", "pku_saferlhf"] = "pairs"
    """"pairs" is the project's own schema (docs/method.md section 8)."""
    where: dict[str, str | bool | int] = Field(default_factory=dict)
    """Only rows whose columns have these values, as in {subset: harmless}."""
    objectives: dict[str, str] | None = None
    """Annotation column -> objective of the recipe. Not given: columns that are named as an objective. "none": the
    pairs have no scores and train the likelihood alone. The column `preferred` is 1 for the chosen and 0 for the
    rejected response: for annotators who were asked for one objective alone, as for harm."""
    weight: Positive | None = None
    """Share of the pairs of the mixture. Sources without a weight give all their pairs, or `cap` of them."""
    cap: Count | None = None
    """Use at most this many pairs, chosen by seed."""
    mismatched_pairs: Annotated[float, Field(ge=0, le=1)] = 0.0
    """For this share of its training pairs the reward model gets one more: the chosen response against one that was
    chosen for another prompt, of any source. Without such pairs a reward need not read the prompt, and an answer that
    fits no prompt, such as an apology, can win everywhere (RRM, Liu et al. 2024, arXiv:2409.13156). Leave it at 0 where
    one answer is right for many prompts, as a refusal is for harmful ones."""
    side: Literal["both", "train", "heldout"] = "both"
    """"both" splits the pairs by prompt; "train" and "heldout" put all of them on one side."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_place(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "name" in values:
            return values
        place = values.get("path") or values.get("hub")
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", PurePath(str(place)).stem).lstrip("_.-") if place else ""
        return values | {"name": name} if name else values

    @field_validator("objectives", mode="before")
    @classmethod
    def _no_objectives(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "none":
            raise ValueError(f"{value!r} is no map; write {{column: objective}}, or none for pairs without scores")
        return {} if value == "none" else value

    @model_validator(mode="after")
    def _one_place_and_one_size(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            given = "both" if self.path else "none of them"
            raise ValueError(f"source {self.name!r} needs either `path` or `hub`, and has {given}")
        if self.weight is not None and self.cap is not None:
            raise ValueError(
                f"source {self.name!r} has weight = {self.weight} and cap = {self.cap}, and both say how many of its "
                "pairs are used; keep one"
            )
        if self.weight is not None and self.side == "heldout":
            raise ValueError(
                f"source {self.name!r} has weight = {self.weight}, but side = 'heldout' keeps it out of the mixture "
                "that is trained on; use `cap`"
            )
        twice = sorted(name for name, count in Counter((self.objectives or {}).values()).items() if count > 1)
        if twice:
            raise ValueError(f"source {self.name!r} maps two columns to the objective {twice[0]!r}; keep one")
        return self


class DataConfig(Frozen):
    """Where pairs and prompts come from. With neither it is the planted world, which needs no files."""

    sources: tuple[SourceConfig, ...] = ()
    """The sources of preference pairs. With `prompts` alone there are no pairs, and nothing trains on any."""
    planted: PlantedConfig = PlantedConfig()
    prompts: tuple[str, ...] = ()
    """Files of prompts for alignment and benchmarks: JSONL or Parquet with a column `messages`, `prompt`, `instruction`
    or `question`. Columns `input`, `system` and `history` beside it are part of the prompt; rewards read the others."""
    evaluation_prompts: tuple[str, ...] = ()
    """Prompt files that results will be reported on, besides `benchmark.prompts`. Training leaves out prompts that
    stand in one of them word for word. It reports their number, and the number of looser matches."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Share of the prompts kept for evaluation; the split is by prompt, never by row."""
    max_pairs: Count | None = None
    """Use at most this many pairs of all sources together, chosen by seed; None uses all."""
    max_left_out: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of a source's comparisons that may be left out because a response is empty, both are the same, they answer
    different conversations, or one stands alone. With more, the data is refused. Ties are left out and not counted
    here."""
    max_too_long: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the pairs, the texts or the prompts that may be left out because they exceed the token limit of their
    stage. With more, the data is refused: what is left would be another data set."""
    label_flips: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training pairs whose chosen and rejected response change places, to measure what wrong labels
    cost. The seed alone decides which pairs. A larger share contains the pairs of a smaller one."""

    @property
    def is_planted(self) -> bool:
        """The pairs come from the planted world."""
        return not (self.sources or self.prompts)

    @property
    def has_pairs(self) -> bool:
        return self.is_planted or bool(self.sources)

    @model_validator(mode="after")
    def _every_source_has_its_own_name(self) -> DataConfig:
        places: dict[str, int] = {}
        for i, source in enumerate(self.sources):
            if source.name in places:
                raise ValueError(
                    f"sources[{places[source.name]}] and sources[{i}] are both named {source.name!r}, and metrics go "
                    "by name; give one of them another `name`"
                )
            places[source.name] = i
        return self

    @model_validator(mode="after")
    def _weights_leave_room(self) -> DataConfig:
        """For the sources without a weight."""
        trained = [source for source in self.sources if source.side != "heldout"]
        total = sum(source.weight or 0.0 for source in trained)
        without = [source.name for source in trained if source.weight is None]
        if without and total >= 1:
            raise ValueError(
                f"the weights of sources add up to {total:g} of the mixture, which leaves nothing for "
                f"{', '.join(without)}; give every source a weight, or let the weights add up to less than 1"
            )
        return self
