"""Direct alignment to pairs that the policy writes itself: sampled, ranked by a reward model, learned; in rounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.config.direct_alignment import DirectConfig
from pipeline.config.policy_pairs import PolicyPairsConfig
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.batching import stable_seed
from pipeline.data.prompts import PromptStream, tokenise_prompts
from pipeline.data.run_data import RunData
from pipeline.errors import CorruptManifest
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.direct_data import DirectExamples
from pipeline.loops.direct_alignment import (
    DirectAlignment,
    OpenDirectTrainer,
    RunStage,
    fingerprints_of_direct_data,
    identity_of_direct,
)
from pipeline.models.reward_model import read_card
from pipeline.ports import RewardScorer, RolloutSource
from pipeline.records import Metrics, Prompt, PromptGroup, SamplingParams, StageResult
from pipeline.rollouts.numerics_gate import choose_probes
from pipeline.rollouts.publishing import publish_checkpoint
from pipeline.rollouts.ranked_responses import RankedSamples, rank_samples
from pipeline.stages import storage
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

VERSION = 1
PAIRS_FILE = "policy_pairs.json"
"""In the directory of a round: what was sampled and ranked, so that a resumed round samples nothing."""


@dataclass(frozen=True, kw_only=True)
class RankingPorts:
    """What writes responses and what ranks them."""

    rollouts: RolloutSource
    scorer: RewardScorer


OpenRanking = Callable[[], AbstractContextManager[RankingPorts]]


@dataclass(frozen=True, kw_only=True)
class OwnPairs:
    """Where the rounds of a recipe start from, and what opens their ports."""

    experiment: ExperimentConfig
    start: StageResult
    """The policy before alignment."""
    reward_model: StageResult
    workspace: str
    publish_directory: str
    """Where the engines read weights."""
    open_trainer: OpenDirectTrainer
    open_ranking: OpenRanking

    @property
    def config(self) -> PolicyPairsConfig:
        return self.experiment.alignment.policy_pairs

    # ------------------------------------------------------------------ rounds

    def align(self, read_data: Callable[[], RunData], run_stage: RunStage) -> StageResult:
        """All rounds, each a stage: a killed job goes on within the round it was in.

        Round r samples from the policy of round r - 1, which passes the numerics gate first.

        Raises:
            ConfigError, DataError, Preempted: as `align_directly`.
            StaleEngineError: an engine does not hold the policy that it should sample from.
            DataError: no prompt of a round gives a pair.
        """
        reached = self.start
        for number in range(self.config.rounds):
            reached = run_stage(self.stage(number, reached), self._round(number, reached, read_data))
        return reached

    def stage(self, number: int, reached: StageResult) -> StageSpec:
        """The identity of a round. It has the name of the other alignments: benchmark and report follow it."""
        sampling = ("samples_per_prompt", "max_prompt_tokens", "max_response_tokens", "temperature", "top_p", "pairs")
        read = {*DirectConfig.model_fields} - {"difficulty"}
        config = identity_of_direct(self.experiment, read, *sampling)
        rounds = self.config.model_dump(mode="json", exclude={"rounds"})
        return StageSpec(
            name="align_policy",
            version=VERSION,
            config=config | {"policy_pairs": rounds, "round": number},
            inputs=(self.start.fingerprint, reached.fingerprint, self.reward_model.fingerprint),
            data=fingerprints_of_direct_data(self.experiment),
            keep_checkpoints=self.experiment.alignment.keep_checkpoints,
            keep_best=self.experiment.alignment.direct.keep_best,
        )

    def _round(
        self, number: int, reached: StageResult, read_data: Callable[[], RunData]
    ) -> Callable[[StageDirectory], Metrics]:
        def compute(stage: StageDirectory) -> Metrics:
            data = read_data()
            # In round 0 the policy that writes the pairs is the start.
            earlier = self.start if number and self.config.reference == "start" else None
            alignment = DirectAlignment(
                experiment=self.experiment,
                policy=reached,
                workspace=self.workspace,
                open_trainer=self.open_trainer,
                earlier_policy=earlier,
            )
            tokenizer = alignment.tokenizer()
            examples, measured = self._ranked_examples(stage, number, reached, data, tokenizer)
            heldout = alignment.heldout(data, tokenizer)
            metrics = alignment.train_on(stage, examples, range(len(examples)), heldout)
            return metrics | measured | {"round": float(number)}

        return compute

    # ------------------------------------------------------------------ sampling and ranking

    def _ranked_examples(
        self,
        stage: StageDirectory,
        number: int,
        reached: StageResult,
        data: RunData,
        tokenizer: PreTrainedTokenizerBase,
    ) -> tuple[DirectExamples, Metrics]:
        """What the policy of the round before wrote, from the round's directory or sampled now."""
        place = storage.join(stage.uri, PAIRS_FILE)
        if storage.read_text(place) is None:
            ranked, measured = self._sample(number, reached, data, tokenizer)
            stage.leave_if_preempted()
            storage.write_text(place, json.dumps(_as_json(ranked, measured, imitates=self._imitates)))
        examples, metrics = read_pairs(place)
        print(f"{stage.name}  {_note(number, metrics)}", flush=True)
        return examples, metrics

    def _sample(
        self, number: int, reached: StageResult, data: RunData, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[RankedSamples, Metrics]:
        alignment, seed = self.experiment.alignment, self.experiment.seed
        prompts = tokenise_prompts(data.train_prompts, tokenizer, max_prompt_tokens=alignment.max_prompt_tokens)
        asked = PromptStream(prompts=tuple(prompts), seed=seed).batch(number, self.config.prompts_per_round)
        with self.open_ranking() as ports:
            gate = self._load(ports.rollouts, reached, prompts, len(tokenizer), number)
            samples = ports.rollouts.generate(
                asked,
                SamplingParams(
                    temperature=alignment.temperature,
                    top_p=alignment.top_p,
                    max_response_tokens=alignment.max_response_tokens,
                    samples_per_prompt=alignment.samples_per_prompt,
                    seed=stable_seed("round", seed, number),
                ),
            )
            conversations, responses = [s.prompt.messages for s in samples], [s.response_text for s in samples]
            scores = ports.scorer.score(conversations, responses)
        with storage.reading(self.reward_model.location) as directory:
            scale = RewardScale.of(read_card(directory))
        ranked = rank_samples(
            samples,
            scores,
            samples_per_prompt=alignment.samples_per_prompt,
            lcb_coefficient=self.config.lcb_coefficient,
            least_margin=self.config.least_margin * scale.std,
        )
        measured = ranked.metrics() | gate
        measured["pairs/sampled_tokens"] = float(sum(len(sample.response_ids) for sample in samples))
        measured["reward/mean"] = sum(score.mean for score in scores) / len(scores)
        if data.gold is not None:
            rewards = [data.gold.reward(*pair) for pair in zip(conversations, responses, strict=True)]
            measured["gold/mean"] = sum(rewards) / len(rewards)
        return ranked, measured

    def _load(
        self, rollouts: RolloutSource, reached: StageResult, prompts: Sequence[Prompt], vocabulary: int, number: int
    ) -> Metrics:
        """Gives the engines the policy of the round before; it passes the numerics gate, or nothing is sampled."""
        probes = choose_probes(prompts, vocabulary_size=vocabulary, seed=self.experiment.seed)
        location = storage.join(self.publish_directory, "round")
        with storage.reading(reached.location) as checkpoint:
            weights = publish_checkpoint(
                checkpoint, location, probes, dtype=self.experiment.policy.dtype, version=number
            )
        return rollouts.load_weights(weights)

    @property
    def _imitates(self) -> bool:
        """Whether the best responses alone are learned: RAFT."""
        losses = self.experiment.alignment.direct.losses
        return not (losses.of_pairs or losses.kto)


def _as_json(ranked: RankedSamples, measured: Metrics, *, imitates: bool) -> dict[str, object]:
    rows = [
        {
            "id": row.best.prompt.id,
            "messages": list(row.best.prompt.messages),
            "prompt_ids": row.best.prompt.token_ids,
            "responses": [sample.response_text for sample in (row.best, row.worst)],
            "response_ids": [sample.response_ids for sample in ((row.best,) if imitates else (row.best, row.worst))],
            "margin": row.margin,
        }
        for row in ranked.rows
    ]
    return {"metrics": measured, "left_out": dict(ranked.left_out), "rows": rows}


def read_pairs(place: str) -> tuple[DirectExamples, Metrics]:
    """What a round trains on, and what its sampling measured.

    Raises:
        CorruptManifest: the file cannot be read.
    """
    try:
        record = json.loads(storage.read_text(place) or "")
        rows = record["rows"]
        groups = tuple(
            PromptGroup(prompt_ids=tuple(row["prompt_ids"]), response_ids=tuple(map(tuple, row["response_ids"])))
            for row in rows
        )
        examples = DirectExamples(
            # A prompt may be asked twice in a round, where one pass over the prompts ends and the next begins.
            ids=tuple(f"{row['id']}#{number}" for number, row in enumerate(rows)),
            prompts=tuple(tuple(row["messages"]) for row in rows),
            groups=groups,
            desirable=torch.tensor([[True, False][: len(group.response_ids)] for group in groups]),
            left_out=record["left_out"],
        )
        return examples, record["metrics"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptManifest(
            f"{place} cannot be read ({error!r}). Delete it; the same command samples the round again."
        ) from error


def _note(number: int, metrics: Metrics) -> str:
    """Counts of the round, for the terminal."""
    left_out = [
        f"{count:.0f} where {name.rpartition('/')[2].replace('_', ' ')}"
        for name, count in metrics.items()
        if name.startswith("pairs/left_out/")
    ]
    note = f"round {number + 1}: {metrics['pairs/rows']:.0f} prompts ranked"
    return f"{note}; left out {', '.join(left_out)}" if left_out else note
