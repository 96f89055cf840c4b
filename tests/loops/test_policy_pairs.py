"""Direct alignment to the policy's own responses, over a real sampler and trainer of a tiny model in this process."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.load import load_recipe
from pipeline.data.run_data import load_data
from pipeline.errors import ConfigError, CorruptManifest, DataError
from pipeline.experiments.local_run import LocalRun
from pipeline.experiments.shared_stages import from_root_or_computed
from pipeline.learning.builders import build_direct_trainer, engine_in_process
from pipeline.loops.policy_pairs import PAIRS_FILE, OwnPairs, RankingPorts, read_pairs
from pipeline.models.reward_model_card import read_card
from pipeline.records import RewardScore, StageResult
from pipeline.stages.workspace import StageDirectory

OVERRIDES = (
    *("data.planted.num_train_pairs=16", "data.planted.num_heldout_pairs=8", "data.planted.num_sft_texts=8"),
    *("data.planted.num_train_prompts=16", "data.planted.num_heldout_prompts=8"),
    *("alignment.algorithm=dpo", "alignment.pairs=policy", "alignment.samples_per_prompt=8"),
    *("alignment.max_response_tokens=80", "alignment.policy_pairs.prompts_per_round=8"),
    "alignment.policy_pairs.rounds=1",
    *("alignment.direct.epochs=null", "alignment.direct.num_steps=4"),
    *("alignment.direct.batch_pairs=4", "alignment.direct.eval_every=2"),
    *("alignment.direct.optimiser.learning_rate=3e-3",),
)


class ShorterIsBetter:
    """Scores words; remembers how many responses it was given. A response that ends is shorter than one that is cut."""

    def __init__(self, score=lambda text: -float(len(text.split()))):
        self.scored = []
        self._score = score

    def score(self, prompts, responses):
        self.scored.append(len(responses))
        return [
            RewardScore(mean=self._score(text), std=0.0, objective_weights=(), objective_scores=())
            for text in responses
        ]


class FaintForEveryOther(ShorterIsBetter):
    """Tells the responses to every other prompt hardly apart."""

    def score(self, prompts, responses):
        return [
            replace(score, mean=score.mean * (1.0 if (n // 8) % 2 else 1e-6))
            for n, score in enumerate(super().score(prompts, responses))
        ]


@pytest.fixture
def start(tiny_policy):
    return StageResult(name="sft", fingerprint="start", location=tiny_policy, metrics={})


@pytest.fixture(scope="module")
def reward_model(trained_reward_model):
    return StageResult(name="train_reward_model", fingerprint="reward", location=trained_reward_model, metrics={})


class Rounds:
    """One run in a directory: its stages, what it sampled from, and what it scored."""

    def __init__(self, start, reward_model, directory, *overrides, scorer=None):
        experiment = load_recipe("table1_tiny", [*OVERRIDES, *overrides])
        self.scorer = scorer or ShorterIsBetter()
        self.stages = []
        self.opened = 0
        self.directory = str(directory)
        data = load_data(experiment)
        self.local = LocalRun.open(experiment, data, start, directory=self.directory, device="cpu")
        self.own = OwnPairs(
            experiment=experiment,
            start=start,
            reward_model=reward_model,
            workspace=self.directory,
            publish_directory=self.local.publish_directory,
            open_trainer=lambda spec: nullcontext(build_direct_trainer(spec, engine_in_process("cpu"))),
            open_ranking=self._open_ranking,
        )
        self._data = data

    @contextmanager
    def _open_ranking(self):
        self.opened += 1
        yield RankingPorts(rollouts=self.local.rollouts, scorer=self.scorer)

    def _run_stage(self, spec, compute):
        self.stages.append(StageDirectory.shared(self.directory, spec))
        return from_root_or_computed(spec, self.directory, compute)

    def align(self):
        return self.own.align(lambda: self._data, self._run_stage)

    def pairs(self, number):
        return read_pairs(f"{self.stages[number].uri}/{PAIRS_FILE}")


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def test_the_best_of_the_policys_own_responses_meets_the_worst(start, reward_model, tmp_path):
    run = Rounds(start, reward_model, tmp_path)
    result = run.align()
    examples, measured = run.pairs(0)
    assert run.scorer.scored == [8 * 8]
    assert 1 <= len(examples) <= 8
    assert all(len(best) < len(worst) for best, worst in (group.response_ids for group in examples.groups))
    assert examples.desirable.tolist() == [[True, False]] * len(examples)
    assert measured["gate/mean"] < 1e-4
    assert result.metrics["pairs/rows"] == len(examples)
    assert result.metrics["gold/mean"] >= 1.0
    moved = weights(result.location)
    assert any(not torch.equal(moved[name], tensor) for name, tensor in weights(start.location).items())


def test_the_second_round_samples_from_the_policy_of_the_first(start, reward_model, tmp_path):
    run = Rounds(start, reward_model, tmp_path, "alignment.policy_pairs.rounds=2")
    run.align()
    assert run.opened == 2
    assert len({stage.fingerprint for stage in run.stages}) == 2
    first = run.stages[0].result()
    sampled = run.local.rollouts._model.state_dict()
    assert all(torch.equal(sampled[name], tensor) for name, tensor in weights(first.location).items())
    assert [s.manifest()["metrics"]["round"] for s in run.stages] == [0.0, 1.0]


def test_the_reference_is_the_start_or_the_policy_that_wrote_the_pairs(start, reward_model, tmp_path):
    """The held-out change of log-probabilities is measured against the reference: small against the round before."""
    changes = {}
    for reference in ("start", "round"):
        overrides = ("alignment.policy_pairs.rounds=2", f"alignment.policy_pairs.reference={reference}")
        result = Rounds(start, reward_model, tmp_path / reference, *overrides).align()
        changes[reference] = result.metrics["eval/change_rms"]
    assert changes["start"] > 1.1 * changes["round"]


def test_a_killed_round_goes_on_with_the_pairs_it_has_sampled(start, reward_model, tmp_path):
    whole = Rounds(start, reward_model, tmp_path / "whole")
    expected = weights(whole.align().location)

    killed = Rounds(start, reward_model, tmp_path / "killed")

    def dies(spec):
        raise KeyboardInterrupt

    killed.own = replace(killed.own, open_trainer=dies)
    with pytest.raises(KeyboardInterrupt):
        killed.align()
    assert killed.opened == 1

    again = Rounds(start, reward_model, tmp_path / "killed")
    result = again.align()
    assert again.opened == 0
    for name, tensor in weights(result.location).items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)


def test_a_finished_round_is_not_computed_again(start, reward_model, tmp_path):
    overrides = ("alignment.policy_pairs.rounds=2",)
    Rounds(start, reward_model, tmp_path, "alignment.policy_pairs.rounds=1").align()
    more = Rounds(start, reward_model, tmp_path, *overrides)
    more.align()
    assert more.opened == 1  # the first round stands


def test_raft_learns_the_best_response_alone(start, reward_model, tmp_path):
    run = Rounds(start, reward_model, tmp_path, "alignment.algorithm=raft")
    result = run.align()
    examples, _ = run.pairs(0)
    assert all(len(group.response_ids) == 1 for group in examples.groups)
    assert examples.desirable.all()
    record = json.loads(Path(f"{run.stages[0].uri}/{PAIRS_FILE}").read_text())
    assert all(len(row["responses"]) == 2 for row in record["rows"])  # what lost can be looked at
    assert result.metrics["eval/loss"] > 0


def test_responses_that_all_score_alike_are_named_with_a_cure(start, reward_model, tmp_path):
    run = Rounds(start, reward_model, tmp_path, scorer=ShorterIsBetter(lambda text: 1.0))
    with pytest.raises(
        DataError, match=r"none of 8 prompts gives a pair: all responses score alike \(8\)\. Sample more"
    ):
        run.align()


def test_prompts_that_give_no_pair_are_counted_and_shown(start, reward_model, tmp_path, capsys):
    margin = 0.01 / read_card(reward_model.location).reward_std  # margins are in units of the reward's spread
    overrides = (f"alignment.policy_pairs.least_margin={margin}",)
    run = Rounds(start, reward_model, tmp_path, *overrides, scorer=FaintForEveryOther())
    result = run.align()
    left_out = result.metrics["pairs/left_out/best_and_worst_too_close"]
    assert 1 <= left_out <= 4
    assert f"{left_out:.0f} where best and worst too close" in capsys.readouterr().out


def test_pairs_that_cannot_be_read_are_named(tmp_path):
    place = tmp_path / PAIRS_FILE
    place.write_text('{"rows": 3}')
    with pytest.raises(CorruptManifest, match="Delete it; the same command samples the round again"):
        read_pairs(str(place))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignment.samples_per_prompt=1", "ranks the responses to one prompt.*8 is usual"),
        ("alignment.algorithm=ppo", "pairs = policy belongs to direct methods"),
        ("alignment.algorithm=selective_dpo", "makes its pairs itself"),
    ],
)
def test_settings_that_contradict_pairs_of_the_policy_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("table1_tiny", [*OVERRIDES, override])


def test_imitation_needs_responses_of_the_policy():
    with pytest.raises(ConfigError, match="or pairs=policy to imitate the best own responses"):
        load_recipe("table1_tiny", ["alignment.algorithm=raft", "alignment.pairs=data"])
