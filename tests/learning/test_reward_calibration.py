"""Error bars and calibration of a finished reward model, from training to the service."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch

from pipeline.config.cluster import ScoringConfig
from pipeline.config.data import PlantedConfig
from pipeline.config.reward import VRMHeadConfig
from pipeline.data.collate import tokenise_pairs
from pipeline.data.planted import OBJECTIVES, PlantedWorld
from pipeline.evaluation.calibration import split_heldout
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.learning.reward_data import mismatched_pairs
from pipeline.models.last_layer import pair_differences
from pipeline.objectives.reward_comparison import compare_rewards
from pipeline.serving.admission import Admission
from pipeline.serving.cache import ScoreCache
from pipeline.serving.client import as_reward_score
from pipeline.serving.protocol import CompareRequest, ScoreRequest
from pipeline.serving.scoring_service import ScoringService, describe_model
from tests.support.learners import HEAD, collator, reward_trainer, tokenised

NETWORK = VRMHeadConfig(semantic_dims=8, hidden_size=64, decoder="mlp", decoder_hidden_size=16)
HADAMARD = VRMHeadConfig(semantic_dims=4, hidden_size=64, decoder="hadamard")


@pytest.fixture(scope="module")
def larger_world():
    config = PlantedConfig(
        num_train_pairs=192, num_heldout_pairs=320, num_sft_texts=1, num_train_prompts=96, num_heldout_prompts=160
    )
    return PlantedWorld(config, OBJECTIVES, seed=0)


def calibrated(world, tiny_policy, tokenizer, *, head="vrm", vrm=HEAD, steps=12):
    """A trainer that is trained and calibrated, the held-out batch, and its metrics."""
    trainer = reward_trainer(
        tiny_policy, world, tokenizer, head=head, vrm=vrm, num_steps=steps, lr=3e-3, max_tokens=4096
    )
    collate = collator(world, tokenizer)
    rows = tokenised(world, tokenizer)
    batches = [collate(rows[(64 * step) % len(rows) :][:64], step) for step in range(steps)]
    for step, batch in enumerate(batches):
        trainer.update(batch, step)
    heldout = collate(tokenised(world, tokenizer, "heldout"), 0)
    return trainer, heldout, trainer.calibrate(batches[-3:], heldout, None)


@pytest.fixture(scope="module")
def exported(larger_world, tiny_policy, tokenizer, tmp_path_factory):
    trainer, heldout, metrics = calibrated(larger_world, tiny_policy, tokenizer)
    directory = str(tmp_path_factory.mktemp("calibrated"))
    trainer.export(directory)
    return trainer, heldout, metrics, RewardModelScorer.load(directory, max_tokens_per_batch=4096)


def heldout_scores(world, scorer):
    """[2B] scores, chosen first."""
    pairs = world.heldout_pairs()
    prompts = [pair.prompt for pair in pairs]
    return scorer.score([*prompts, *prompts], [*(p.chosen for p in pairs), *(p.rejected for p in pairs)])


def test_a_reloaded_model_has_the_error_bars_and_log_odds_of_the_trainer(exported, larger_world):
    trainer, heldout, metrics, scorer = exported
    calibration = scorer.card.calibration
    assert calibration == trainer.card.calibration
    assert calibration.temperature != 1.0
    assert calibration.variance_factor != 1.0
    scores = heldout_scores(larger_world, scorer)
    output = trainer.score(heldout)
    stds = output.deviations.norm(dim=-1)
    assert stds.min().item() > 0.0
    torch.testing.assert_close(torch.tensor([s.std for s in scores]), stds, rtol=1e-3, atol=1e-4)
    assert calibration.posterior_std == pytest.approx(metrics["eval/posterior_std"], rel=1e-5)
    assert calibration.posterior_std == pytest.approx(stds.mean().item(), rel=1e-5)
    num_pairs = heldout.num_pairs
    margins = pair_differences(output.mean)
    variances = pair_differences(output.deviations).square().sum(-1)
    expected = margins / torch.sqrt(calibration.temperature**2 + math.pi / 8 * variances)
    compared = [compare_rewards(a, b) for a, b in zip(scores[:num_pairs], scores[num_pairs:], strict=True)]
    torch.testing.assert_close(torch.tensor([c.log_odds for c in compared]), expected, rtol=1e-3, atol=1e-3)


def test_what_is_reported_comes_from_pairs_that_calibrated_nothing(exported):
    trainer, heldout, metrics, scorer = exported
    report = split_heldout(heldout.pairs).report
    assert metrics["eval/reported_pairs"] == len(report)
    output = trainer.score(heldout)
    margins = pair_differences(output.mean)[report]
    variances = pair_differences(output.deviations).square().sum(-1)[report]
    logits = margins / torch.sqrt(scorer.card.calibration.temperature**2 + math.pi / 8 * variances)
    nll = torch.nn.functional.softplus(-logits).mean().item()
    assert metrics["eval/calibrated_nll"] == pytest.approx(nll, rel=1e-4)
    assert {"eval/ece", "eval/ece_uncalibrated", "eval/answered"} <= metrics.keys()
    assert scorer.card.metrics == metrics


def test_the_service_answers_with_the_scorers_numbers(exported, larger_world):
    *_, scorer = exported

    async def score_rows(rows):
        return scorer.score(*rows)

    service = ScoringService(
        score_rows,
        describe_model(scorer.card, ScoringConfig(), "f00d", {}),
        admission=Admission(64),
        cache=ScoreCache(0),
        deadline_s=60.0,
    )
    pair = larger_world.heldout_pairs()[0]
    prompt = pair.prompt[0]["content"]
    a, b = scorer.score([pair.prompt] * 2, [pair.chosen, pair.rejected])
    expected = compare_rewards(a, b)
    answer = asyncio.run(service.compare(CompareRequest(prompt=prompt, a=pair.chosen, b=pair.rejected)))
    assert answer.probability == pytest.approx(expected.probability, abs=1e-6)
    assert answer.margin_std == pytest.approx(expected.margin_std, rel=1e-4)
    assert answer.confident == expected.is_confident(scorer.card.calibration.answer_threshold)
    assert service.model.temperature == scorer.card.calibration.temperature
    # The score travels as JSON and is the same comparison at the other end.
    scored = asyncio.run(service.score(ScoreRequest(prompt=prompt, responses=[pair.chosen, pair.rejected])))
    served = compare_rewards(*map(as_reward_score, scored.scores))
    assert served.log_odds == pytest.approx(expected.log_odds, abs=1e-5)


@pytest.mark.parametrize(
    ("head", "vrm"),
    [
        ("vrm", NETWORK),
        ("vrm", HADAMARD),
        *((head, HEAD) for head in ("gate", "regression", "bt", "bt_aux", "ensemble")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.decoder,
)
def test_every_head_has_an_error_bar_that_survives_the_checkpoint(
    head, vrm, larger_world, tiny_policy, tokenizer, tmp_path
):
    trainer, heldout, _ = calibrated(larger_world, tiny_policy, tokenizer, head=head, vrm=vrm, steps=3)
    trainer.export(str(tmp_path))
    scorer = RewardModelScorer.load(str(tmp_path), max_tokens_per_batch=4096)
    stds = trainer.score(heldout).deviations.norm(dim=-1)
    assert stds.min().item() > 0.0
    pair = larger_world.heldout_pairs()[0]
    [score] = scorer.score([pair.prompt], [pair.chosen])
    assert score.std == pytest.approx(stds[0].item(), rel=1e-3)


def test_calibrating_twice_is_calibrating_once(larger_world, tiny_policy, tokenizer):
    """`keep_best` calibrates the last model, and then the best one."""
    for head in ("vrm", "ensemble"):
        trainer, heldout, first = calibrated(larger_world, tiny_policy, tokenizer, head=head, steps=3)
        collate, rows = collator(larger_world, tokenizer), tokenised(larger_world, tokenizer)
        batches = [collate(rows[64 * step :][:64], step) for step in range(3)]
        assert trainer.calibrate(batches, heldout, None) == pytest.approx(first, rel=1e-6, abs=1e-9)


def test_held_out_labels_do_not_decide_what_is_unknown_elsewhere(larger_world, tiny_policy, tokenizer):
    """The prior precision says how unsure the model is where no pair has been; held-out pairs say nothing of that."""
    trainer, *_ = calibrated(larger_world, tiny_policy, tokenizer, steps=3)
    chosen = trainer.card.calibration
    collate, rows = collator(larger_world, tokenizer), tokenised(larger_world, tokenizer)
    batches = [collate(rows[64 * step :][:64], step) for step in range(3)]
    half = [
        pair if n % 2 else replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        for n, pair in enumerate(larger_world.heldout_pairs())
    ]
    trainer.calibrate(batches, collate(tokenise_pairs(half, tokenizer, max_length=256, drop_too_long=False), 0), None)
    assert trainer.card.calibration.temperature != pytest.approx(chosen.temperature, rel=0.05)
    assert trainer.card.calibration.prior_precision == pytest.approx(chosen.prior_precision, rel=1e-6)


def test_few_held_out_pairs_calibrate_nothing(tiny_policy, world, tokenizer):
    trainer, _, metrics = calibrated(world, tiny_policy, tokenizer, steps=3)
    calibration = trainer.card.calibration
    assert (calibration.temperature, calibration.variance_factor) == (1.0, 1.0)
    assert calibration.answer_threshold is None
    assert metrics["eval/answered"] == 0.0
    assert metrics["eval/posterior_std"] > 0.0


def test_the_card_says_how_often_the_response_to_the_prompt_beats_one_to_another(larger_world, tiny_policy, tokenizer):
    trainer, heldout, metrics = calibrated(larger_world, tiny_policy, tokenizer, steps=1)
    assert "eval/mismatched_accuracy" not in metrics
    collate, rows = collator(larger_world, tokenizer), tokenised(larger_world, tokenizer, "heldout")
    pairs = mismatched_pairs(rows[:40], {"planted": 1.0}, 0, max_length=256)
    mismatched = collate(pairs, 0)
    margins = pair_differences(trainer.score(mismatched).mean)
    batches = [collate(tokenised(larger_world, tokenizer)[:64], 0)]
    metrics = trainer.calibrate(batches, heldout, mismatched)
    assert metrics["eval/mismatched_accuracy"] == pytest.approx(float((margins > 0).double().mean()))
    assert trainer.card.metrics["eval/mismatched_accuracy"] == metrics["eval/mismatched_accuracy"]
