"""Log-probabilities and entropy of tokens, without a float32 copy of all logits."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def token_logprobs_and_entropy(
    hidden: torch.Tensor,
    lm_head: torch.nn.Module,
    token_ids: torch.Tensor,
    *,
    temperature: float,
    chunk_size: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(a_n | s_n) and H[pi(. | s_n)] for N positions, in float32.

    pi = softmax(lm_head(hidden) / temperature). Logits live one chunk of positions at a time and are recomputed in
    the backward pass, so the peak is [chunk_size, V] instead of [N, V].

    Args:
        hidden: [N, H] hidden states that predict the tokens.
        lm_head: maps [n, H] to logits [n, V].
        token_ids: [N] int64.
        temperature: the temperature the tokens were sampled at, > 0.
        chunk_size: positions per chunk.

    Returns:
        logprobs [N] and entropies [N] in nats. Gradients flow through the logprobs; the entropy is a diagnostic.
    """

    def chunk(h: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits_to_logprobs_and_entropy(lm_head(h), ids, temperature=temperature)

    pieces = [
        checkpoint(chunk, h, ids, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, ids)
        for h, ids in zip(hidden.split(chunk_size), token_ids.split(chunk_size), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def logits_to_logprobs_and_entropy(
    logits: torch.Tensor, token_ids: torch.Tensor, *, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, V] logits and [n] tokens to float32 logprobs [n] and entropies [n] of softmax(logits / temperature).

    The entropies are detached.
    """
    log_pi = F.log_softmax(logits.float() / temperature, dim=-1)
    with torch.no_grad():
        entropy = -(log_pi.exp() * log_pi).sum(-1)
    return log_pi.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy
