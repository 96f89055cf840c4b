"""Slices of packed rows, and the exchanges between the ranks that hold them, against one rank with everything."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models.packing import of_all_ranks, pack, prompt_and_response_states, shared_prompt_attention
from pipeline.models.sequence_parallel import sum_over, to_own_heads, to_own_tokens
from pipeline.models.sequence_parallel_check import check_sequence_parallel
from tests.models.test_packing import GROUPS
from tests.support.lockstep import sequence_groups


def on_all(groups, work):
    """`work(group)` on every rank at once, in rank order."""
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(work, groups))


@pytest.mark.parametrize("n", [2, 3, 4, 30])
def test_every_response_token_is_predicted_by_one_rank_from_the_token_before_it(n):
    whole = pack(GROUPS)
    expected = [*zip(whole.token_ids[whole.predictors], whole.positions[whole.predictors], whole.targets, strict=True)]
    found = {}
    for group in sequence_groups(n, n):
        packed = pack(GROUPS, sequence_group=group)
        assert len(packed.token_ids) % n == 0
        assert sum(map(sum, packed.lengths)) == len(packed.token_ids)
        own = slice(group.rank, None, n)  # what `packed_states` gives the backbone
        ids, positions = packed.token_ids[own][packed.predictors], packed.positions[own][packed.predictors]
        assert not found.keys() & set(packed.predicted.tolist())
        found |= zip(packed.predicted.tolist(), zip(ids, positions, packed.targets, strict=True), strict=True)
    assert [found[i] for i in range(len(expected))] == expected


def test_a_row_is_filled_up_with_tokens_that_nobody_reads():
    packed = pack(GROUPS[:1], sequence_group=sequence_groups(4, 4)[1])
    assert packed.lengths == ((3, 2, 4), (3,))
    assert packed.token_ids.tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 0, 0, 0]
    assert packed.response_tokens.max() == packed.response_ends.max() == 8
    # Rank 1 holds the tokens 1, 5 and 9. The state of token 5 predicts the token 11, number 3 of the response tokens.
    assert (packed.predictors.tolist(), packed.predicted.tolist(), packed.targets.tolist()) == ([1], [3], [11])
    assert pack(GROUPS[:1], sequence_group=sequence_groups(3, 3)[0]).lengths == ((3, 2, 4),)


@pytest.mark.parametrize(("n", "kv_heads"), [(2, 6), (2, 3), (3, 2), (6, 1), (4, 3)])
def test_attention_over_ranks_equals_attention_on_one_and_so_do_its_gradients(n, kv_heads):
    heads, length = 12, sum(map(sum, pack(GROUPS, sequence_group=sequence_groups(n, n)[0]).lengths))
    generator = torch.Generator().manual_seed(0)
    query, key, value, direction = (
        torch.randn(1, h, length, 4, dtype=torch.float64, generator=generator)
        for h in (heads, kv_heads, kv_heads, heads)
    )

    def attend(group):
        own = slice(None) if group is None else slice(group.rank, None, group.size)
        leaves = [x[:, :, own].clone().requires_grad_() for x in (query, key, value)]
        packed = pack(GROUPS, sequence_group=group or sequence_groups(n, n)[0])
        attended, _ = shared_prompt_attention(
            None, *leaves, None, scaling=0.5, group_lengths=packed.lengths, sequence_group=group
        )
        (attended.transpose(1, 2) * direction[:, :, own]).sum().backward()
        return attended, *(leaf.grad for leaf in leaves)

    attended, *gradients = attend(None)
    for rank, (ours, *slopes) in enumerate(on_all(sequence_groups(n, n), attend)):
        torch.testing.assert_close(ours, attended[:, rank::n])
        for slope, gradient in zip(slopes, gradients, strict=True):
            torch.testing.assert_close(slope, gradient[:, :, rank::n])


def test_an_exchange_brings_all_tokens_of_own_heads_and_the_way_back_all_heads_of_own_tokens():
    # Four heads of one number each, two tokens a rank: the number says head and token.
    whole = torch.tensor([[10 * head + token for token in range(4)] for head in range(4)]).view(1, 4, 4, 1)

    def there_and_back(group):
        own = whole[:, :, group.rank :: 2]
        query, key, _ = to_own_heads(group, own, own[:, :1], own[:, :2])
        return query.flatten().tolist(), key.flatten().tolist(), to_own_tokens(group, query.transpose(1, 2)), own

    first, second = on_all(sequence_groups(2, 2), there_and_back)
    assert first[0] == [0, 1, 2, 3, 10, 11, 12, 13]
    assert second[0] == [20, 21, 22, 23, 30, 31, 32, 33]
    assert first[1] == second[1] == [0, 1, 2, 3]  # one key-value head, which both need
    for *_, back, own in (first, second):
        assert torch.equal(back, own.transpose(1, 2))


def test_the_gradient_of_a_sum_over_ranks_is_the_sum_of_what_they_make_of_it():
    def work(group):
        x = torch.tensor([1.0, 10.0])[group.rank].requires_grad_()
        total = sum_over(group, x)
        (total * (group.rank + 1)).backward()  # d/dx of total + 2 total
        return float(total.detach()), float(x.grad)

    assert on_all(sequence_groups(2, 2), work) == [(11.0, 3.0), (11.0, 3.0)]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_states_and_numbers_of_all_ranks_arrive_everywhere(pooling):
    whole = pack(GROUPS)
    states = torch.randn(len(whole.token_ids), 3, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(1.0, 1 + len(whole.response_tokens))
    expected = prompt_and_response_states(states, whole, pooling)

    def work(group):
        packed = pack(GROUPS, sequence_group=group)
        filled = torch.cat([states, torch.full((len(packed.token_ids) - len(states), 3), 99.0)])
        both = prompt_and_response_states(filled[group.rank :: 4], packed, pooling)
        return of_all_ranks(numbers[packed.predicted], packed), both

    for ours, both in on_all(sequence_groups(4, 4), work):
        assert torch.equal(ours, numbers)
        torch.testing.assert_close(both, expected)


def test_heads_that_the_ranks_do_not_divide_are_refused_with_the_numbers_that_would():
    check_sequence_parallel(4, 12, model="m")
    with pytest.raises(
        ConfigError, match=r"s = 5 .* divide the 12 attention heads of m. Possible are 1, 2, 3, 4, 6, 12\."
    ):
        check_sequence_parallel(5, 12, model="m", setting="s")
