import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import ShapeError
from pipeline.objectives.advantages import generalized_advantages, token_rewards, transform_reward
from pipeline.objectives.divergence import adapt_kl_coefficient, kl_estimate
from pipeline.objectives.logprobs import overwrite_logits, token_logprobs, token_logprobs_and_entropy
from pipeline.objectives.masked import masked_sum, whiten
from pipeline.objectives.policy import clipped_policy_loss, clipped_tokens, importance_ratio
from pipeline.objectives.preference import bradley_terry_loss, ranked_correctly
from pipeline.objectives.value import clipped_value_loss


def test_advantages_match_hand_computation():
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 99.0]])
    values = torch.tensor([[0.5, 0.4, 0.2], [1.0, 0.5, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    # row 0: delta = (0 + .36 - .5, 0 + .18 - .4, 1 - .2) = (-.14, -.22, .8); A_2 = .8, A_1 = -.22 + .45 * .8 = .14
    #        A_0 = -.14 + .45 * .14 = -.077
    # row 1: delta = (0 + .45 - 1, 2 - .5) = (-.55, 1.5); A_1 = 1.5, A_0 = -.55 + .45 * 1.5 = .125
    torch.testing.assert_close(advantages, torch.tensor([[-0.077, 0.14, 0.8], [0.125, 1.5, 0.0]]))


def test_advantages_refuse_tensors_of_different_shapes():
    with pytest.raises(ShapeError, match=r"rewards \(1, 2\).*values \(1, 3\)"):
        generalized_advantages(
            torch.zeros(1, 2), torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0
        )


def test_token_rewards_put_the_score_on_the_last_token():
    kl, offsets = torch.tensor([1.0, 2.0, 3.0, 1.0]), torch.tensor([0, 3, 4])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, offsets, kl_coefficient=0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.1, -0.2, 9.7, 19.9]))


