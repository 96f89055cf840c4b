"""Pairs that are made: a chosen response against one that was chosen for another prompt."""

import json
from dataclasses import replace

import pytest

from pipeline.config.load import load_recipe
from pipeline.data.collate import TokenisedPair
from pipeline.data.run_data import load_data
from pipeline.errors import ConfigError
from pipeline.learning.reward_data import RewardData, mismatched_pairs
from pipeline.records import PreferencePair, PromptGroup


def tokenised(identity, prompt, chosen, rejected):
    """Words as tokens: every word is its own letter."""
    pair = PreferencePair(
        id=identity,
        prompt=({"role": "user", "content": prompt},),
        chosen=chosen,
        rejected=rejected,
        scores_chosen={"safety": 5.0},
        scores_rejected={"safety": 1.0},
        source="mine",
        margin=2.0,
    )
    ids = [tuple(map(ord, text)) for text in (prompt, chosen, rejected)]
    return TokenisedPair(pair=pair, tokens=PromptGroup(prompt_ids=ids[0], response_ids=(ids[1], ids[2])))


def test_a_chosen_response_is_compared_with_one_that_was_chosen_for_another_prompt():
    pairs = [tokenised("1", "p", "good", "bad"), tokenised("2", "q", "fine", "poor")]
    first, second = mismatched_pairs(pairs, {"mine": 1.0}, seed=0, max_length=5)
    assert (first.pair.chosen, first.pair.rejected, first.pair.id) == ("good", "fine", "1/mismatched")
    assert (second.pair.chosen, second.pair.rejected) == ("fine", "good")
    assert (first.pair.scores_chosen, first.pair.scores_rejected, first.pair.margin) == (None, None, None)
    assert first.tokens.prompt_ids == (ord("p"),)
    assert first.tokens.response_ids == (tuple(map(ord, "good")), tuple(map(ord, "fine")))


def test_no_response_to_the_same_prompt_none_that_is_too_long_and_no_equal_one():
    pairs = [tokenised("1", "p", "good", "bad"), tokenised("2", "p", "fine", "poor")]
    assert mismatched_pairs(pairs, {"mine": 1.0}, seed=0, max_length=99) == []
    pairs = [tokenised("1", "p", "good", "bad"), tokenised("2", "q", "longer", "poor")]
    [made] = mismatched_pairs(pairs, {"mine": 1.0}, seed=0, max_length=5)
    assert made.pair.id == "2/mismatched"
    pairs = [tokenised("1", "p", "good", "bad"), tokenised("2", "q", "good", "poor")]
    assert mismatched_pairs(pairs, {"mine": 1.0}, seed=0, max_length=99) == []


def test_a_larger_share_contains_a_smaller_one():
    pairs = [tokenised(str(i), f"p{i}", f"good{i}", "bad") for i in range(1000)]
    some, more = (
        {p.pair.id for p in mismatched_pairs(pairs, {"mine": share}, seed=0, max_length=99)} for share in (0.1, 0.4)
    )
    assert some < more
    assert len(some) == pytest.approx(100, abs=38)  # four standard deviations, sqrt(1000 * .1 * .9) = 9.5
    assert mismatched_pairs(pairs, {"mine": 0.0}, seed=0, max_length=99) == []


def test_pairs_of_other_sources_get_none_but_lend_their_responses():
    pairs = [tokenised("1", "p", "good", "bad"), tokenised("2", "q", "fine", "poor")]
    pairs[1] = replace(pairs[1], pair=replace(pairs[1].pair, source="theirs"))
    [made] = mismatched_pairs(pairs, {"mine": 1.0}, seed=0, max_length=5)
    assert (made.pair.chosen, made.pair.rejected) == ("good", "fine")


def test_made_pairs_are_trained_on_and_counted_apart(tokenizer, tmp_path):
    rows = [{"prompt": f"guide me {'at work ' * i}", "chosen": f"yes {'. ' * i}", "rejected": "no"} for i in range(40)]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row | {"scores_chosen": {"safety": 5, "honesty": 2}}) + "\n" for row in rows))
    recipe = load_recipe(
        "experiments_tiny",
        [
            f"data.sources=[{{path: {file}, mismatched_pairs: 1}}]",
            "objectives=[safety,honesty]",
            "reward.batch_pairs=8",
        ],
    )
    data = RewardData.of(recipe, load_data(recipe), tokenizer)
    compared = len(data.compared_pairs)
    assert (len(data.pairs), data.num_mismatched) == (2 * compared, compared)
    metrics = data.metrics()
    assert (metrics["data/train_pairs"], metrics["data/mismatched_pairs"]) == (compared, compared)
    assert metrics["data/source/mine/train_pairs"] == compared
    # Nobody scored them, so they supervise neither weights nor scores.
    assert data.collate(data.pairs[:compared], 0).score_mask.any()
    batch = data.collate(data.pairs[compared:], 0)
    assert not batch.target_mask.any()
    assert not batch.score_mask.any()


def test_held_out_responses_are_compared_with_those_to_other_held_out_prompts(tokenizer):
    sizes = ["data.planted.num_train_pairs=60", "data.planted.num_heldout_pairs=400"]
    recipe = load_recipe("experiments_tiny", sizes)
    data = RewardData.of(recipe, load_data(recipe), tokenizer)
    assert data.mismatched_heldout.num_pairs == len(data.mismatched_heldout_pairs) == 256
    chosen = {pair.pair.chosen: pair.pair.prompt for pair in data.heldout_pairs}
    assert all(made.pair.rejected in chosen for made in data.mismatched_heldout_pairs)
    by_id = {pair.pair.id: pair.pair for pair in data.heldout_pairs}
    for made in data.mismatched_heldout_pairs:
        original = by_id[made.pair.id.removesuffix("/mismatched")]
        assert (made.pair.prompt, made.pair.chosen) == (original.prompt, original.chosen)
    # One prompt has no other to borrow from.
    alone = replace(load_data(recipe), heldout_pairs=load_data(recipe).heldout_pairs[:1])
    assert RewardData.of(recipe, alone, tokenizer).mismatched_heldout is None


@pytest.mark.parametrize("override", ["reward.head=regression", "reward.pair_loss.form=margin"])
def test_made_pairs_have_neither_scores_nor_margins(override):
    sources = "data.sources=[{path: mine.jsonl, mismatched_pairs: 0.5}]"
    with pytest.raises(
        ConfigError, match=r"source 'mine' has mismatched_pairs = 0.5: pairs without scores and margins"
    ):
        load_recipe("experiments_tiny", [sources, override])
