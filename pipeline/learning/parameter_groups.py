"""Which parameters learn at which rate (vrm_spec section 10)."""

from __future__ import annotations

from torch import nn

from pipeline.config.schema import OptimiserConfig
from pipeline.learning.engine import ParameterGroup


def parameter_groups(
    backbone: nn.Module, heads: nn.Module | None, optimiser: OptimiserConfig, *, head_learning_rate: float
) -> list[ParameterGroup]:
    """The trainable parameters: the backbone's with weight decay, the heads' at their own rate without."""
    groups = [
        ParameterGroup(
            parameters=tuple(p for p in backbone.parameters() if p.requires_grad),
            learning_rate=optimiser.learning_rate,
            weight_decay=optimiser.weight_decay,
        )
    ]
    if heads is not None:
        groups.append(
            ParameterGroup(
                parameters=tuple(p for p in heads.parameters() if p.requires_grad),
                learning_rate=head_learning_rate,
                weight_decay=0.0,
            )
        )
    return [group for group in groups if group.parameters]
