"""What the name of an alignment algorithm stands for: its standard values of sections of `alignment`.

Algorithms of the PPO family are one update (`pipeline/learning/ppo_learner.py`) with values of `kl` and `ppo`. They
differ in how advantages come from scored rollouts, in the loss of a token and in how tokens are averaged. Methods of
direct alignment are another update (`pipeline/learning/direct_trainer.py`) with values of `direct`.

A name fills in those choices before the recipe is read. What a recipe writes wins, and the printed configuration shows
what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel

PolicyGradientAlgorithm = Literal["ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus"]
DirectAlgorithm = Literal["dpo", "ipo", "kto", "simpo", "cpo", "orpo", "wpo", "selective_dpo", "beta_dpo", "raft"]
Algorithm = Literal[PolicyGradientAlgorithm, DirectAlgorithm]

DIRECT = frozenset(get_args(DirectAlgorithm))

_CRITIC_FREE_POLICY = {"learning_rate": 1e-6}
"""Values that DeepSeekMath, DAPO, Dr. GRPO and TRL's trainers share."""

STANDARD_VALUES: Mapping[str, Mapping[str, Any]] = {
    # Schulman et al. 2017, arXiv:1707.06347. The defaults of the schema.
    "ppo": {},
    # Shao et al. 2024, arXiv:2402.03300: KL in the loss, beta 0.04.
    "grpo": {
        "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.04},
        "ppo": {
            "advantages": "group_zscore",
            "aggregation": "sequence_mean",
            "whiten_advantages": False,
            "policy": _CRITIC_FREE_POLICY,
        },
    },
    # Liu et al. 2025, arXiv:2503.20783: neither divides by the group's deviation nor by the response's length; no KL.
    "dr_grpo": {
        "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.0},
        "ppo": {
            "advantages": "group_centred",
            "aggregation": "fixed_length",
            "whiten_advantages": False,
            "policy": _CRITIC_FREE_POLICY,
        },
    },
    # Yu et al. 2025, arXiv:2503.14476: clip-higher, token mean, overlong penalty over the last fifth, no KL.
    "dapo": {
        "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.0},
        "ppo": {
            "advantages": "group_zscore",
            "aggregation": "token_mean",
            "clip_range": 0.2,
            "clip_range_high": 0.28,
            "overlong_buffer": 0.2,
            "missing_eos_penalty": 0.0,
            "drop_uniform_groups": True,
            "whiten_advantages": False,
            "policy": _CRITIC_FREE_POLICY,
        },
    },
    # Zheng et al. 2025, arXiv:2507.18071: a ratio per response, so a clip range per response. No KL.
    "gspo": {
        "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.0},
        "ppo": {
            "advantages": "group_zscore",
            "ratio": "geometric_mean",
            "aggregation": "sequence_mean",
            "clip_range": 3e-4,
            "clip_range_high": 4e-4,
            "whiten_advantages": False,
            "policy": _CRITIC_FREE_POLICY,
        },
    },
    # MiniMax 2025, arXiv:2506.13585: no bound below, no KL; the bound of 5 above is ScaleRL's, arXiv:2510.13786.
    "cispo": {
        "kl": {"place": "loss", "estimator": "k3", "coefficient": 0.0},
        "ppo": {
            "advantages": "group_zscore",
            "surrogate": "cispo",
            "aggregation": "token_mean",
            "clip_range": 1.0,
            "clip_range_high": 4.0,
            "whiten_advantages": False,
            "policy": _CRITIC_FREE_POLICY,
        },
    },
    # Ahmadian et al. 2024, arXiv:2402.14740: a response is one action; KL in its reward (beta 0.05 as in TRL).
    "rloo": {
        "kl": {"place": "reward", "estimator": "k1", "coefficient": 0.05},
        "ppo": {
            "advantages": "leave_one_out",
            "ratio": "product",
            "aggregation": "sequence_mean",
            "whiten_advantages": False,
            "policy": _CRITIC_FREE_POLICY,
        },
    },
    # Hu et al. 2025, arXiv:2501.03262: PPO without its critic, whitened over the batch; KL k1 in the token rewards.
    "reinforce_plus_plus": {"ppo": {"advantages": "rewards_to_go"}},
    # ---- direct alignment
    # Rafailov et al. 2023, arXiv:2305.18290. The defaults of the schema.
    "dpo": {},
    # Azar et al. 2023, arXiv:2310.12036: sums over tokens, as in the paper. TRL has means (length_normalised).
    "ipo": {"direct": {"losses": {"sigmoid": 0.0, "squared": 1.0}}},
    # Ethayarajh et al. 2024, arXiv:2402.01306.
    "kto": {"direct": {"losses": {"sigmoid": 0.0, "kto": 1.0}}},
    # Meng et al. 2024, arXiv:2405.14734: beta 2.5 and gamma / beta = 0.5.
    "simpo": {
        "direct": {
            "reference": False,
            "length_normalised": True,
            "beta": 2.5,
            "target_margin": 1.25,
            "optimiser": {"learning_rate": 6e-7},
        }
    },
    # Xu et al. 2024, arXiv:2401.08417: no reference, and the likelihood of the chosen response beside the preference.
    "cpo": {"direct": {"reference": False, "losses": {"likelihood": 1.0}}},
    # Hong et al. 2024, arXiv:2403.07691: lambda 0.1.
    "orpo": {
        "direct": {
            "reference": False,
            "length_normalised": True,
            "beta": 1.0,
            "losses": {"sigmoid": 0.0, "odds_ratio": 0.1, "likelihood": 1.0},
            "optimiser": {"learning_rate": 8e-6},
        }
    },
    # Zhou et al. 2024, arXiv:2406.11827.
    "wpo": {"direct": {"weighting": "policy", "beta": 0.01, "epochs": 2, "optimiser": {"learning_rate": 1e-6}}},
    # Gao et al. 2025 and its code: the easiest half, from easy to hard.
    "selective_dpo": {
        "direct": {
            "order": "easy_first",
            "keep_easiest": 0.5,
            "beta": 0.01,
            "optimiser": {"learning_rate": 8e-7},
        }
    },
    # Wu et al. 2024, arXiv:2407.08639.
    "beta_dpo": {"direct": {"dynamic_beta": {}}},
    # Dong et al. 2023, arXiv:2304.06767: imitates the best of the policy's own responses.
    "raft": {
        "pairs": "policy",
        "direct": {
            "reference": False,
            "beta": 1.0,
            "losses": {"sigmoid": 0.0, "likelihood": 1.0},
            "optimiser": {"learning_rate": 1e-6},
        },
    },
}


def with_standard_values(written: Any) -> Any:
    """The values of an `alignment` section on top of those its algorithm stands for."""
    if not isinstance(written, Mapping):
        return written
    # An unknown name has no values; the schema says which names there are.
    standard = STANDARD_VALUES.get(str(written.get("algorithm", "ppo")), {})
    merged = _overlay(standard, written)
    direct, standard_direct = written.get("direct"), standard.get("direct", {})
    # Steps that the recipe writes say how long to train, in place of the epochs of the algorithm.
    if (
        isinstance(direct, Mapping)
        and direct.get("num_steps") is not None
        and "epochs" in standard_direct.keys() - direct
    ):
        merged["direct"] = {**merged["direct"], "epochs": None}
    return merged


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key, section in below.items():
        written = merged[key]
        if isinstance(written, BaseModel):
            written = written.model_dump(exclude_unset=True)
        if isinstance(section, Mapping) and isinstance(written, Mapping):
            merged[key] = _overlay(section, written)
    return merged
