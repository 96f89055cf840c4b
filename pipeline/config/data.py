"""Where preference pairs, texts and prompts come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Count, Frozen, NonNegative, Positive


class PlantedConfig(Frozen):
    """Sizes and noise of the planted world (`pipeline/data/planted.py`), a test world with known truth."""

    num_train_pairs: Count = 4096
    num_heldout_pairs: Count = 512
    num_sft_texts: Count = 4096
    num_train_prompts: Count = 1024
    num_heldout_prompts: Count = 128
    label_temperature: Positive = 0.1
    """Bradley-Terry temperature of the labels: P(chosen is better) = sigmoid(gold gap / temperature)."""
    rating_noise: NonNegative = 0.3
    """Standard deviation of the Gaussian noise added to the annotated objective scores (1-5 scale)."""


class DataConfig(Frozen):
    """Where pairs and prompts come from. `source: planted` needs no files."""

    source: Literal["planted", "files", "hub"] = "planted"
    planted: PlantedConfig = PlantedConfig()
    preferences: tuple[str, ...] = ()
    """Files (JSONL or Parquet), or hub dataset names when `source` is "hub"."""
    preferences_format: Literal["pairs", "helpsteer2", "ultrafeedback", "hh_rlhf", "webgpt", "pku_saferlhf"] = "pairs"
    """"pairs" is the project's own schema (docs/method.md section 8)."""
    prompts: tuple[str, ...] = ()
    """Files of prompts for alignment and benchmarks: JSONL or Parquet with a column `prompt`,
    `messages` or `instruction`; columns `input`, `system` and `history` beside it are part of the prompt."""
    evaluation_prompts: tuple[str, ...] = ()
    """Prompt files that results will be reported on, besides `benchmark.prompts`. Training leaves out prompts that
    stand in one of them word for word. It reports their number, and the number of looser matches."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.03
    """Share of the prompts kept for evaluation; the split is by prompt, never by row."""
    max_pairs: Count | None = None
    """Use at most this many pairs, chosen by seed; None uses all."""
    max_left_out: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the comparisons that may be left out because a response is empty, both are the same, they answer
    different conversations, or one stands alone. With more, the data is refused. Ties are left out and not counted
    here."""
    max_too_long: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the pairs, the texts or the prompts that may be left out because they exceed the token limit of their
    stage. With more, the data is refused: what is left would be another data set."""
    label_flips: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the training pairs whose chosen and rejected response change places, to measure what wrong labels
    cost. The seed alone decides which pairs. A larger share contains the pairs of a smaller one."""
