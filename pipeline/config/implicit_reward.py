"""The methods whose policies imply a reward."""

from __future__ import annotations

from typing import Literal

ImplicitRewardName = Literal[
    "dpo", "ipo", "ipo_mean", "kto", "wpo", "selective_dpo", "beta_dpo", "simpo", "cpo", "orpo"
]
"""A method of direct alignment; "ipo_mean" is the length-normalised form of IPO."""
