"""Log-probabilities of tokens and a diagnostic of their distributions, without a float32 copy of all logits."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

BLOCK_BYTES = 2**24
"""Bytes of logits in one softmax: so many stay in the last cache of a CPU and in the L2 cache of a GPU."""

Diagnostic = Literal["entropy", "log_collision", "none"]
"""Of the distribution pi that a token comes from: its entropy; log sum_v pi_v^2, the logarithm of the probability that
two samples of it are equal; or nothing, which costs nothing and is 0."""


def token_logprobs_and_entropy(
    hidden: torch.Tensor,
    lm_head: torch.nn.Module,
    token_ids: torch.Tensor,
    *,
    temperature: float,
    most_positions: int = 0,
    chunk_size: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs` with the entropies H[pi(. | s_n)]."""
    return token_logprobs(
        hidden,
        lm_head,
        token_ids,
        temperature=temperature,
        most_positions=most_positions,
        chunk_size=chunk_size,
        diagnostic="entropy",
    )


def token_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.nn.Module,
    token_ids: torch.Tensor,
    *,
    temperature: float,
    most_positions: int = 0,
    chunk_size: int = 2048,
    diagnostic: Diagnostic,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(a_n | s_n) and a diagnostic of pi(. | s_n) for N positions, in float32.

    pi = softmax(lm_head(hidden) / temperature). Logits live one chunk of positions at a time, so the peak is
    [chunk_size, V] instead of [N, V]. The last chunk, often the only one, keeps its probabilities for the backward
    pass, which starts with it. The chunks before it are recomputed there.

    Args:
        hidden: [N, H] hidden states that predict the tokens.
        lm_head: maps [n, H] to logits [n, V].
        token_ids: [N] int64.
        temperature: the temperature the tokens were sampled at, > 0.
        most_positions: N of the process that has most. Processes that each hold a share of the head (ZeRO-3) gather it
            at every call, so all must make the same number of calls.
        chunk_size: positions per chunk, at most.

    Returns:
        logprobs [N] and diagnostics [N] in nats. Gradients flow through the logprobs alone.
    """

    def chunk(h: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return overwrite_logits(lm_head(h), ids, temperature=temperature, diagnostic=diagnostic)

    chunks = max(1, math.ceil(max(len(hidden), most_positions) / chunk_size))
    *recomputed, last = zip(hidden.tensor_split(chunks), token_ids.tensor_split(chunks), strict=True)
    pieces = [
        checkpoint(chunk, h, ids, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, ids)
        for h, ids in recomputed
    ]
    logprobs, diagnostics = zip(*pieces, chunk(*last), strict=True)
    return torch.cat(logprobs), torch.cat(diagnostics)


def overwrite_logits(
    logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float, diagnostic: Diagnostic = "entropy"
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] logits and [n] tokens to float32 logprobs [n] and diagnostics [n] of softmax(logits / temperature).

    The diagnostics are detached. Float32 logits are lost: their memory becomes the probabilities, and in the backward
    pass the gradient. Pass none that anything else will read.
    """
    logprobs, diagnostics = _LogprobsAndDiagnostic.apply(logits, token_ids, temperature, diagnostic)
    return logprobs, diagnostics


class _LogprobsAndDiagnostic(torch.autograd.Function):
    """With x = logits / temperature and pi = softmax(x):

        log pi(a) = x_a - log sum_v exp(x_v),      H = log sum_v exp(x_v) - sum_v pi_v x_v,
        d log pi(a) / d logits_v = (1[v = a] - pi_v) / temperature

    As composed operations this would read and write memory of the size of the logits a dozen times.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, token_ids: torch.Tensor, temperature: float, diagnostic: Diagnostic
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = logits.detach().float()
        rows = max(1, BLOCK_BYTES // (4 * x.shape[-1]))
        scratch = torch.empty_like(x[:rows])
        logprobs, diagnostics = [], []
        for block, ids in zip(x.split(rows), token_ids.split(rows), strict=True):
            if temperature != 1.0:
                block /= temperature
            block -= block.amax(-1, keepdim=True)
            pi = torch.exp(block, out=scratch[: len(block)])
            total = pi.sum(-1, keepdim=True)
            pi /= total
            log_total = total.log().squeeze(-1)
            logprobs.append(block.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - log_total)
            if diagnostic == "entropy":
                block *= pi
                diagnostics.append(log_total - block.sum(-1))
            block.copy_(pi)
            if diagnostic == "log_collision":
                diagnostics.append(pi.square_().sum(-1).log())
        logprob = torch.cat(logprobs)
        measured = torch.cat(diagnostics) if diagnostics else torch.zeros_like(logprob)
        ctx.save_for_backward(x, token_ids)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(measured)
        return logprob, measured

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        pi, token_ids = ctx.saved_tensors
        gradient = (gradients[0] / ctx.temperature).unsqueeze(-1)
        # In place: a second backward pass through the same graph is refused by autograd, as it must be.
        pi *= -gradient
        pi.scatter_add_(-1, token_ids.unsqueeze(-1), gradient)
        return pi.to(ctx.dtype), None, None, None
