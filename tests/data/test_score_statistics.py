"""Statistics of annotated scores: taken once, from the training split, and recognised later."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.config.load import load_recipe
from pipeline.data.planted import OBJECTIVES
from pipeline.data.run_data import load_data, with_flipped_labels
from pipeline.data.score_statistics import MixtureStatistics, ScoreStatistics, constant_scores
from pipeline.errors import DataError
from pipeline.learning.reward_data import RewardData


def test_statistics_are_those_of_every_annotated_response_and_a_missing_score_counts_nowhere(world):
    pairs = world.train_pairs()
    bare = replace(pairs[0], scores_chosen=None, scores_rejected={"safety": 2.0})
    statistics = ScoreStatistics.of([bare, *pairs[1:]], OBJECTIVES)
    scores = [side for pair in pairs[1:] for side in (pair.scores_chosen, pair.scores_rejected)]
    honesty = np.array([side["honesty"] for side in scores])
    assert (statistics.mean[1], statistics.std[1]) == pytest.approx((honesty.mean(), honesty.std()))
    assert statistics.count == (126, 126, 127, 126)


def test_training_reads_its_statistics_from_the_training_split_alone(tokenizer):
    recipe = load_recipe("experiments_tiny", ["data.planted.num_train_pairs=50", "data.planted.num_heldout_pairs=40"])
    data = load_data(recipe)
    elsewhere = [replace(p, scores_chosen=dict.fromkeys(OBJECTIVES, 5.0)) for p in data.heldout_pairs]
    trained, other = (RewardData.of(recipe, one, tokenizer) for one in (data, replace(data, heldout_pairs=elsewhere)))
    assert trained.statistics == other.statistics == MixtureStatistics.of(data.train_pairs, OBJECTIVES)


def test_a_score_that_never_changes_is_found_in_its_source_and_one_annotation_is_no_proof(world):
    pair = world.train_pairs()[0]
    pairs = [
        replace(pair, source="a", scores_chosen={"x": 3.0, "y": 0.0}, scores_rejected={"x": 3.0, "y": 2.0}),
        replace(pair, source="a", scores_chosen={"x": 3.0, "z": 1.0}, scores_rejected=None),
        replace(pair, source="b", scores_chosen={"x": 2.0}, scores_rejected={"x": 4.0}),
    ]
    assert constant_scores(pairs) == {("a", "x"): 3.0}


def test_scores_on_another_scale_than_the_saved_statistics_are_refused(world):
    statistics = ScoreStatistics.of(world.train_pairs(), OBJECTIVES)
    mean, std = statistics.mean, statistics.std
    statistics.require_scale_of(mean, std, place="mine.jsonl")
    statistics.require_scale_of((), (), place="a model that was trained without scores")
    for factor in (0.25, 10.0):  # as if the model had been trained on 0-1, or on 0-50
        other = tuple(factor * m for m in mean), tuple(factor * s for s in std)
        with pytest.raises(DataError, match=r"mine.jsonl: the scores of 'helpfulness' .*another scale"):
            statistics.require_scale_of(*other, place="mine.jsonl")
    shifted = ScoreStatistics.of(world.train_pairs()[:10], OBJECTIVES)
    shifted.require_scale_of([m + 100 for m in mean], std, place="20 scores say too little")


def test_flipped_labels_swap_responses_with_their_scores_and_smaller_shares_lie_in_larger_ones(world):
    pair = world.train_pairs()[0]
    pairs = [replace(pair, id=str(i)) for i in range(2000)]
    some, more = (with_flipped_labels(pairs, share, seed=0) for share in (0.1, 0.3))
    flipped = [{i for i, (a, b) in enumerate(zip(pairs, side, strict=True)) if a != b} for side in (some, more)]
    assert flipped[0] < flipped[1]
    assert len(flipped[0]) == pytest.approx(200, abs=54)  # four standard deviations, sqrt(2000 * .1 * .9) = 13.4
    first = some[min(flipped[0])]
    assert (first.chosen, first.scores_chosen) == (pairs[0].rejected, pairs[0].scores_rejected)
    assert with_flipped_labels(pairs, 0.0, seed=0) == pairs
