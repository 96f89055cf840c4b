"""The comparison of alignment methods: their settings, and the benchmarks of their rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Count, Frozen

Method = Literal[
    "dpo",
    "ipo",
    "kto",
    "simpo",
    "cpo",
    "orpo",
    "wpo",
    "selective_dpo",
    "beta_dpo",
    "online_dpo",
    "raft",
    "ppo",
    "vrm_ppo",
]
"""What the paper's Table 1 compares, and relatives. "ppo" is aligned against a Bradley-Terry head, "vrm_ppo" against a
VRM head."""


class RewardBenchmarkFiles(Frozen):
    """Comparisons on which every method's reward is evaluated."""

    name: str
    """Name of its column in Table 2."""
    files: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files of the benchmark."""
    benchmark: Literal["pairs", "best_of_n", "rewardbench", "rewardbench2", "rm_bench"] = "pairs"
    """How the files are read and scored, as `vrm evaluate --benchmark`."""
    subset_field: str | None = None
    """Field by which accuracy is also told apart; None tells one number."""


class ComparisonConfig(Frozen):
    """What `jobs/compare_methods.py` reads beside the sections that all methods share."""

    settings: Mapping[Method, tuple[str, ...]] = {}
    """Settings of single methods, `key.path=value` as on the command line. Choose them on seeds that no table shows."""
    reward_benchmarks: tuple[RewardBenchmarkFiles, ...] = ()
    """Columns of Table 2, beside the held-out pairs."""
    cells: Literal["process", "pipeline"] = "process"
    """"process": a cell is one process, and many run at a time. "pipeline": a cell is the stages of the pipeline, over
    ranks and engines as `cluster` says, one cell after the other; for models that do not fit in one process."""
    kl_samples: Count = 256
    """Responses, sampled at temperature 1, by which the KL of a policy to its start is estimated."""
