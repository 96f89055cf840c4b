"""Prompts and their responses laid end to end: no padding, and every prompt computed once.

A causal decoder gives a prompt's tokens the same states whatever follows them, so the responses to one prompt can share
it. Chosen and rejected of a pair, or the samples of a prompt, then cost one prompt instead of one each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pipeline.errors import CheckpointError
from pipeline.models.sequence_parallel import SequenceGroup, sum_over, to_own_heads, to_own_tokens
from pipeline.records import PromptGroup

ATTENTION = "shared_prompt"

PROBE = PromptGroup(prompt_ids=(1, 2, 3), response_ids=((4, 5), (6, 7)))

LARGEST_PACKING_GAP = 0.05
"""Relative; bfloat16 rounds to 0.01, another model differs by 1."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """G groups of a prompt and its responses, end to end: T tokens, R responses, N response tokens.

    A rank holds all T tokens, or with a sequence group of n ranks every n-th one: rank r has the tokens r, r + n, ...
    Its states predict M of the N response tokens.

    Responses are numbered: the first of every group, then the second of every group, and so on. For preference pairs
    these are the chosen, then the rejected ones.
    """

    lengths: tuple[tuple[int, ...], ...]
    """For each group the number of tokens of its prompt, then of each response; the tokens lie in this order. A
    sequence group of n ranks adds a last group, of fewer than n tokens that nobody reads, where n does not divide T."""
    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64: position in prompt + response; every response continues where its prompt ended."""
    prompt_ends: torch.Tensor
    """[R] int64: index of the last prompt token of each response."""
    response_ends: torch.Tensor
    """[R] int64: index of the last token of each response."""
    response_tokens: torch.Tensor
    """[N] int64: index of every response token, response by response."""
    predictors: torch.Tensor
    """[M] int64: each token of this rank whose state predicts a response token, as an index into this rank's tokens.
    The last token of a prompt is there once for each of its responses."""
    predicted: torch.Tensor
    """[M] int64: the response token that it predicts, as an index into the N."""
    response_lengths: torch.Tensor
    """[R] int64."""
    most_response_tokens: int
    """M of the rank that has most in this forward pass: ranks that shard a vocabulary head must call it equally
    often."""
    sequence_group: SequenceGroup | None = None
    """The ranks that hold these tokens together; None: this rank has them all."""

    @property
    def targets(self) -> torch.Tensor:
        """[M] int64: the tokens that `predictors` predict."""
        return self.token_ids[self.response_tokens[self.predicted]]

    def to(self, device: torch.device | str) -> PackedTokens:
        """The same tokens on another device."""
        named: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {name: value.to(device) for name, value in named.items() if isinstance(value, torch.Tensor)}
        return replace(self, **(named | moved))


