"""The experience of a step from its scores, as the loop of alignment makes it."""

from pipeline.columns import EvaluatedRollouts
from pipeline.learning.experience import build_experience
from pipeline.learning.response_evaluations import response_evaluations
from pipeline.learning.rewarded_rows import reward_rows


def experience_of_step(rollouts, scores, evaluations, config, *, kl_coefficient, reward_scale):
    """The experience, and the metrics of its rollouts and of their tokens."""
    response_evaluations(rollouts, evaluations)
    rewarded, metrics = reward_rows(rollouts, scores, config, reward_scale)
    evaluated = EvaluatedRollouts(rollouts=rollouts, tokens=evaluations)
    experience, measured = build_experience(evaluated, rewarded, config, kl_coefficient=kl_coefficient)
    return experience, metrics | measured
