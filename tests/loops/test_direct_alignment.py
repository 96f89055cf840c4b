"""The stage of direct alignment in one process: references, resumption, difficulties, labelled responses, bad input."""

import json
import os
import signal
import threading
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.load import load_recipe
from pipeline.config.models import TinyModelConfig
from pipeline.data.preferences import normalised_prompt
from pipeline.data.run_data import load_data, pairs_of_the_reward_model
from pipeline.errors import ConfigError, DataError, Preempted
from pipeline.learning.builders import build_direct_trainer, engine_in_process
from pipeline.learning.difficulty import write_losses
from pipeline.learning.direct_trainer import DirectAlignmentTrainer, DirectSnapshot
from pipeline.loops import direct_alignment
from pipeline.loops.direct_alignment import align_directly
from pipeline.models.backbone import create_tiny_causal_lm, save_causal_lm
from pipeline.records import StageResult
from pipeline.stages.metrics_log import METRICS_FILE, read_metrics
from pipeline.stages.preemption import PreemptionNotice
from pipeline.stages.runner import StageRunner
from pipeline.stages.workspace import Workspace

SMALL = (
    "data.planted={num_train_pairs: 48, num_heldout_pairs: 12, num_sft_texts: 16, num_train_prompts: 64, "
    "num_heldout_prompts: 16}",
    "alignment.direct={batch_pairs: 8, num_steps: 6, max_length: 128, eval_every: 2, checkpoint_every: 2}",
    "alignment.max_tokens_per_micro_batch=512",
)


def recipe(*settings):
    return load_recipe("tiny", (*SMALL, *settings))


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


class Process:
    """One process that aligns: what it measured under the reference, and where it is to die."""

    def __init__(self, tiny_policy, path, *, kill_in=None, preempt_in=None):
        self.policy = StageResult(name="sft", location=tiny_policy, fingerprint="policy", metrics={})
        self.path = path
        self.kill_in, self.preempt_in = kill_in, preempt_in
        self.began = defaultdict(threading.Event)
        """By step, whether its update began."""
        self.states = {}
        """By step, the policy's parameters before its update."""
        self.measured = 0
        """Prompts whose log-probabilities were measured."""

    def align(self, experiment, data=None):
        data = data or load_data(experiment)
        notice = PreemptionNotice()
        with (
            notice.watching(),
            Workspace.open(str(self.path), job="test", notice=notice) as workspace,
        ):
            return align_directly(
                experiment,
                lambda: data,
                self.policy,
                workspace=workspace.uri,
                run_stage=StageRunner(workspace).run,
                open_trainer=lambda spec: nullcontext(self.trainer(spec)),
            )

    def trainer(self, spec):
        trainer = build_direct_trainer(spec, engine_in_process("cpu"))
        logprobs, update = trainer.logprobs, trainer.update

        def counted(groups):
            self.measured += len(groups)
            return logprobs(groups)

        def mortal(batch, step):
            self.states[step] = {name.removeprefix("policy."): t.clone() for name, t in trainer.engine.stream().tensors}
            self.began[step].set()
            if step == self.kill_in:
                raise Killed
            if step == self.preempt_in:
                signal.raise_signal(signal.SIGTERM)
            return update(batch, step)

        trainer.logprobs, trainer.update = counted, mortal
        return trainer


def weights(result):
    return load_file(Path(result.location) / "model.safetensors")


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ------------------------------------------------------------------ references and resumption


def test_references_are_computed_once_and_read_by_other_methods_and_runs(tiny_policy, tmp_path):
    first = Process(tiny_policy, tmp_path)
    first.align(recipe("alignment.algorithm=dpo"))
    assert first.measured == 48 + 12
    for method, new in (("wpo", 0), ("simpo", 0), ("kto", 6 * 8 + 12)):
        other = Process(tiny_policy, tmp_path)
        other.align(recipe(f"alignment.algorithm={method}"))
        assert other.measured == new, method  # KTO adds the mismatched responses of its steps
    changed = Process(tiny_policy, tmp_path)
    changed.policy = replace(changed.policy, fingerprint="another policy")
    changed.align(recipe("alignment.algorithm=dpo"))
    assert changed.measured == 48 + 12


def test_the_reference_is_measured_of_what_the_steps_read(tiny_policy, tmp_path):
    """Two steps of eight read 16 of 48 pairs; the cross-fitting scores all of them."""
    few = Process(tiny_policy, tmp_path / "few")
    few.align(recipe("alignment.algorithm=dpo", "alignment.direct.num_steps=2"))
    assert few.measured == 16 + 12
    selective = Process(tiny_policy, tmp_path / "selective")
    settings = ("alignment.direct.num_steps=2", "alignment.direct.difficulty={seeds: 1, lora: null}")
    selective.align(recipe("alignment.algorithm=selective_dpo", *settings))
    assert selective.measured == 48 + 12 + 48  # the reference, the held-out pairs, and either half by its model


