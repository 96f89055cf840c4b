"""Alarms on the held-out metrics of direct alignment."""

from __future__ import annotations

from pipeline.evaluation.reward_alarms import Alarm

FAR_NATS_PER_TOKEN = 0.5
"""A response of 200 tokens is then e^100 times less likely than before."""

LENGTH_CORRELATION = 0.8
"""Of difficulties with lengths; in the planted world 0.96 went with a policy that lost to its start."""

DIFFICULTY_ALARMS = (
    Alarm(
        "difficulty_is_length",
        ("difficulty/length_correlation",),
        lambda correlation: abs(correlation) > LENGTH_CORRELATION,
        "the difficulty of a pair is nearly the difference of its responses in length, so the easiest pairs teach "
        "length. Train the models of the difficulties for longer: direct.difficulty.epochs, direct.difficulty.beta.",
    ),
)

DIRECT_ALARMS = (
    Alarm(
        "likelihood_displacement",
        ("eval/chosen_change_per_token", "eval/rejected_change_per_token"),
        lambda chosen, rejected: max(chosen, rejected) < -FAR_NATS_PER_TOKEN,
        "chosen and rejected responses both became far less likely, so other responses became likely, and nobody has "
        "judged those. Lower direct.optimiser.learning_rate, raise direct.beta, or add direct.losses.likelihood.",
    ),
)
