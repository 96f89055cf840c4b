from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.data.chat import encode_prompt, encode_response
from pipeline.data.chat_rendering import require_chat_template
from pipeline.data.collate import PairCollator, objective_truth, tokenise_pairs
from pipeline.data.planted import OBJECTIVES
from pipeline.data.score_statistics import MixtureStatistics, ScoreStatistics
from pipeline.errors import DataError


def test_a_batch_holds_each_prompt_once_then_the_chosen_and_the_rejected_response(world, tokenizer):
    pairs = tokenise_pairs(world.train_pairs()[:3], tokenizer, max_length=128, drop_too_long=True)
    statistics = MixtureStatistics.of(world.train_pairs(), OBJECTIVES)
    collate = PairCollator(statistics=statistics, temperature=1.0, seed=0)
    batch = collate(pairs, step=4)
    for b in range(3):
        assert batch.pairs[b].prompt_ids == encode_prompt(tokenizer, pairs[b].pair.prompt)
        chosen, rejected = batch.pairs[b].response_ids
        assert chosen == encode_response(tokenizer, pairs[b].pair.chosen)
        assert rejected == encode_response(tokenizer, pairs[b].pair.rejected)
        assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
    torch.testing.assert_close(batch.target.sum(-1), torch.ones(3))
    assert torch.equal(batch.noise_seeds, collate(pairs, step=4).noise_seeds)
    assert not torch.equal(batch.noise_seeds, collate(pairs, step=5).noise_seeds)


def test_a_batch_holds_the_standardised_scores_of_both_responses_and_the_margins(world, tokenizer):
    pairs = tokenise_pairs(world.train_pairs()[:2], tokenizer, max_length=128, drop_too_long=True)
    statistics = ScoreStatistics(objectives=("honesty", "safety"), mean=(3.0, 2.0), std=(2.0, 1.0), count=(4, 4))
    annotated = replace(
        pairs[0].pair, scores_chosen={"honesty": 5.0, "safety": 2.0}, scores_rejected={"safety": 4.0}, margin=1.5
    )
    bare = replace(pairs[1].pair, scores_chosen=None, scores_rejected=None, margin=None)
    rows = [replace(row, pair=pair) for row, pair in zip(pairs, (annotated, bare), strict=True)]
    batch = PairCollator(statistics=MixtureStatistics(sources={"planted": statistics}), temperature=1.0, seed=0)(
        rows, 0
    )
    assert batch.scores.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]
    assert batch.score_mask.tolist() == [[True, True], [False, False], [False, True], [False, False]]
    assert batch.margins[0].item() == 1.5
    assert batch.margins[1].isnan()


def test_long_pairs_are_dropped_in_training_and_cut_from_the_left_in_evaluation(world, tokenizer):
    [pair] = world.train_pairs()[:1]
    [whole] = tokenise_pairs([pair], tokenizer, max_length=128, drop_too_long=True)
    limit = len(whole.tokens.prompt_ids) + max(map(len, whole.tokens.response_ids)) - 3
    with pytest.raises(DataError, match=f"none of 1 pairs fits in reward.max_length = {limit}"):
        tokenise_pairs([pair], tokenizer, max_length=limit, drop_too_long=True)
    [cut] = tokenise_pairs([pair], tokenizer, max_length=limit, drop_too_long=False)
    assert cut.tokens.prompt_ids == whole.tokens.prompt_ids[3:]
    assert cut.tokens.response_ids == whole.tokens.response_ids


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, name_or_path="bare")
    with pytest.raises(DataError, match="'bare' has no chat template"):
        require_chat_template(bare)


def test_the_truth_of_pairs_is_that_of_the_gold_annotator(world):
    pairs = world.heldout_pairs()[:3]
    truth = objective_truth(world.gold, pairs, OBJECTIVES)
    assert (truth.weights.shape, truth.scores.shape) == ((3, 4), (6, 4))
    assert truth.weights.sum(1).tolist() == pytest.approx([1.0] * 3)
    # Held-out labels are clean: the chosen response has the higher true reward.
    for row, pair in enumerate(pairs):
        rewards = [float(truth.weights[row] @ truth.scores[r]) for r in (row, 3 + row)]
        assert rewards[0] > rewards[1]
        assert rewards == pytest.approx([world.gold.reward(pair.prompt, y) for y in (pair.chosen, pair.rejected)])