def test_whitened_numbers_have_mean_zero_and_variance_one():
    # mean 2, Bessel variance 2
    whitened = whiten(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(whitened, torch.tensor([-1 / math.sqrt(2), 1 / math.sqrt(2)]))
    assert whiten(torch.tensor([5.0])).tolist() == [0.0]


def test_whitened_rewards_keep_their_mean_and_so_their_sign():
    # mean 2, variance 2: 2 -+ 1 / sqrt(2)
    expected = [2 - math.sqrt(0.5), 2 + math.sqrt(0.5)]
    assert whiten(torch.tensor([1.0, 3.0]), keep_mean=True).tolist() == pytest.approx(expected)


def test_a_masked_sum_survives_not_a_number_in_the_padding():
    x = torch.tensor([[2.0, float("nan")]])
    assert masked_sum(x, torch.tensor([[True, False]])).item() == 2.0


def test_policy_loss_clips_where_the_ratio_leaves_the_range():
    old = torch.zeros(1, 4)
    new = torch.tensor([[math.log(1.5), math.log(1.5), math.log(0.5), 7.0]])
    advantages = torch.tensor([[1.0, -1.0, -1.0, 5.0]])
    mask = torch.tensor([[True, True, True, False]])
    # min(1.5, 1.2) = 1.2;  min(-1.5, -1.2) = -1.5;  min(-.5, -.8) = -.8;  sum = -1.1
    loss = clipped_policy_loss(new, old, advantages, mask, clip_range=0.2, num_tokens=3)
    assert loss.item() == pytest.approx(1.1 / 3)
    ratio = importance_ratio(new, old, mask)
    assert clipped_tokens(ratio, advantages, mask, clip_range=0.2).item() == 2


def test_policy_losses_of_micro_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = (torch.randn(6, 5, generator=generator) for _ in range(3))
    mask = torch.rand(6, 5, generator=generator) < 0.7
    n = int(mask.sum())
    whole = clipped_policy_loss(new, old, advantages, mask, clip_range=0.2, num_tokens=n)
    parts = [
        clipped_policy_loss(new[r], old[r], advantages[r], mask[r], clip_range=0.2, num_tokens=n)
        for r in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_value_loss_takes_the_larger_of_clipped_and_plain_error():
    values = torch.tensor([[2.0, 0.0]])
    old = torch.tensor([[0.0, 0.0]])
    returns = torch.tensor([[1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    # plain errors 1, 1; clipped values .2 and 0 give .64 and 1; max 1, 1
    assert clipped_value_loss(values, old, returns, mask, clip_range=0.2, num_tokens=2).item() == pytest.approx(0.5)
    returns = torch.tensor([[2.0, 1.0]])
    # plain 0, 1; clipped (.2 - 2)^2 = 3.24, 1
    assert clipped_value_loss(values, old, returns, mask, clip_range=0.2, num_tokens=2).item() == pytest.approx(1.06)
    assert clipped_value_loss(values, old, returns, mask, clip_range=None, num_tokens=2).item() == pytest.approx(0.25)


def test_kl_estimators_by_hand():
    log_pi, log_ref = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    k = math.log(2.0)
    assert kl_estimate(log_pi, log_ref, "k1").item() == pytest.approx(k)
    assert kl_estimate(log_pi, log_ref, "k2").item() == pytest.approx(k * k / 2)
    assert kl_estimate(log_pi, log_ref, "k3").item() == pytest.approx(0.5 - 1 + k)


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.1), (60.0, 0.1 * 1.02), (0.0, 0.1 * 0.98), (6.6, 0.1 * 1.01)])
def test_the_kl_controller_moves_toward_its_target(kl, expected):
    assert adapt_kl_coefficient(0.1, kl=kl, target=6.0, horizon=1000, num_responses=100) == pytest.approx(expected)


def test_reward_transforms_by_hand():
    mean, std = torch.tensor([3.0, 100.0]), torch.tensor([0.5, 1.0])
    scale = {"reward_mean": 1.0, "reward_std": 2.0, "posterior_std": 0.25, "lcb_coefficient": 2.0, "clip": 5.0}
    assert transform_reward(mean, std, "none", **scale).tolist() == [3.0, 5.0]
    assert transform_reward(mean, std, "zscore", **scale).tolist() == [1.0, 5.0]
    assert transform_reward(mean, std, "lcb", **scale).tolist() == [0.75, 5.0]  # (3 - 1 - 2 (0.5 - 0.25)) / 2
    # ln 3 above the mean: sigmoid 3/4. Far above it is nothing to gain, far below the clip ends the loss.
    mean = torch.tensor([1.0 + math.log(3.0), 1.0, 100.0, -100.0])
    transformed = transform_reward(mean, std, "log_sigmoid", **scale).tolist()
    assert transformed == pytest.approx([math.log(3 / 4), math.log(1 / 2), 0.0, -5.0])


@pytest.mark.parametrize("chunk_size", [2, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_logprobs_equal_the_plain_ones_with_their_gradients(chunk_size, dtype, monkeypatch):
    monkeypatch.setattr("pipeline.objectives.logprobs.BLOCK_BYTES", 3 * 11 * 4)  # three rows a block
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 11, dtype=dtype)
    ids = torch.randint(11, (7,))
    upstream = torch.randn(7)

    def plain(hidden):
        log_pi = torch.log_softmax(head(hidden).float() / 0.7, -1)
        return log_pi[torch.arange(7), ids], -(log_pi.exp() * log_pi).sum(-1).detach()

    def chunked(hidden):
        return token_logprobs_and_entropy(hidden, head, ids, temperature=0.7, chunk_size=chunk_size)

    results = []
    for function in (plain, chunked):
        hidden = torch.linspace(-3, 3, 56, dtype=dtype).view(7, 8).requires_grad_()
        logprobs, entropy = function(hidden)
        assert (logprobs.dtype, entropy.dtype, entropy.requires_grad) == (torch.float32, torch.float32, False)
        gradients = torch.autograd.grad((upstream * logprobs).sum(), [hidden, head.weight, head.bias])
        results.append([logprobs.detach(), entropy, *gradients])
        with torch.no_grad():
            torch.testing.assert_close(function(hidden), (logprobs, entropy))
    expected, got = results
    exact = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **exact)


def test_the_gradient_of_a_logprob_is_one_hot_minus_the_policy():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).requires_grad_()
    logprobs, entropy = overwrite_logits(logits, torch.tensor([1]), temperature=1.0)
    assert logprobs.item() == pytest.approx(math.log(0.25))
    assert entropy.item() == pytest.approx(1.5 * math.log(2))
    loss = 2 * logprobs.sum()
    [gradient] = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.tolist() == [pytest.approx([-1.0, 1.5, -0.5])]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the memory is the gradient's now
        torch.autograd.grad(loss, logits)


def test_a_head_is_computed_once_for_the_chunk_the_backward_pass_begins_with():
    calls = []
    head = torch.nn.Linear(4, 5)
    head.register_forward_hook(lambda *_: calls.append(1))
    for num_tokens, expected in ((2, 1), (6, 5)):
        calls.clear()
        hidden = torch.randn(num_tokens, 4, requires_grad=True)
        ids = torch.zeros(num_tokens, dtype=torch.int64)
        token_logprobs_and_entropy(hidden, head, ids, temperature=1.0, chunk_size=2)[0].sum().backward()
        assert len(calls) == expected  # three chunks, two of them again


def test_processes_that_share_a_head_call_it_equally_often():
    calls = []
    head = torch.nn.Linear(4, 5)
    head.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for most_positions in (3, 9):
        calls.clear()
        hidden = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        ids = torch.tensor([0, 4, 2])
        options = {"temperature": 1.0, "chunk_size": 2, "most_positions": most_positions}
        logprobs, entropy = token_logprobs_and_entropy(hidden, head, ids, **options)
        assert len(calls) == -(-most_positions // 2)  # some of them with nothing
        results.append([logprobs, entropy, torch.autograd.grad(logprobs.sum(), hidden)[0]])
        assert len(calls) == 2 * -(-most_positions // 2) - 1
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in made)])
        return result


