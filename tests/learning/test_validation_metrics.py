"""The numbers of a validation, by hand."""

import pytest

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.errors import NumericsError
from pipeline.learning.response_evaluations import response_evaluations
from pipeline.learning.validation_metrics import validation_metrics
from pipeline.records import Prompt, RewardScore, Rollout, TokenEvaluation


def rollout(name, logprobs, finish_reason="stop"):
    return Rollout(
        prompt=Prompt(id=name, messages=({"role": "user", "content": name},), token_ids=(1,)),
        sample_index=0,
        response_ids=(5,) * len(logprobs),
        response_text="text",
        logprobs=logprobs,
        policy_version=0,
        finish_reason=finish_reason,
    )


ROLLOUTS = [rollout("a", (-1.0, -1.0, -1.0)), rollout("b", (-1.0,), "length")]
SCORES = [
    RewardScore(mean=1.0, std=0.1, objective_weights=(0.5, 0.5), objective_scores=(3.0, -1.0)),
    RewardScore(mean=2.0, std=0.1, objective_weights=(0.5, 0.5), objective_scores=(1.0, 3.0)),
]
EVALUATIONS = [
    TokenEvaluation(logprobs=(-1.0, -2.0, -3.0), reference_logprobs=(-1.5, -2.0, -4.0), values=(0.0,) * 3),
    TokenEvaluation(logprobs=(-1.0,), reference_logprobs=(-0.5,), values=(0.0,)),
]


def measured(scores=SCORES, rollouts=ROLLOUTS, evaluations=EVALUATIONS, **changes):
    settings = {"objectives": ("helpfulness", "safety"), "gold": None, "is_greedy": False, "seed": 0}
    rollouts = Rollouts.of(rollouts)
    responses = response_evaluations(rollouts, TokenEvaluations.of(evaluations))
    return validation_metrics(rollouts, scores, responses, **(settings | changes))


def test_means_over_responses_and_the_log_ratio_summed_over_tokens():
    metrics = measured(gold=[4.0, 8.0])
    means = {name: value for name, value in metrics.items() if not name.endswith(("_low", "_high"))}
    assert means == pytest.approx(
        {
            "eval/reward": 1.5,
            "eval/objective/helpfulness": 2.0,
            "eval/objective/safety": 1.0,
            "eval/gold": 6.0,
            "eval/kl": (1.5 - 0.5) / 2,
            "eval/length": 2.0,
            "eval/ended": 0.5,
        }
    )
    # Of two prompts a bootstrap draws one of them twice in half of its draws.
    assert (metrics["eval/reward_low"], metrics["eval/reward_high"]) == (1.0, 2.0)
    assert (metrics["eval/gold_low"], metrics["eval/gold_high"]) == (4.0, 8.0)


def test_of_greedy_responses_the_ratio_is_no_kl():
    metrics = measured(is_greedy=True)
    assert metrics["eval/log_ratio"] == 0.5
    assert "eval/kl" not in metrics


def test_a_model_without_objectives_and_one_prompt_without_interval():
    plain = RewardScore(mean=1.0, std=0.0, objective_weights=(), objective_scores=())
    metrics = measured([plain], ROLLOUTS[:1], EVALUATIONS[:1])
    assert metrics == {"eval/reward": 1.0, "eval/kl": 1.5, "eval/length": 3.0, "eval/ended": 1.0}


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(NumericsError, match="prompt 'b', sample 0: 1 of 2 reward mean and std are not finite"):
        measured([SCORES[0], RewardScore(mean=float("nan"), std=0.0, objective_weights=(), objective_scores=())])