def pack(
    groups: Sequence[PromptGroup], *, most_response_tokens: int = 0, sequence_group: SequenceGroup | None = None
) -> PackedTokens:
    """Lays groups end to end; every prompt and every response holds a token at least.

    Args:
        most_response_tokens: predicted by any rank in this forward pass, where there are others.
        sequence_group: the ranks that share these tokens; each of them packs the same groups.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    responses: list[tuple[int, int, int, int]] = []  # number within its group, end of prompt, start, end
    for group in groups:
        prompt_length = len(group.prompt_ids)
        token_ids += group.prompt_ids
        positions += range(prompt_length)
        prompt_end = len(token_ids) - 1
        for number, response_ids in enumerate(group.response_ids):
            responses.append((number, prompt_end, len(token_ids), len(token_ids) + len(response_ids) - 1))
            token_ids += response_ids
            positions += range(prompt_length, prompt_length + len(response_ids))
    responses.sort(key=lambda response: response[0])  # stable: groups keep their order
    _, prompt_ends, starts, ends = zip(*responses, strict=True)
    lengths = [(len(g.prompt_ids), *map(len, g.response_ids)) for g in groups]
    n, rank = (1, 0) if sequence_group is None else (sequence_group.size, sequence_group.rank)
    filler = -len(token_ids) % n
    if filler:
        token_ids += [0] * filler
        positions += range(filler)
        lengths.append((filler,))
    # Pairs of a token and the one before it are made of the whole row, so they may lie on two ranks.
    predictors = torch.tensor([t for _, p, s, e in responses for t in (p, *range(s, e))])
    [predicted] = (predictors % n == rank).nonzero(as_tuple=True)
    return PackedTokens(
        lengths=tuple(lengths),
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        prompt_ends=torch.tensor(prompt_ends),
        response_ends=torch.tensor(ends),
        response_tokens=torch.tensor([t for s, e in zip(starts, ends, strict=True) for t in range(s, e + 1)]),
        predictors=predictors[predicted] // n,
        predicted=predicted,
        response_lengths=torch.tensor([e - s + 1 for s, e in zip(starts, ends, strict=True)]),
        most_response_tokens=max(most_response_tokens, len(predicted)),
        sequence_group=sequence_group,
    )


def in_packed_order(groups: Sequence[Sequence[Item]]) -> list[Item]:
    """One item per response, group by group, to the order in which `pack` numbers responses."""
    return [group[n] for n in range(max(map(len, groups))) for group in groups if n < len(group)]


def packed_states(backbone: PreTrainedModel, packed: PackedTokens) -> torch.Tensor:
    """[T / n, H] final-norm states of this rank's tokens, equal to those of each prompt + response run alone.

    Args:
        backbone: a decoder without its head that `use_packed_attention` has seen.
        packed: on the backbone's device; n ranks share it, or 1.
    """
    group = packed.sequence_group
    own = slice(None) if group is None else slice(group.rank, None, group.size)
    return backbone(
        input_ids=packed.token_ids[own].unsqueeze(0),
        position_ids=packed.positions[own].unsqueeze(0),
        use_cache=False,
        group_lengths=packed.lengths,
        sequence_group=group,
    ).last_hidden_state.squeeze(0)


def of_all_ranks(predicted: torch.Tensor, packed: PackedTokens) -> torch.Tensor:
    """[M] numbers, one for each of `packed.predicted`, to [N], one for each response token, on every rank."""
    if packed.sequence_group is None:
        return predicted
    whole = predicted.new_zeros(len(packed.response_tokens)).index_copy(0, packed.predicted, predicted)
    return sum_over(packed.sequence_group, whole)


def prompt_and_response_states(
    states: torch.Tensor, packed: PackedTokens, pooling: Literal["last", "mean"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, H] twice, of this rank's states: at the last prompt token of each response, and of the response.

    A sequence group sums 2 R H numbers: a rank adds 0 for what it does not hold.

    Args:
        states: as `packed_states` returns them.
        pooling: the state of a response is that of its last token, or the mean over its tokens.
    """
    group = packed.sequence_group
    prompts = _own_rows(states, packed.prompt_ends, packed)
    if pooling == "last":
        responses = _own_rows(states, packed.response_ends, packed)
    else:
        tokens, row = packed.response_tokens, torch.repeat_interleave(packed.response_lengths)
        if group is not None:
            own = tokens % group.size == group.rank
            tokens, row = tokens[own] // group.size, row[own]
        sums = states.new_zeros(len(packed.response_lengths), states.shape[1], dtype=torch.float32)
        sums = sums.index_add(0, row, states[tokens].float())
        responses = sums / packed.response_lengths.unsqueeze(1)
    return (prompts, responses) if group is None else (sum_over(group, prompts), sum_over(group, responses))