def test_chunked_logprobs_never_hold_the_logits_of_more_than_a_chunk():
    num_tokens, width, vocabulary = 64, 8, 1000
    hidden, head = torch.randn(num_tokens, width, requires_grad=True), torch.nn.Linear(width, vocabulary, bias=False)
    ids = torch.randint(vocabulary, (num_tokens,))
    for chunk_size in (4, 16, 64):
        with LargestTensor() as largest:
            logprobs, _ = token_logprobs_and_entropy(hidden, head, ids, temperature=0.7, chunk_size=chunk_size)
            logprobs.sum().backward()
        assert largest.elements == max(chunk_size, width) * vocabulary  # the head's own gradient is [V, H]


def test_entropy_of_a_uniform_policy_is_the_log_of_the_vocabulary():
    _, entropy = overwrite_logits(torch.zeros(1, 8), torch.tensor([3]), temperature=1.0)
    assert entropy.item() == pytest.approx(math.log(8))


def test_the_log_collision_is_the_logarithm_of_the_summed_squares_and_no_diagnostic_is_zero():
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 11, bias=False)
    hidden, ids = torch.randn(5, 4, requires_grad=True), torch.randint(11, (5,))
    expected = head(hidden).softmax(-1).square().sum(-1).log()
    options = {"temperature": 1.0, "chunk_size": 2}
    logprobs, collisions = token_logprobs(hidden, head, ids, diagnostic="log_collision", **options)
    torch.testing.assert_close(collisions, expected)
    assert not collisions.requires_grad
    plain, nothing = token_logprobs(hidden, head, ids, diagnostic="none", **options)
    assert torch.equal(plain, logprobs)
    assert torch.equal(nothing, torch.zeros(5))
    for values in (logprobs, plain):
        [gradient] = torch.autograd.grad(values.sum(), hidden)
        [by_torch] = torch.autograd.grad(head(hidden).log_softmax(-1).gather(1, ids.unsqueeze(1)).sum(), hidden)
        torch.testing.assert_close(gradient, by_torch)


def test_bradley_terry_says_ln_two_when_it_knows_nothing():
    assert bradley_terry_loss(torch.tensor([0.0])).item() == pytest.approx(math.log(2))
    assert ranked_correctly(torch.tensor([1.0, 0.0, -1.0])).tolist() == [1.0, 0.0, 0.0]