def test_the_pairs_of_the_judge_are_not_trained_on(tiny_policy, tmp_path):
    experiment = recipe("alignment.algorithm=dpo", "judge={head: bt, share: 0.5}")
    data = load_data(experiment)
    result = Process(tiny_policy, tmp_path).align(experiment, data)
    trained = pairs_of_the_reward_model(data, experiment.judge).train_pairs
    assert result.metrics["data/train_rows"] == len(trained) < 48 == len(data.train_pairs)


@pytest.mark.parametrize("method", ["dpo", "beta_dpo", "kto", "selective_dpo"])
def test_a_killed_run_ends_with_the_same_weights_bit_for_bit(method, tiny_policy, tmp_path):
    experiment = recipe(f"alignment.algorithm={method}", "alignment.direct.difficulty.lora=null")
    whole = Process(tiny_policy, tmp_path / "whole").align(experiment)
    with pytest.raises(Killed):
        Process(tiny_policy, tmp_path / "killed", kill_in=3 if method != "selective_dpo" else 1).align(experiment)
    successor = Process(tiny_policy, tmp_path / "killed")
    resumed = successor.align(experiment)
    assert_bit_equal(weights(resumed), weights(whole))
    assert {k: v for k, v in resumed.metrics.items() if not k.startswith("memory/")} == {
        k: v for k, v in whole.metrics.items() if not k.startswith("memory/")
    }
    rows = read_metrics(Path(resumed.location).parent / METRICS_FILE)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 5]


def test_a_preempted_run_commits_its_step_and_its_successor_measures_nothing_again(tiny_policy, tmp_path):
    experiment = recipe("alignment.algorithm=dpo")
    with pytest.raises(Preempted, match=r"align_policy is committed after step 4\."):
        Process(tiny_policy, tmp_path, preempt_in=3).align(experiment)
    successor = Process(tiny_policy, tmp_path)
    successor.align(experiment)
    assert successor.measured == 0


def test_a_run_ends_with_the_policy_of_its_best_commit_where_the_recipe_prefers_it_to_the_last(tiny_policy, tmp_path):
    """A rate that worsens every step: the first of three commits is the best."""
    process = Process(tiny_policy, tmp_path)
    harmful = "alignment.direct.optimiser.learning_rate=0.05"
    best = process.align(recipe("alignment.algorithm=dpo", harmful, "alignment.direct.keep_best=-eval/loss"))
    rows = [row for row in read_metrics(Path(best.location).parent / METRICS_FILE) if "eval/loss" in row]
    losses = {row["step"]: row["eval/loss"] for row in rows}
    assert min(losses, key=losses.get) == 1, losses
    assert best.metrics["eval/loss"] == losses[1]
    kept, behind_two_steps = weights(best), process.states[2]
    assert {*kept} <= {*behind_two_steps}
    assert all(torch.equal(kept[name], behind_two_steps[name]) for name in kept)


def test_a_step_waits_for_no_checkpoint(tiny_policy, tmp_path, monkeypatch):
    """The commit behind step 2 can only be written once step 3 updates."""
    process = Process(tiny_policy, tmp_path)
    write, waited = DirectSnapshot.write, []

    def behind_the_next_step(snapshot, uri):
        if not waited:
            waited.append(process.began[2].wait(timeout=60))
        write(snapshot, uri)

    monkeypatch.setattr(DirectSnapshot, "write", behind_the_next_step)
    process.align(recipe("alignment.algorithm=dpo"))
    assert waited == [True]


def test_a_reference_of_another_checkpoint_leaves_before_training(tiny_policy, tokenizer, tmp_path):
    from tests.conftest import SMALLEST

    other = str(tmp_path / "other")
    model = create_tiny_causal_lm(SMALLEST, tokenizer, seed=7)
    save_causal_lm(model.state_dict(), model.config, tokenizer, other)
    result = Process(tiny_policy, tmp_path / "run").align(
        recipe("alignment.algorithm=dpo", f"alignment.direct.reference_checkpoint={other}")
    )
    row = read_metrics(Path(result.location).parent / METRICS_FILE)[0]
    assert abs(row["train/chosen_change"]) > 0.1  # the policy starts away from this reference


# ------------------------------------------------------------------ difficulties


