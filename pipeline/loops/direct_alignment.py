"""Stage 3 without reward model and rollouts: the policy, aligned to preference pairs directly."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.config.direct_alignment import DirectConfig
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.batching import stable_seed
from pipeline.data.files import content_fingerprint
from pipeline.data.labelled import read_labelled
from pipeline.data.preferences import normalised_prompt
from pipeline.data.run_data import RunData, data_fingerprints, pairs_of_the_reward_model, resolve
from pipeline.errors import ConfigError
from pipeline.evaluation.alarms import DIFFICULTY_ALARMS, DIRECT_ALARMS, alarm_messages, check_alarms
from pipeline.learning.builders import DirectTrainerSpec
from pipeline.learning.difficulty import (
    NUM_HALVES,
    about_difficulty,
    easiest_first,
    fold_config,
    pair_losses,
    read_losses,
    split_into_halves,
    write_losses,
)
from pipeline.learning.direct_data import (
    LEFT_OUT,
    DirectBatches,
    DirectData,
    DirectExamples,
    ReferenceOf,
    tokenise_examples,
)
from pipeline.learning.reference_logprobs import ReferenceLogprobs
from pipeline.learning.reward_data import share_by_source
from pipeline.loops.training import fit, train
from pipeline.models.backbone import differing_tokens, load_config, load_tokenizer, require_lora_targets
from pipeline.ports import DirectLearner
from pipeline.records import LabelledResponse, Metrics, PreferencePair, StageResult
from pipeline.stages import storage
from pipeline.stages.fingerprint import directory_fingerprint
from pipeline.stages.stage_spec import StageSpec
from pipeline.stages.workspace import StageDirectory

VERSION = 1

OpenDirectTrainer = Callable[[DirectTrainerSpec], AbstractContextManager[DirectLearner]]
RunStage = Callable[[StageSpec, Callable[[StageDirectory], Metrics]], StageResult]
"""The result of a stage: from the workspace if it is there, else computed."""


def align_directly(
    experiment: ExperimentConfig,
    read_data: Callable[[], RunData],
    policy: StageResult,
    *,
    workspace: str,
    run_stage: RunStage,
    open_trainer: OpenDirectTrainer,
) -> StageResult:
    """Aligns the policy to pairs; where the recipe asks for difficulties, after the stages that measure them.

    Args:
        policy: what the alignment starts from, and its reference.
        workspace: where the log-probabilities of references are kept.
        open_trainer: opens the trainer of a specification, in this process or on Ray actors.

    Raises:
        ConfigError: adapters on layers that the policy does not have, a `max_length` beyond its context, or a reference
            with other tokens.
        DataError: no pair can be used, labels of one class alone, or too few prompts to measure difficulties.
        Preempted: the process is about to be ended; what is done is committed.
    """
    run = DirectAlignment(experiment=experiment, policy=policy, workspace=workspace, open_trainer=open_trainer)
    difficulty = experiment.alignment.direct.difficulty if experiment.alignment.direct.needs_difficulty else None
    splits = range(0 if difficulty is None else difficulty.seeds)
    folds = [[run_stage(*run.fold(read_data, split, half)) for half in range(NUM_HALVES)] for split in splits]
    spec = direct_alignment_stage(
        experiment, policy.fingerprint, [fold.fingerprint for split in folds for fold in split]
    )
    return run_stage(spec, lambda stage: run.align(stage, read_data(), folds))


def direct_alignment_stage(experiment: ExperimentConfig, policy: str, folds: Sequence[str]) -> StageSpec:
    """The identity of a direct alignment. It has the name of the other alignments: benchmark and report follow it.

    Args:
        policy: fingerprint of the policy before alignment.
        folds: fingerprints of the stages that measured difficulties.
    """
    return StageSpec(
        name="align_policy",
        version=VERSION,
        config=identity_of_direct(experiment, {*DirectConfig.model_fields} - {"difficulty"}),
        inputs=(policy, *folds),
        data=fingerprints_of_direct_data(experiment),
        keep_checkpoints=experiment.alignment.keep_checkpoints,
        keep_best=experiment.alignment.direct.keep_best,
    )


def difficulty_stage(experiment: ExperimentConfig, policy: str, *, split: int, half: int) -> StageSpec:
    """The identity of one model of the cross-fitting: the pairs of the other half, scored."""
    read = {"difficulty", "reference_checkpoint", "batch_pairs", "max_length"}
    return StageSpec(
        name="measure_difficulty",
        version=VERSION,
        config=identity_of_direct(experiment, read) | {"split": split, "half": half},
        inputs=(policy,),
        data=fingerprints_of_direct_data(experiment),
    )


def identity_of_direct(experiment: ExperimentConfig, direct: set[str], *others: str) -> dict[str, Any]:
    """What a stage reads of the recipe, with these settings of `alignment.direct` and these others of `alignment`."""
    alignment = {"max_tokens_per_micro_batch": True, "gradient_checkpointing": True, "direct": direct}
    alignment |= dict.fromkeys(others, True)
    include: Any = dict.fromkeys(("seed", "objectives", "data", "judge", "policy"), True) | {"alignment": alignment}
    return experiment.model_dump(mode="json", include=include)


def fingerprints_of_direct_data(experiment: ExperimentConfig) -> tuple[str, ...]:
    direct = experiment.alignment.direct
    labelled = [content_fingerprint(resolve(path)) for path in direct.labelled_responses]
    other = [] if direct.reference_checkpoint is None else [checkpoint_fingerprint(direct.reference_checkpoint)]
    return (*data_fingerprints(experiment), *labelled, *other)


def checkpoint_fingerprint(checkpoint: str) -> str:
    """Of the files of a directory; a checkpoint of the hub counts by its name."""
    return directory_fingerprint(checkpoint) if os.path.isdir(checkpoint) else f"hub {checkpoint}"


@dataclass(frozen=True, kw_only=True)
class DirectAlignment:
    """Where direct alignments of a recipe start from, and what opens their trainers."""

    experiment: ExperimentConfig
    policy: StageResult
    workspace: str
    open_trainer: OpenDirectTrainer
    earlier_policy: StageResult | None = None
    """The reference, where it is neither the policy that the training starts from nor a checkpoint of the recipe."""

    @property
    def config(self) -> DirectConfig:
        return self.experiment.alignment.direct

    # ------------------------------------------------------------------ the alignment

    def align(self, stage: StageDirectory, data: RunData, folds: Sequence[Sequence[StageResult]]) -> Metrics:
        """Trains from the last commit. Returns the held-out metrics of the finished policy, memory, and the data's."""
        examples, heldout = self._examples(data)
        if not folds:
            return self.train_on(stage, examples, range(len(examples)), heldout)
        losses = [read_losses(half.location) | read_losses(other.location) for half, other in folds]
        table = storage.join(stage.uri, "difficulty")
        trained = easiest_first(examples, losses, keep=self.config.keep_easiest, uri=table)
        about_pairs = about_difficulty(examples, losses, trained)
        about_pairs |= check_alarms(about_pairs, DIFFICULTY_ALARMS)
        for message in alarm_messages(about_pairs, DIFFICULTY_ALARMS, are_pairs_scored=True):
            print(f"{stage.name}  {message}", flush=True)
        metrics = self.train_on(stage, examples, trained, heldout, is_scored=True)
        raised = metrics["eval/alarms"] + about_pairs["eval/alarms"]
        return metrics | about_pairs | {"eval/alarms": raised}

    def train_on(
        self,
        stage: StageDirectory,
        examples: DirectExamples,
        trained: Sequence[int],
        heldout: DirectExamples,
        *,
        is_scored: bool = False,
    ) -> Metrics:
        """Trains on those rows of the examples from the last commit. Returns what `align` returns.

        Args:
            is_scored: difficulties were measured, so the workspace holds the reference of every row.
        """
        seed = self.experiment.seed
        training = DirectData(config=self.config, examples=examples, trained=trained, heldout=heldout, seed=seed)
        about_the_data = training.metrics()
        print(f"{stage.name}  {_data_note(about_the_data)}", flush=True)
        batches = self._batches_of_another_reference(stage, training, of_every_row=is_scored)
        with self.open_trainer(self._spec(self.config, training.num_steps)) as trainer:
            batches = batches or training.with_references(self._references(stage, trainer), of_every_row=is_scored)
            metrics = train(
                trainer,
                stage,
                batch_of=batches.batch,
                heldout=batches.heldout,
                num_steps=training.num_steps,
                eval_every=self.config.eval_every,
                checkpoint_every=self.config.checkpoint_every,
            )
            metrics |= trainer.peak_memory()
        for message in alarm_messages(metrics, DIRECT_ALARMS, are_pairs_scored=True):
            print(f"{stage.name}  {message}", flush=True)
        return metrics | about_the_data

    # ------------------------------------------------------------------ difficulties

    def fold(
        self, read_data: Callable[[], RunData], split: int, half: int
    ) -> tuple[StageSpec, Callable[[StageDirectory], Metrics]]:
        """The stage of one model of the cross-fitting: it trains on one half of the prompts and scores the other."""
        spec = difficulty_stage(self.experiment, self.policy.fingerprint, split=split, half=half)
        return spec, lambda stage: self._measure_difficulty(stage, read_data(), split, half)

    def _measure_difficulty(self, stage: StageDirectory, data: RunData, split: int, half: int) -> Metrics:
        config = fold_config(self.config)
        examples, heldout = self._examples(data)
        seed = stable_seed("difficulty", self.experiment.seed, split)
        halves = split_into_halves(examples, seed=seed)
        scored = halves[1 - half]
        training = DirectData(config=config, examples=examples, trained=halves[half], heldout=heldout, seed=seed)
        batches = self._batches_of_another_reference(stage, training, of_every_row=True)
        with self.open_trainer(self._spec(config, training.num_steps)) as trainer:
            batches = batches or training.with_references(self._references(stage, trainer), of_every_row=True)
            metrics = fit(
                trainer,
                stage,
                batch_of=batches.batch,
                heldout=batches.heldout,
                num_steps=training.num_steps,
                eval_every=training.num_steps,
                checkpoint_every=config.checkpoint_every,
            )
            metrics |= trainer.peak_memory()
            logprobs = trainer.logprobs([examples.groups[row] for row in scored])
        assert batches.reference_logprobs is not None, "plain DPO has a reference"
        losses = pair_losses(logprobs, batches.reference_logprobs[scored], beta=config.beta)
        write_losses(stage.result_uri, [examples.ids[row] for row in scored], losses)
        return metrics | {"difficulty/pairs": float(len(scored)), "difficulty/mean": sum(losses) / len(losses)}

    # ------------------------------------------------------------------ what both need

    def _examples(self, data: RunData) -> tuple[DirectExamples, DirectExamples]:
        """Training examples and held-out pairs in the policy's tokens."""
        tokenizer = self.tokenizer()
        rows, left_out = self._training_rows(data)
        examples = tokenise_examples(
            rows, tokenizer, max_length=self.config.max_length, max_too_long=self.experiment.data.max_too_long
        )
        examples = replace(examples, left_out=Counter(left_out) + Counter(examples.left_out))
        return examples, self.heldout(data, tokenizer)

    def _training_rows(
        self, data: RunData
    ) -> tuple[Sequence[PreferencePair] | Sequence[LabelledResponse], Mapping[str, int]]:
        """Pairs or labelled responses, and the rows of their files that gave none, by reason.

        The pairs of the judge, where the recipe has one, are not among them.
        """
        files = self.config.labelled_responses
        if not files:
            by_source = (Counter({str(reason): n for reason, n in counts.items()}) for counts in data.left_out.values())
            return pairs_of_the_reward_model(data, self.experiment.judge).train_pairs, sum(by_source, Counter())
        heldout_prompts = {normalised_prompt(pair.prompt) for pair in data.heldout_pairs}
        return read_labelled([resolve(path) for path in files], heldout_prompts=heldout_prompts)

    def heldout(self, data: RunData, tokenizer: PreTrainedTokenizerBase) -> DirectExamples:
        """Held-out pairs in the policy's tokens."""
        pairs = share_by_source(data.heldout_pairs, self.config.max_eval_pairs)
        return tokenise_examples(pairs, tokenizer, max_length=self.config.max_length)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's.

        Raises:
            ConfigError: the settings of the recipe do not fit the policy, or its reference.
        """
        config = self.config
        with storage.reading(self.policy.location) as directory:
            require_lora_targets(directory, config.lora, "alignment.direct")
            context = int(load_config(directory).max_position_embeddings)
            tokenizer = load_tokenizer(directory)
        if config.max_length > context:
            raise ConfigError(
                f"alignment.direct.max_length = {config.max_length} exceeds the policy's context of {context} tokens. "
                "Lower it."
            )
        if config.reference_checkpoint is not None:
            self._require_a_reference_with_the_same_tokens(tokenizer, config.reference_checkpoint)
        return tokenizer

    def _require_a_reference_with_the_same_tokens(self, tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> None:
        num_rows = int(load_config(checkpoint).vocab_size)
        differing = differing_tokens(tokenizer, load_tokenizer(checkpoint), num_rows=num_rows)
        if differing:
            raise ConfigError(
                f"alignment.direct.reference_checkpoint = {checkpoint!r} reads the policy's token ids, but "
                f"{len(differing):,} of {len(tokenizer):,} are other tokens to it or none ({differing[0]!r}, ...). "
                "Give a reference of the policy's family, or none: then the policy before alignment is the reference."
            )

    def _spec(self, config: DirectConfig, num_steps: int) -> DirectTrainerSpec:
        alignment = self.experiment.alignment
        return DirectTrainerSpec(
            config=config,
            policy_uri=self.policy.location,
            dtype=self.experiment.policy.dtype,
            num_steps=num_steps,
            max_tokens_per_micro_batch=alignment.max_tokens_per_micro_batch,
            gradient_checkpointing=alignment.gradient_checkpointing,
            seed=self.experiment.seed,
        )

    def _references(self, stage: StageDirectory, trainer: DirectLearner, *, other: str | None = None) -> ReferenceOf:
        """The policy before alignment as a reference: a trainer that has not restored a commit yet still is it.

        Args:
            other: fingerprint of the checkpoint that the trainer holds in its place.
        """
        references = ReferenceLogprobs.in_workspace(
            self.workspace,
            policy=other or self.policy.fingerprint,
            dtype=self.experiment.policy.dtype,
            measure=trainer.logprobs,
        )

        def before(num_behind: int, num_groups: int) -> None:
            stage.leave_if_preempted()
            print(f"{stage.name}  reference: {num_behind} of {num_groups} prompts measured", flush=True)

        return partial(references.of, before=before)

    def _batches_of_another_reference(
        self, stage: StageDirectory, data: DirectData, *, of_every_row: bool
    ) -> DirectBatches | None:
        """None where the policy itself is the reference. Another one leaves the memory before training starts."""
        checkpoint = self.config.reference_checkpoint
        if checkpoint is not None:
            place, fingerprint = checkpoint, checkpoint_fingerprint(checkpoint)
        elif self.earlier_policy is not None:
            place, fingerprint = self.earlier_policy.location, self.earlier_policy.fingerprint
        else:
            return None
        spec = replace(self._spec(data.config, data.num_steps), policy_uri=place)
        with self.open_trainer(spec) as reference:
            return data.with_references(
                self._references(stage, reference, other=fingerprint), of_every_row=of_every_row
            )


def _data_note(about_the_data: Metrics) -> str:
    """Sizes and counts of what was left out, for the terminal."""
    rows, heldout = about_the_data["data/train_rows"], about_the_data["data/heldout_pairs"]
    left_out = [
        f"{count:.0f} with {name.removeprefix(LEFT_OUT).replace('_', ' ')}"
        for name, count in about_the_data.items()
        if name.startswith(LEFT_OUT)
    ]
    note = f"trains on {rows:.0f} rows, {heldout:.0f} pairs held out"
    return f"{note}; left out {', '.join(left_out)}" if left_out else note
