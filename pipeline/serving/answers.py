"""From the scores of a model to the answers of the protocol, for the service and for Python alike."""

from __future__ import annotations

from pipeline.objectives.reward_comparison import compare_rewards, relative_contributions
from pipeline.records import RewardScore
from pipeline.serving.protocol import CompareAnswer, ExplainedReward, ModelDescription


def explained_reward(model: ModelDescription, score: RewardScore) -> ExplainedReward:
    """The reward of one response with its reasons by the names of the objectives."""
    # A Bradley-Terry model gives no weights, a decoder that is a network no scores: those dicts are empty.
    names = model.objectives
    weights = dict(zip(names, score.objective_weights, strict=False))
    scores = dict(zip(names, score.objective_scores, strict=False))
    return ExplainedReward(
        reward=score.mean,
        reward_std=score.std,
        concentration=score.concentration,
        objective_weights=weights,
        objective_scores=scores,
        ratings={
            name: statistics.mean + statistics.std * scores[name] / model.scale
            for name, statistics in model.objective_statistics.items()
            if name in scores
        },
        contributions=contributions(model, score),
        deviations=list(score.deviations),
        temperature=score.temperature,
    )


def contributions(model: ModelDescription, score: RewardScore) -> dict[str, float]:
    """Objective -> what it adds to a reward above that of the mean held-out response."""
    relative = relative_contributions(score, tuple(model.mean_contributions.values()))
    return dict(zip(model.objectives, relative, strict=False))


def compare_answer(model: ModelDescription, a: RewardScore, b: RewardScore) -> CompareAnswer:
    """Which of two responses to one prompt is better. Only a verified objective is given as the reason."""
    result = compare_rewards(a, b)
    deciding = None if result.deciding is None else model.objectives[result.deciding]
    return CompareAnswer(
        model_fingerprint=model.model_fingerprint,
        probability=result.probability,
        preferred="tie" if result.margin == 0.0 else "a" if result.margin > 0.0 else "b",
        confident=result.is_confident(model.answer_threshold),
        margin=result.margin,
        margin_std=result.margin_std,
        contributions=dict(zip(model.objectives, result.contributions, strict=False)),
        decided_by=deciding if deciding in model.verified_objectives else None,
        a=explained_reward(model, a),
        b=explained_reward(model, b),
    )
