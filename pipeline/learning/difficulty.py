"""How hard each pair is, by models that did not see its prompt (Selective DPO)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.config.direct_alignment import DirectConfig
from pipeline.data.preferences import normalised_prompt
from pipeline.errors import DataError
from pipeline.learning.direct_data import DirectExamples
from pipeline.objectives.direct_alignment import dpo_loss
from pipeline.records import Metrics
from pipeline.stages import storage

DIFFICULTY_FILE = "difficulty.parquet"
NUM_HALVES = 2


def fold_config(direct: DirectConfig) -> DirectConfig:
    """Plain DPO on half of the prompts, as `difficulty` asks for it."""
    difficulty = direct.difficulty
    return DirectConfig(
        beta=difficulty.beta,
        epochs=difficulty.epochs,
        optimiser=difficulty.optimiser,
        lora=difficulty.lora,
        reference_checkpoint=direct.reference_checkpoint,
        batch_pairs=direct.batch_pairs,
        max_length=direct.max_length,
        max_eval_pairs=direct.max_eval_pairs,
        checkpoint_every=direct.checkpoint_every,
    )


def split_into_halves(examples: DirectExamples, *, seed: int) -> tuple[list[int], list[int]]:
    """The rows of either half of the prompts; all pairs of one normalised prompt are in one half.

    Raises:
        DataError: there are fewer prompts than halves.
    """
    texts = [normalised_prompt(prompt) for prompt in examples.prompts]
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < NUM_HALVES:
        raise DataError(
            f"{len(examples)} pairs have {len(distinct)} prompt, and a pair's difficulty is measured by a model that "
            f"did not see its prompt: {NUM_HALVES} prompts are the least. Give more prompts, or set "
            "alignment.direct.order=shuffled and keep_easiest=1."
        )
    order = np.random.default_rng([seed, NUM_HALVES]).permutation(len(distinct))
    first = {distinct[i] for i in order[: len(distinct) // 2]}
    halves: tuple[list[int], list[int]] = ([], [])
    for row, text in enumerate(texts):
        halves[text not in first].append(row)
    return halves


def pair_losses(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, *, beta: float) -> list[float]:
    """The DPO loss of each pair, nats; both [N, 2] of chosen and rejected."""
    chosen, rejected = (logprobs.double() - reference_logprobs.double()).unbind(1)
    return dpo_loss(chosen - rejected, beta=beta).tolist()


def write_losses(uri: str, ids: Sequence[str], losses: Sequence[float]) -> None:
    """The losses of one model on the pairs that it did not see."""
    _write(uri, {"id": list(ids), "loss": list(losses)})


def read_losses(uri: str) -> dict[str, float]:
    """Pair id -> loss, as `write_losses` wrote them."""
    with storage.reading(uri) as directory:
        table = pq.read_table(os.path.join(directory, DIFFICULTY_FILE))
    return dict(zip(table["id"].to_pylist(), table["loss"].to_pylist(), strict=True))


def mean_losses(examples: DirectExamples, losses: Sequence[Mapping[str, float]]) -> list[float]:
    """The difficulty of each pair: the mean of its losses, one for each split into halves."""
    return [sum(split[identity] for split in losses) / len(losses) for identity in examples.ids]


def about_difficulty(examples: DirectExamples, losses: Sequence[Mapping[str, float]], kept: Sequence[int]) -> Metrics:
    """`difficulty/*`: whether the difficulties say more than the lengths of the responses.

    Returns:
        `length_correlation`: of the difficulty with the tokens of the chosen minus those of the rejected response,
        0 where one of the two does not vary. `kept_chosen_shorter`: the share of the kept pairs whose chosen response
        is the shorter one.
    """
    lengths = np.array([[len(ids) for ids in group.response_ids] for group in examples.groups], dtype=float)
    extra = lengths[:, 0] - lengths[:, 1]
    difficulty = np.array(mean_losses(examples, losses))
    varies = extra.std() > 0 and difficulty.std() > 0
    return {
        "difficulty/length_correlation": float(np.corrcoef(extra, difficulty)[0, 1]) if varies else 0.0,
        "difficulty/kept_chosen_shorter": float((extra[list(kept)] < 0).mean()),
    }


def easiest_first(
    examples: DirectExamples, losses: Sequence[Mapping[str, float]], *, keep: float, uri: str
) -> list[int]:
    """The rows of the easiest share of the pairs, from easy to hard; writes a table of all pairs to `uri`.

    The table is in the order of difficulty: id, prompt, difficulty, one loss a split, and whether the pair is kept.

    Args:
        losses: for each split, the losses of all pairs.
        keep: share of the pairs to keep, at least one.
    """
    by_pair = [[split[identity] for split in losses] for identity in examples.ids]
    difficulty = mean_losses(examples, losses)
    order = sorted(range(len(examples)), key=lambda row: (difficulty[row], row))
    num_kept = max(1, round(keep * len(examples)))
    columns: dict[str, list] = {
        "id": [examples.ids[row] for row in order],
        "prompt": [examples.prompts[row][-1]["content"] for row in order],
        "difficulty": [difficulty[row] for row in order],
        "losses": [by_pair[row] for row in order],
        "kept": [place < num_kept for place in range(len(order))],
    }
    _write(uri, columns)
    return order[:num_kept]


def _write(uri: str, columns: dict[str, list]) -> None:
    with storage.writing(uri) as directory:
        pq.write_table(pa.table(columns), os.path.join(directory, DIFFICULTY_FILE))