def _own_rows(states: torch.Tensor, index: torch.Tensor, packed: PackedTokens) -> torch.Tensor:
    """The states of the tokens `index` of the whole row; 0 where another rank holds the token."""
    group = packed.sequence_group
    if group is None:
        return states[index]
    return states[index // group.size] * (index % group.size == group.rank).unsqueeze(1)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes a decoder read `PackedTokens`; afterwards it cannot generate, having no cache.

    Raises:
        CheckpointError: its attention is not pluggable, or packing changes its states, because something in it besides
            attention carries information from one token to the next.
    """
    if model.config._attn_implementation == ATTENTION:
        return
    backbone: Any = model.base_model
    device = next(model.parameters()).device
    alone = [torch.tensor([[*PROBE.prompt_ids, *response]], device=device) for response in PROBE.response_ids]
    with torch.no_grad():
        expected = torch.stack([backbone(input_ids=row, use_cache=False).last_hidden_state[0, -1] for row in alone])
        try:
            model.set_attn_implementation(ATTENTION)
        except ValueError as error:
            raise CheckpointError(
                f"a {model.config.model_type} model takes no attention but its own ({error}), so sequences cannot be "
                "packed. Use a decoder such as Qwen3 or Llama."
            ) from error
        packed = pack([PROBE]).to(device)
        states = packed_states(backbone, packed)[packed.response_ends]
    gap = float((states - expected).norm() / expected.norm())
    if not gap <= LARGEST_PACKING_GAP:
        raise CheckpointError(
            f"packed sequences change the states of a {model.config.model_type} model by {gap:.1%}: something in it "
            "besides attention carries information from token to token. Use a decoder such as Qwen3 or Llama."
        )


def shared_prompt_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    group_lengths: tuple[tuple[int, ...], ...],
    sequence_group: SequenceGroup | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over packed groups. The signature is transformers': its decoders call `AttentionInterface` so.

    A prompt token sees the prompt up to itself; a response token sees its prompt and its own response up to itself.
    Each is one plain causal attention, so nothing is computed for pairs of tokens that do not see each other.

    Args:
        query: [1, heads, T / n, D], of this rank's tokens.
        key, value: [1, key-value heads, T / n, D].
        scaling: factor on the scores.
        group_lengths: `PackedTokens.lengths`.
        sequence_group: the n ranks that share the T tokens.
        dropout: probability at which attention weights are dropped.
        sliding_window: a token sees at most this many tokens, itself included; None sees all.

    Returns:
        [1, T / n, heads, D], and no weights.
    """
    if softcap is not None:
        raise CheckpointError(f"attention scores capped at {softcap} (Gemma 2) are not supported; use Qwen3 or Llama")
    # Norms and rotary angles leave float32 under autocast; the values have the dtype that is computed in.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if sequence_group is not None:
        query, key, value = to_own_heads(sequence_group, query, key, value)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # A prompt with a single response is one plain causal sequence, whichever of the two a token belongs to.
    group_lengths = tuple((sum(lengths),) if len(lengths) == 2 else lengths for lengths in group_lengths)
    flat = [length for lengths in group_lengths for length in lengths]
    pieces = iter(zip(query.split(flat, 2), key.split(flat, 2), value.split(flat, 2), strict=True))
    attended = [
        _attend(q, k, v, scaling=scaling, dropout=dropout, window=sliding_window)
        for lengths in group_lengths
        for q, k, v in _with_their_prompts(pieces, len(lengths))
    ]
    heads = torch.cat(attended, dim=2).transpose(1, 2).contiguous()
    return heads if sequence_group is None else to_own_tokens(sequence_group, heads), None


Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _with_their_prompts(pieces: Iterator[Piece], num_pieces: int) -> Iterator[Piece]:
    """The next group's prompt, then its responses with the prompt's keys and values before their own."""
    prompt_query, prompt_key, prompt_value = next(pieces)
    yield prompt_query, prompt_key, prompt_value
    for _ in range(num_pieces - 1):
        query, key, value = next(pieces)
        yield query, torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    dropout: float,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of the last positions, as many as `query` has, over all positions of `key`."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask: Any = None
    if window is not None and num_keys > window:
        distance = _distance(num_queries, num_keys, query.device)
        mask = (distance >= 0) & (distance < window)
    elif num_queries < num_keys:
        mask = _lower_right(num_queries, num_keys, on_gpu=query.is_cuda)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def _lower_right(num_queries: int, num_keys: int, *, on_gpu: bool) -> Any:
    """The causal mask of the last positions; on a GPU as an object that selects a flash kernel."""
    return causal_lower_right(num_queries, num_keys) if on_gpu else _distance(num_queries, num_keys) >= 0


def _distance(num_queries: int, num_keys: int, device: torch.device | None = None) -> torch.Tensor:
    """[num_queries, num_keys]: how far before the query a key lies; negative after it."""
    places = torch.arange(num_keys, device=device)
    return places[num_keys - num_queries :].unsqueeze(1) - places


def _no_mask(*_: Any, **__: Any) -> None:
    """No mask: `shared_prompt_attention` knows from the lengths which token sees which."""


AttentionInterface.register(ATTENTION, shared_prompt_attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)
