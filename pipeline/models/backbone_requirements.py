"""What a decoder must do to serve here, shown by running it on a few tokens instead of by its name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.errors import CheckpointError

PROBE_LENGTH = 8
LARGEST_GAP = 1e-3
"""Relative; a suitable model shows none but rounding, an unsuitable one 0.1 and more."""


def require_causal(backbone: PreTrainedModel, checkpoint: str) -> None:
    """Refuses a backbone in which a later token changes an earlier state.

    In such a model the objective weights of a prompt would depend on the response (docs/method.md section 2).

    Raises:
        CheckpointError: an encoder, or a decoder without its causal mask.
    """
    ids = _probe(backbone)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    gap = _relative_gap(_states(backbone, ids)[:, :-1], _states(backbone, changed)[:, :-1])
    if not gap <= LARGEST_GAP:
        raise CheckpointError(
            f"{checkpoint!r} ({backbone.config.model_type}) is not a causal decoder: changing the last token changed "
            f"the states before it by {gap:.1%}. The prompt's state must not see the response, or the objective "
            "weights would depend on it. Use a decoder such as Qwen3 or Llama."
        )


def require_plain_head(model: PreTrainedModel, checkpoint: str) -> None:
    """Refuses a language model whose logits are not simply `lm_head(state)`.

    The policy's log-probabilities are computed from the states, at the response positions alone. Soft-capping (Gemma 2)
    or scaling (Granite) inside the model's own forward pass would be lost, an error of whole nats.

    Raises:
        CheckpointError: the two differ.
    """
    ids = _probe(model)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        projected = model.get_output_embeddings()(_states(model.base_model, ids))
    gap = _relative_gap(logits, projected)
    if not gap <= LARGEST_GAP:
        raise CheckpointError(
            f"{checkpoint!r} ({model.config.model_type}) changes its logits after the language-model head, by "
            f"{gap:.1%}: it caps or scales them. The policy's logits are computed without that step. "
            "Use a model with a plain head, such as Qwen3 or Llama."
        )


def linear_layers(backbone: Any) -> list[str]:
    """Names of a decoder's linear layers within a block, such as "q_proj": where adapters can go."""
    return sorted({name.rpartition(".")[2] for name, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)})


def _probe(model: PreTrainedModel) -> torch.Tensor:
    """[1, PROBE_LENGTH] token ids whose first and last differ."""
    vocabulary: Any = model.get_input_embeddings()
    device = next(model.parameters()).device
    return (torch.arange(1, PROBE_LENGTH + 1, device=device) % vocabulary.num_embeddings).unsqueeze(0)


def _states(backbone: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone(input_ids=ids, use_cache=False).last_hidden_state


def _relative_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())
