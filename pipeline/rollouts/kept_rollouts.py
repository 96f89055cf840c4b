"""The rollouts of a training, kept: one Parquet file a step in the directory of the stage."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow
from pyarrow import parquet

from pipeline.columns import Rollouts
from pipeline.data.batching import stable_seed
from pipeline.records import ExperienceSummary, Metrics, ResponseEvaluations, RewardScore, ScoredRollouts
from pipeline.rollouts.kept_samples import conversation_text
from pipeline.stages import storage

ROLLOUTS = "rollouts"
"""The directory below that of the stage."""

SCHEMA = pyarrow.schema(
    {
        "step": pyarrow.int32(),
        "position": pyarrow.int32(),  # among the rollouts of the step
        "prompt_id": pyarrow.string(),
        "sample": pyarrow.int32(),
        "prompt": pyarrow.string(),  # in words, to read and to search
        "messages": pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})),
        "response": pyarrow.string(),
        "reward": pyarrow.float64(),  # null where a source gave no score and its rule drops the row
        "reward_std": pyarrow.float64(),
        "rewards": pyarrow.map_(pyarrow.string(), pyarrow.float64()),  # by source
        "contributions": pyarrow.map_(pyarrow.string(), pyarrow.float64()),  # by objective; they add up to the reward
        "advantage": pyarrow.float64(),  # mean over the tokens; null where the recipe leaves the response out
        "kl": pyarrow.float64(),  # sum over the tokens of log pi - log pi_ref, nats
        "logprob_gap": pyarrow.float64(),  # largest |engine - learner| over the tokens, nats
        "tokens": pyarrow.int32(),  # of the response
        "repetition": pyarrow.float64(),  # share of the response's 4-grams that occurred in it before
        "finish_reason": pyarrow.string(),
        "policy_version": pyarrow.int32(),  # of the first token
        "seed": pyarrow.int64(),  # of the request
    }
)
"""What is kept of a rollout, in the order of the columns."""

WITH_TOKEN_IDS = SCHEMA.append(pyarrow.field("prompt_ids", pyarrow.list_(pyarrow.int32()))).append(
    pyarrow.field("response_ids", pyarrow.list_(pyarrow.int32()))
)
"""The same, with the tokens."""


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The rollouts of one step, with all that was said of them before the update."""

    step: int
    seeds: Sequence[int]
    rollouts: Rollouts
    scored: ScoredRollouts
    evaluations: ResponseEvaluations
    experience: ExperienceSummary


