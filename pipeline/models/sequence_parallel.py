"""Sequence parallelism: n ranks compute one packed row together, and each holds every n-th token.

Everything in a decoder but attention treats each token alone, so a rank does it for its own tokens. Attention treats
each head alone. Before it an all-to-all turns "some tokens, all heads" into "all tokens, some heads"; another one after
it turns the result back. Source: DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509, section 3.1. There a rank
holds consecutive tokens. Here it holds every n-th one, so that all ranks have an equal share of every response and of
the work of the language-model head.

Gradients. Each rank computes the same loss, from numbers that were summed over its group, and one rank of the group
counts it (`own_micro_batches`). Each collective has its exact adjoint as backward pass. So the gradients of all ranks
add up to that of the loss, whichever parameters a rank used.

DeepSpeed's own classes do not fit. `DistributedAttention` refuses fewer key-value heads than ranks.
`UlyssesSPAttentionHF` belongs to a model for good, but here the same model also runs whole rows (the probes of the
numerics gate), and it gathers the positions in every layer. Both exchange query, key and value one after the other.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch


class SequenceGroup(Protocol):
    """n ranks that compute one row together, seen from one of them."""

    @property
    def size(self) -> int:
        """n."""

    @property
    def rank(self) -> int:
        """This rank's number in the group."""

    def all_to_all(self, pieces: torch.Tensor) -> torch.Tensor:
        """[n, ...], contiguous: piece i goes to rank i. Returns the pieces that arrive, in rank order."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over the group, equal on every rank; leaves `tensor` as it is."""


def sum_over(group: SequenceGroup, tensor: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over the group, with gradient."""
    total: torch.Tensor = _Sum.apply(tensor, group)
    return total


def to_own_heads(
    group: SequenceGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All heads of t own tokens to h / n heads of all n t tokens.

    Rank r gets the query heads r h / n to (r + 1) h / n - 1. Where n does not divide the key-value heads, each is
    repeated just so often that it does; every query head then still meets its own.

    Args:
        query: [1, h, t, D], where n divides h.
        key, value: [1, key-value heads, t, D].

    Returns:
        The three as [1, their heads / n, n t, D].
    """
    n, (_, _, t, _) = group.size, query.shape
    repeats = n // math.gcd(n, key.shape[1])
    tensors = (query, key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1))
    pieces = torch.cat([x.reshape(n, -1) for x in tensors], dim=1)  # one exchange for all three
    parts = _AllToAll.apply(pieces, group).split([x.numel() // n for x in tensors], dim=1)
    # Token i of rank r is token i n + r of the row.
    query, key, value = (
        part.view(n, -1, t, x.shape[3]).permute(1, 2, 0, 3).reshape(1, -1, n * t, x.shape[3])
        for part, x in zip(parts, tensors, strict=True)
    )
    return query, key, value


def to_own_tokens(group: SequenceGroup, attended: torch.Tensor) -> torch.Tensor:
    """[1, n t, h / n, D] of all tokens to [1, t, h, D] of the own ones: the way back from `to_own_heads`."""
    n, (_, num_tokens, heads, width) = group.size, attended.shape
    pieces = attended.view(num_tokens // n, n, heads, width).transpose(0, 1)
    arrived: torch.Tensor = _AllToAll.apply(pieces, group)
    return arrived.transpose(0, 1).reshape(1, num_tokens // n, n * heads, width)


class _AllToAll(torch.autograd.Function):
    """y_r[s] = x_s[r]  for ranks r and s;  dx_s[r] = dy_r[s], which is an all-to-all again."""

    @staticmethod
    def forward(ctx: Any, pieces: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.group = group
        return group.all_to_all(pieces.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.all_to_all(gradients[0].contiguous()), None


class _Sum(torch.autograd.Function):
    """y_r = sum_s x_s  for ranks r;  dx_s = sum_r dy_r."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.group = group
        return group.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.sum(gradients[0]), None
