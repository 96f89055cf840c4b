"""The judge: a second reward model, on prompts of its own, which has its say on the finished answers."""

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.reward import JudgeConfig
from pipeline.data.preferences import normalised_prompt
from pipeline.data.run_data import load_data, pairs_of_the_judge, pairs_of_the_reward_model
from pipeline.errors import ConfigError, DataError
from pipeline.loops.benchmark import benchmark_stage, drawn, judge_answers
from pipeline.loops.reward import as_judge, judge_stage, reward_stage
from pipeline.records import Answer, Prompt, RewardScore

SMALL = ("data.planted.num_train_pairs=200", "data.planted.num_heldout_pairs=16", "data.planted.num_train_prompts=100")
WITH_JUDGE = (*SMALL, "judge.head=gate", "judge.seed=7", "judge.share=0.3")


def prompts_of(pairs):
    return {normalised_prompt(pair.prompt) for pair in pairs}


def test_judge_and_reward_model_share_no_training_prompt_and_the_same_held_out_pairs():
    recipe = load_recipe("tiny", WITH_JUDGE)
    data = load_data(recipe)
    ours, judges = pairs_of_the_reward_model(data, recipe.judge), pairs_of_the_judge(data, recipe.judge)
    assert len(ours.train_pairs) + len(judges.train_pairs) == 200
    assert not prompts_of(ours.train_pairs) & prompts_of(judges.train_pairs)
    assert 20 < len(judges.train_pairs) < 110  # 0.3 of the prompts
    assert ours.heldout_pairs == judges.heldout_pairs == data.heldout_pairs
    assert pairs_of_the_reward_model(data, None) is data
    of_another_seed = pairs_of_the_judge(data, recipe.judge.model_copy(update={"seed": 8}))
    assert prompts_of(of_another_seed.train_pairs) != prompts_of(judges.train_pairs)


def test_a_judge_without_pairs_is_refused():
    with pytest.raises(DataError, match=r"judge\.share = 1e-09 of 200 training pairs leaves the judge none"):
        pairs_of_the_judge(load_data(load_recipe("tiny", SMALL)), JudgeConfig(share=1e-9))


def test_the_judge_is_a_stage_of_its_own_and_changes_what_depends_on_it():
    alone, judged = load_recipe("tiny", SMALL), load_recipe("tiny", WITH_JUDGE)
    assert (as_judge(judged).seed, as_judge(judged).reward.head) == (7, "gate")
    assert judge_stage(judged, "policy").name == "train_judge"
    assert reward_stage(alone, "policy").fingerprint != reward_stage(judged, "policy").fingerprint
    assert judge_stage(judged, "policy").fingerprint != reward_stage(judged, "policy").fingerprint
    read = ("policy", "aligned", "reward model")
    assert benchmark_stage(judged, *read).fingerprint != benchmark_stage(judged, *read, "judge").fingerprint
    with pytest.raises(ConfigError, match="the recipe has no judge to train"):
        as_judge(alone)


def score(mean):
    return RewardScore(mean=float(mean), std=0.0, objective_weights=(), objective_scores=())


class PrefersLongAnswers:
    def score(self, prompts, responses):
        return [score(len(response)) for response in responses]


def answers(*outputs):
    return [Answer(prompt_id="", instruction="", output=output, generator="", score=score(0)) for output in outputs]


def prompts(*identities):
    return [Prompt(id=name, messages=({"role": "user", "content": "?"},), token_ids=(1,)) for name in identities]


def test_the_judge_counts_wins_over_all_prompts_and_over_those_of_each_source():
    asked = prompts("pku/1", "pku/2", "webgpt/1", "webgpt/2")
    metrics = judge_answers(PrefersLongAnswers(), asked, answers("aa", "aa", "a", "aa"), answers("a", "a", "aa", "aa"))
    assert metrics["judge/win_rate"] == (1 + 1 + 0 + 0.5) / 4
    assert (metrics["judge/pku/win_rate"], metrics["judge/pku/prompts"]) == (1.0, 2.0)
    assert (metrics["judge/webgpt/win_rate"], metrics["judge/webgpt/ties"]) == (0.25, 0.5)
    assert metrics["judge/low"] < metrics["judge/win_rate"] < metrics["judge/high"]


def test_prompts_without_sources_are_judged_together():
    metrics = judge_answers(PrefersLongAnswers(), prompts("1", "2"), answers("aa", "a"), answers("a", "a"))
    assert metrics.keys() == {"judge/win_rate", "judge/ties", "judge/low", "judge/high"}


def test_benchmark_prompts_are_drawn_from_all_sources_and_keep_their_order():
    asked = prompts(*(f"{source}/{n}" for source in ("pku", "webgpt") for n in range(50)))
    some = drawn(asked, 40, seed=0)
    assert len(some) == 40
    assert [prompt for prompt in asked if prompt in some] == some
    assert 10 < sum(prompt.id.startswith("pku/") for prompt in some) < 30
    assert drawn(asked, 40, seed=1) != some
    assert drawn(asked, 200, seed=0) == asked
