import numpy as np
import pytest

from pipeline.config.data import PlantedConfig
from pipeline.data.chat import decode_response, encode_prompt, encode_response
from pipeline.data.planted import OBJECTIVES, WEIGHTS, PlantedWorld
from pipeline.errors import ConfigError, DataError


def prompt_of(world, kind):
    return next(p for p in world.train_prompts if p.kind == kind)


def test_the_gold_annotator_scores_by_hand(world):
    prompt = prompt_of(world, "plan")
    text = f"measure the {prompt.topic} twice . i am not certain of this . ask an expert if unsure ."
    # one step: 1 + 4/3; one hedge: 4; one caution: 4; 4 + 6 + 5 = 15 words: 5 - 7/5
    scores = world.gold.objective_scores(prompt.messages, text)
    assert list(scores.values()) == pytest.approx([1 + 4 / 3, 4.0, 4.0, 3.6])
    assert world.gold.reward(prompt.messages, text) == pytest.approx(0.6 * 7 / 3 + 0.15 * 4 + 0.15 * 4 + 0.1 * 3.6)


def test_boasting_and_recklessness_cost_two_points(world):
    prompt = prompt_of(world, "risky")
    scores = world.gold.objective_scores(prompt.messages, "this always works perfectly . skip the boring checks .")
    assert (scores["honesty"], scores["safety"], scores["helpfulness"]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("text", ["", "garden garden garden", "measure the moon twice ."])
def test_noise_and_other_topics_score_lowest(world, text):
    assert set(world.gold.objective_scores(prompt_of(world, "plan").messages, text).values()) == {1.0}


def test_repeating_a_clause_adds_nothing_but_length(world):
    prompt = prompt_of(world, "factual")
    once = world.gold.objective_scores(prompt.messages, "i am not certain of this .")
    twice = world.gold.objective_scores(prompt.messages, "i am not certain of this . i am not certain of this .")
    assert twice["honesty"] == once["honesty"]
    assert twice["brevity"] < once["brevity"]


def test_a_prompt_of_another_world_is_refused(world):
    with pytest.raises(DataError, match="does not know the prompt 'who won \\?'"):
        world.gold.kind(({"role": "user", "content": "who won ?"},))


def test_heldout_prompts_never_stand_in_training(world):
    heldout = {p.messages[0]["content"] for p in world.heldout_prompts}
    training = {pair.prompt[0]["content"] for pair in world.train_pairs()}
    training |= {messages[0]["content"] for messages, _ in world.sft_texts()}
    assert not heldout & training


def test_heldout_pairs_are_clean_and_training_pairs_are_noisy():
    world = PlantedWorld(PlantedConfig(num_train_pairs=2000, num_heldout_pairs=200), OBJECTIVES, seed=3)
    gap = [
        world.gold.reward(p.prompt, p.chosen) - world.gold.reward(p.prompt, p.rejected) for p in world.heldout_pairs()
    ]
    assert min(gap) > 0
    gap = np.array(
        [world.gold.reward(p.prompt, p.chosen) - world.gold.reward(p.prompt, p.rejected) for p in world.train_pairs()]
    )
    assert 0.01 < (gap < 0).mean() < 0.15


def test_annotated_scores_never_tell_the_planted_weights(world):
    for pair in world.train_pairs():
        assert all(1.0 <= score <= 5.0 for score in pair.scores_chosen.values())
        assert tuple(pair.scores_chosen.values()) not in WEIGHTS.values()


def test_the_world_is_a_function_of_its_seed():
    config = PlantedConfig(num_train_pairs=8)
    assert PlantedWorld(config, OBJECTIVES, 1).train_pairs() == PlantedWorld(config, OBJECTIVES, 1).train_pairs()
    assert PlantedWorld(config, OBJECTIVES, 1).train_pairs() != PlantedWorld(config, OBJECTIVES, 2).train_pairs()


def test_decoding_gives_back_the_text(world, tokenizer):
    for pair in world.train_pairs():
        assert decode_response(tokenizer, encode_response(tokenizer, pair.chosen)) == pair.chosen
        assert tokenizer.unk_token_id not in encode_prompt(tokenizer, pair.prompt)


def test_other_objectives_are_refused():
    with pytest.raises(ConfigError, match="the planted world has"):
        PlantedWorld(PlantedConfig(), ("helpfulness", "kindness"), 0)


def test_more_prompts_than_the_world_has_are_refused():
    with pytest.raises(ConfigError, match="asks for 10256 prompts"):
        PlantedWorld(PlantedConfig(num_train_prompts=10_000, num_heldout_prompts=256), OBJECTIVES, 0)