def test_a_pair_is_scored_by_models_that_did_not_see_its_prompt_and_the_easiest_come_first(
    tiny_policy, tmp_path, monkeypatch
):
    experiment = recipe(
        "alignment.algorithm=selective_dpo",
        "alignment.direct.difficulty={seeds: 2, lora: {rank: 4, alpha: 8}, beta: 0.1}",
    )
    data = load_data(experiment)
    seen, scored = [], []
    update = DirectAlignmentTrainer.update

    def watched(self, batch, step):
        seen[-1].update(group.prompt_ids for group in batch.groups)
        return update(self, batch, step)

    class Watching(Process):
        def trainer(self, spec):
            seen.append(set())
            scored.append([])
            trainer = super().trainer(spec)
            logprobs = trainer.logprobs

            def watched_logprobs(groups):
                scored[-1].append({group.prompt_ids for group in groups})
                return logprobs(groups)

            trainer.logprobs = watched_logprobs
            return trainer

    monkeypatch.setattr(DirectAlignmentTrainer, "update", watched)
    process = Watching(tiny_policy, tmp_path)
    result = process.align(experiment, data)
    assert len(seen) == 5  # two splits of two halves, and the alignment
    for trained_on, measurements in zip(seen[:4], scored[:4], strict=True):
        assert trained_on
        assert not trained_on & measurements[-1]  # the last is the scoring
    [table] = (Path(result.location).parent / "difficulty").glob("*.parquet")
    rows = pq.read_table(table).to_pylist()
    assert sorted(row["id"] for row in rows) == sorted(pair.id for pair in data.train_pairs)
    assert [row["kept"] for row in rows] == [True] * 24 + [False] * 24
    difficulties = [row["difficulty"] for row in rows]
    assert difficulties == sorted(difficulties)
    assert all(row["difficulty"] == pytest.approx(sum(row["losses"]) / 2) for row in rows)
    assert len({row["losses"][0] for row in rows}) > 40
    assert result.metrics["data/train_rows"] == 24


def test_difficulties_that_say_no_more_than_the_lengths_raise_an_alarm(tiny_policy, tmp_path, capsys, monkeypatch):
    """A difficulty that is the difference in tokens: the easiest pairs are those with the shorter chosen response."""
    experiment = recipe("alignment.algorithm=selective_dpo", "alignment.direct.difficulty={seeds: 1, lora: null}")
    data = load_data(experiment)
    extra_words = {pair.id: float(len(pair.chosen.split()) - len(pair.rejected.split())) for pair in data.train_pairs}
    monkeypatch.setattr(
        direct_alignment,
        "write_losses",
        lambda uri, ids, losses: write_losses(uri, ids, [extra_words[identity] for identity in ids]),
    )
    result = Process(tiny_policy, tmp_path).align(experiment, data)
    assert result.metrics["difficulty/length_correlation"] == pytest.approx(1.0, abs=1e-3)
    assert result.metrics["difficulty/kept_chosen_shorter"] > 0.9
    assert result.metrics["alarm/difficulty_is_length"] == 1.0
    assert result.metrics["eval/alarms"] >= 1.0
    assert "alarm difficulty_is_length (difficulty/length_correlation = 1)" in capsys.readouterr().out


def test_another_share_or_rate_reads_the_same_difficulties(tiny_policy, tmp_path):
    selective = ("alignment.algorithm=selective_dpo", "alignment.direct.difficulty.seeds=1")
    Process(tiny_policy, tmp_path).align(recipe(*selective))
    Process(tiny_policy, tmp_path).align(
        recipe(*selective, "alignment.direct.keep_easiest=0.25", "alignment.direct.optimiser.learning_rate=1e-5")
    )
    stages = [name.rpartition("-")[0] for name in os.listdir(tmp_path / "stages")]
    assert (stages.count("measure_difficulty"), stages.count("align_policy")) == (2, 2)


def test_fewer_prompts_than_halves(tiny_policy, tmp_path):
    experiment = recipe("alignment.algorithm=selective_dpo")
    data = load_data(experiment)
    one = next(iter(data.train_pairs))
    same = [pair for pair in data.train_pairs if normalised_prompt(pair.prompt) == normalised_prompt(one.prompt)]
    with pytest.raises(DataError, match=r"have 1 prompt, .* 2 prompts are the least\. Give more prompts, or set"):
        Process(tiny_policy, tmp_path).align(experiment, replace(data, train_pairs=same))


# ------------------------------------------------------------------ KTO's labelled responses


def labelled_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"alignment.direct.labelled_responses=[{path}]"


def labelled_rows(experiment, *, labels):
    pairs = load_data(experiment).train_pairs
    return [
        {"prompt": list(pair.prompt), "response": pair.chosen if label else pair.rejected, "label": label}
        for pair, label in zip(pairs, labels, strict=False)
    ]


