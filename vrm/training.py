"""A reward model trained in this process, without Ray: for a notebook, or a first look at own pairs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.preflight import check_recipe
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.data.files import read_rows
from pipeline.data.run_data import load_data
from pipeline.errors import ConfigError, DataError
from pipeline.learning.builders import build_reward_trainer, engine_in_process
from pipeline.loops.reward import reward_stage, run_reward_training
from pipeline.models.native_dtype import with_native_dtype
from pipeline.stages.runner import StageRunner, installed_versions
from pipeline.stages.workspace import Workspace
from pipeline.tracking.stage_loggers import StageLogging, group_name
from vrm.reward_model import TrainedRewardModel, load_reward_model

Pairs = str | Path | Iterable[Mapping[str, Any]]


def train_reward_model(
    pairs: Pairs,
    directory: str | Path,
    *,
    backbone: str | None = None,
    objectives: Sequence[str] | None = None,
    recipe: str = "smollm2_cpu",
    overrides: Sequence[str] = (),
    device: str | None = None,
) -> TrainedRewardModel:
    """Trains a reward model on pairs, writes it as the job of that name does, and loads it.

    The same call resumes a training that was cut short, and loads one that is finished.

    Args:
        pairs: a JSONL, JSON or Parquet file; or rows `{"prompt": text or messages, "chosen": text, "rejected": text}`,
            each with or without `scores_chosen` and `scores_rejected` ({objective: number from 0 to 10}).
        directory: the workspace. `vrm status` and `vrm serve` read it, too.
        backbone: a directory or a hub name of a causal decoder with a chat template; None is that of the recipe.
        objectives: at least two names; None are those that the pairs have scores for, in the order of the rows. Without
            scores nothing ties a name to what the model learns, and they are called factor 1, factor 2 and so on.
        recipe: a name or a path. Its section `reward` says how to train; its data are not used.
        overrides: settings of the recipe as on the command line, as in ["reward.num_steps=100"].
        device: None is "cuda" where there is one, else "cpu".

    Raises:
        ConfigError: a setting that means nothing, or one objective alone.
        DataError: rows that are no pairs, or too few to hold some out; names file, line and field.
        CheckpointError: the backbone cannot be loaded.
        WorkspaceLocked: another process trains there.
    """
    workspace = os.path.abspath(os.path.expanduser(directory))
    source = PairSource.of(pairs, workspace)
    resolved = with_native_dtype(
        load_recipe(recipe, [*source.overrides(objectives), *_of_backbone(backbone), "judge=null", *overrides])
    )
    if resolved.reward.backbone is None:
        raise ConfigError(f"recipe {recipe} names no backbone for the reward model. Pass backbone=..., a directory.")
    check_recipe(resolved)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_reward_model(_trained(resolved, resolved.reward.backbone, workspace, device), device=device)


def _of_backbone(backbone: str | None) -> list[str]:
    return (
        []
        if backbone is None
        else [f"{key}={json.dumps(backbone)}" for key in ("reward.backbone", "policy.checkpoint")]
    )


def _trained(recipe: Recipe, backbone: str, workspace: str, device: str) -> str:
    """Runs the stage in this process; returns where its result lies."""
    logging = StageLogging(
        names=recipe.logging, project=recipe.name, group=group_name(workspace), versions=installed_versions()
    )
    with Workspace.open(workspace, job=f"process {os.getpid()}", logging=logging) as opened:
        result = StageRunner(opened).run(
            reward_stage(recipe, backbone),
            lambda stage: run_reward_training(
                stage,
                recipe,
                load_data(recipe),
                backbone,
                lambda spec: nullcontext(build_reward_trainer(spec, engine_in_process(device))),
            ),
        )
    return result.location


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """A file of pairs, and the objectives that its rows have scores for."""

    path: str
    scored_objectives: tuple[str, ...]

    @classmethod
    def of(cls, pairs: Pairs, workspace: str) -> PairSource:
        """Rows are written to the workspace, under a name that their content gives: equal rows are one file."""
        path = (
            os.path.abspath(os.path.expanduser(pairs)) if isinstance(pairs, str | Path) else _written(pairs, workspace)
        )
        found: dict[str, None] = {}
        for row in read_rows(path):
            for field in ("scores_chosen", "scores_rejected"):
                scores = row.values.get(field)
                if isinstance(scores, Mapping):
                    found.update(dict.fromkeys(scores))
        return cls(path=path, scored_objectives=tuple(found))

    def overrides(self, objectives: Sequence[str] | None) -> list[str]:
        """The recipe's data and objectives. Unscored pairs leave the names to the recipe, which then mean nothing."""
        named = self.scored_objectives if objectives is None else tuple(objectives)
        data = [
            f"data.sources=[{{name: pairs, path: {json.dumps(self.path)}}}]",
            "data.prompts=[]",
            "data.evaluation_prompts=[]",
            "benchmark.prompts=[]",
        ]
        return [*data, *([f"objectives={json.dumps(named)}"] if named else [])]


def _written(rows: Iterable[Mapping[str, Any]], workspace: str) -> str:
    try:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    except (TypeError, ValueError) as error:
        raise DataError(f"a pair cannot be written as JSON: {error}. Give texts, numbers, lists and dicts.") from error
    if not lines:
        raise DataError("no pairs were given; a row is {'prompt': ..., 'chosen': ..., 'rejected': ...}")
    text = "\n".join(lines) + "\n"
    file = Path(workspace) / "data" / f"pairs-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return str(file)