class RolloutFiles:
    """Writes the rollouts of each step, up to a size. A step that a resumed run repeats replaces its file."""

    def __init__(
        self,
        stage_uri: str,
        *,
        keep: Literal["all", "none"] | float,
        token_ids: bool,
        max_mib: float,
        objectives: Sequence[str],
        seed: int,
    ) -> None:
        """
        Args:
            keep: which prompts are kept; a number is their share.
            objectives: names of the K objective scores.
            seed: chooses the prompts.
        """
        self.uri = storage.join(stage_uri, ROLLOUTS)
        self._share: float = {"all": 1.0, "none": 0.0}[keep] if isinstance(keep, str) else keep
        self._token_ids = token_ids
        self._max_bytes = int(max_mib * 2**20)
        self._objectives = tuple(objectives)
        self._seed = seed
        self._bytes = 0
        self.is_full = False

    def resume(self, first_step: int) -> None:
        """Deletes the files of steps that come again, and counts the others."""
        for name in storage.file_sizes(self.uri):
            if name >= step_file(first_step):
                storage.delete_file(storage.join(self.uri, name))
        self._bytes = sum(storage.file_sizes(self.uri).values())

    def keep(self, batch: RolloutBatch) -> Metrics:
        """Writes the file of a step, unless it would exceed the size that is left.

        Returns:
            `rollout/kept` and `rollout/left_out`, responses of this step, and `rollout/kept_mib`, of all files so far.

        Raises:
            WorkspaceError: no space is left on the disk.
        """
        places = [i for i, prompt in enumerate(batch.rollouts.prompts) if self._is_chosen(prompt.id)]
        num_kept = 0
        if places and not self.is_full:
            content = self._serialised(batch, places)
            self.is_full = self._bytes + len(content) > self._max_bytes
            if not self.is_full:
                self._write(step_file(batch.step), content)
                num_kept = len(places)
        return {
            "rollout/kept": float(num_kept),
            "rollout/left_out": float(len(batch.rollouts) - num_kept),
            "rollout/kept_mib": self._bytes / 2**20,
        }

    def _is_chosen(self, prompt_id: str) -> bool:
        return stable_seed("kept rollouts", self._seed, prompt_id) / 2**62 < self._share

    def _serialised(self, batch: RolloutBatch, places: Sequence[int]) -> bytes:
        advantages = dict(zip(batch.experience.rows, batch.experience.mean_advantages.tolist(), strict=True))
        rows = [self._row(batch, place, advantage=advantages.get(place)) for place in places]
        table = pyarrow.Table.from_pylist(rows, schema=WITH_TOKEN_IDS if self._token_ids else SCHEMA)
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()

    def _row(self, batch: RolloutBatch, place: int, *, advantage: float | None) -> dict[str, Any]:
        rollouts, score, evaluations = batch.rollouts, batch.scored.scores[place], batch.evaluations
        prompt = rollouts.prompts[place]
        row = {
            "step": batch.step,
            "position": place,
            "prompt_id": prompt.id,
            "sample": rollouts.sample_indices[place],
            "prompt": conversation_text(prompt.messages),
            "messages": [dict(message) for message in prompt.messages],
            "response": rollouts.response_texts[place],
            "reward": None if score is None else score.mean,
            "reward_std": None if score is None else score.std,
            "rewards": rewards_by_source(batch.scored, place),
            "contributions": {} if score is None else contributions(score, self._objectives),
            "advantage": advantage,
            "kl": float(evaluations.log_ratios[place]),
            "logprob_gap": float(evaluations.engine_gaps[place]),
            "tokens": len(rollouts.response_ids[place]),
            "repetition": rollouts.repetition[place],
            "finish_reason": rollouts.finish_reasons[place],
            "policy_version": rollouts.policy_versions[place],
            "seed": batch.seeds[place],
        }
        if self._token_ids:
            row |= {"prompt_ids": prompt.token_ids, "response_ids": rollouts.response_ids[place].numpy()}
        return row

    def _write(self, name: str, content: bytes) -> None:
        with storage.writing(self.uri) as directory:
            partial = os.path.join(directory, f"{name}.partial")
            with open(partial, "wb") as stream:
                stream.write(content)
            os.replace(partial, os.path.join(directory, name))
        self._bytes += len(content)


def what_was_kept(rows: Sequence[Mapping[str, Any]]) -> str:
    """In words, from the metrics of a training: how many rollouts were kept, and in how many MiB; empty without any.

    Args:
        rows: of metrics.jsonl; the last step may have two.
    """
    by_step = {row["step"]: row for row in rows if "rollout/kept" in row}
    if not by_step:
        return ""
    kept, left_out = (sum(row[f"rollout/{name}"] for row in by_step.values()) for name in ("kept", "left_out"))
    mib = by_step[max(by_step)]["rollout/kept_mib"]
    return f"{kept:,.0f} of {kept + left_out:,.0f} in {mib:.1f} MiB"


def step_file(step: int) -> str:
    """The name of a step's file; files sort by step."""
    return f"step-{step:06d}.parquet"


def rewards_by_source(scored: ScoredRollouts, place: int) -> dict[str, float]:
    """Source of the reward -> what it gave to one rollout; a source without a score is left out."""
    given = {name: scores[place] for name, scores in scored.by_source.items()}
    return {name: score.mean for name, score in given.items() if score is not None}


def contributions(score: RewardScore, objectives: Sequence[str]) -> dict[str, float]:
    """Objective -> weight times score; empty where the reward is no sum over objectives."""
    if not score.objective_scores:
        return {}
    products = [w * s for w, s in zip(score.objective_weights, score.objective_scores, strict=True)]
    return dict(zip(objectives, products, strict=True))