def test_kto_trains_on_unpaired_responses_and_counts_what_it_leaves_out(tiny_policy, tmp_path):
    kto = recipe("alignment.algorithm=kto")
    heldout = next(iter(load_data(kto).heldout_pairs))
    rows = labelled_rows(kto, labels=[True, False, True] * 6)
    rows += [
        {"prompt": "what now ?", "response": " ", "label": True},
        {"prompt": list(heldout.prompt), "response": heldout.chosen, "label": True},
    ]
    setting = labelled_file(tmp_path / "labelled.jsonl", rows)
    result = Process(tiny_policy, tmp_path / "run").align(
        recipe("alignment.algorithm=kto", "alignment.direct.undesirable_weight=1.5", setting)
    )
    assert result.metrics["data/train_rows"] == 18
    assert result.metrics["data/left_out/an_empty_response"] == 1
    assert result.metrics["data/left_out/a_held-out_prompt"] == 1
    assert result.metrics["eval/accuracy"] >= 0  # held-out pairs stay pairs


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "response": "b", "label": True}] * 3, "3 rows with label true and 0 with label false"),
        ([{"prompt": "a", "response": "b", "label": "yes"}], r"line 1, field 'label': 'yes' is no bool"),
        ([{"prompt": "a", "label": True}], r"line 1, field 'response': None is no str"),
    ],
)
def test_labelled_responses_that_kto_cannot_use(rows, message, tiny_policy, tmp_path):
    setting = labelled_file(tmp_path / "labelled.jsonl", rows)
    with pytest.raises(DataError, match=message):
        Process(tiny_policy, tmp_path / "run").align(recipe("alignment.algorithm=kto", setting))


# ------------------------------------------------------------------ bad input


def test_pairs_that_cannot_be_used_are_counted_by_reason_and_none_left_is_an_error(tiny_policy, tmp_path):
    experiment = recipe("alignment.algorithm=dpo")
    data = load_data(experiment)
    pairs = list(data.train_pairs)
    pairs[3] = replace(pairs[3], rejected=pairs[3].chosen)
    pairs[5] = replace(pairs[5], rejected="<think>only thoughts</think>")
    pairs[7] = replace(pairs[7], chosen="plan " * 200)
    result = Process(tiny_policy, tmp_path / "some").align(experiment, replace(data, train_pairs=pairs))
    left_out = {k: v for k, v in result.metrics.items() if k.startswith("data/left_out/")}
    assert left_out == {
        "data/left_out/identical_responses_in_tokens": 1,
        "data/left_out/an_empty_response": 1,
        "data/left_out/more_than_max_length_tokens": 1,
    }
    assert result.metrics["data/train_rows"] == 45
    same = [replace(pair, rejected=pair.chosen) for pair in pairs[:4]]
    with pytest.raises(DataError, match=r"none of 4 rows can be used: 'planted-train-0' has identical responses"):
        Process(tiny_policy, tmp_path / "none").align(experiment, replace(data, train_pairs=same))
    long = [replace(pair, chosen="plan " * 200) for pair in pairs[:4]]
    with pytest.raises(DataError, match=r"none of 4 rows fits in alignment\.direct\.max_length = 128"):
        Process(tiny_policy, tmp_path / "long").align(experiment, replace(data, train_pairs=long))


def test_a_longest_length_beyond_the_context_and_adapters_on_layers_that_are_not_there(tiny_policy, tmp_path):
    process = Process(tiny_policy, tmp_path)
    with pytest.raises(ConfigError, match=r"max_length = 300 exceeds the policy's context of 128 tokens"):
        process.align(recipe("alignment.algorithm=dpo", "alignment.direct.max_length=300"))
    with pytest.raises(ConfigError, match=r"alignment\.direct\.lora\.targets: .* no linear layer named c_attn"):
        process.align(recipe("alignment.algorithm=dpo", "alignment.direct.lora={targets: [c_attn]}"))


def test_a_reference_with_another_vocabulary(tiny_policy, tokenizer, tmp_path):
    other = str(tmp_path / "other")
    shape = TinyModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=16)
    vocabulary = type(tokenizer)(
        tokenizer_object=_with_words_swapped(tokenizer), eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token
    )
    model = create_tiny_causal_lm(shape, vocabulary, seed=0)
    save_causal_lm(model.state_dict(), model.config, vocabulary, other)
    with pytest.raises(ConfigError, match=r"reads the policy's token ids, but 2 of \d+ are other tokens"):
        Process(tiny_policy, tmp_path / "run").align(
            recipe("alignment.algorithm=dpo", f"alignment.direct.reference_checkpoint={other}")
        )


def _with_words_swapped(tokenizer):
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    first, second = [word for word in words if word.isalpha()][10:12]
    words[first], words[second] = words[second], words[first]
    return Tokenizer.from_str(json.dumps(content))
