"""Which parameters learn at which rate (docs/method.md section 14)."""

from __future__ import annotations

from torch import nn

from pipeline.config.alignment import PPOConfig
from pipeline.config.models import OptimiserConfig
from pipeline.learning.engine import ParameterGroup
from pipeline.models.critic import PolicyWithCritic

POLICY = "policy"


def parameter_groups(
    backbone: nn.Module,
    heads: nn.Module | None,
    optimiser: OptimiserConfig,
    *,
    head_learning_rate: float,
    name: str = "backbone",
) -> list[ParameterGroup]:
    """The trainable parameters: the backbone's with weight decay, the heads' at their own rate without.

    Args:
        name: names the backbone's group.
    """
    groups = [
        ParameterGroup(
            name=name,
            parameters=tuple(p for p in backbone.parameters() if p.requires_grad),
            learning_rate=optimiser.learning_rate,
            weight_decay=optimiser.weight_decay,
        )
    ]
    if heads is not None:
        groups.append(
            ParameterGroup(
                name="heads",
                parameters=tuple(p for p in heads.parameters() if p.requires_grad),
                learning_rate=head_learning_rate,
                weight_decay=0.0,
            )
        )
    return [group for group in groups if group.parameters]


def policy_parameter_groups(model: PolicyWithCritic, ppo: PPOConfig) -> list[ParameterGroup]:
    """The policy at its own learning rate, in a group named `POLICY`; value head and critic at the critic's."""
    rate = ppo.critic_learning_rate
    groups = parameter_groups(model.policy, model.value_head, ppo.policy, head_learning_rate=rate, name=POLICY)
    if model.critic is not None:
        critic_optimiser = ppo.policy.model_copy(update={"learning_rate": rate})
        groups += parameter_groups(model.critic, None, critic_optimiser, head_learning_rate=rate, name="critic")
    return groups
