"""The losses of direct alignment against numbers worked by hand: two pairs over a vocabulary of three tokens."""

import math
from dataclasses import dataclass

import pytest
import torch

from pipeline.errors import ShapeError
from pipeline.objectives.direct_alignment import (
    RewardGaps,
    cpo_loss,
    dpo_loss,
    dynamic_beta,
    filter_weights,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    length_normalised,
    likelihood_loss,
    log_odds,
    orpo_loss,
    pairs_that_stay,
    robust_dpo_loss,
    simpo_loss,
    wpo_pair_weights,
    wpo_response_weights,
)

A, B, E = 0, 1, 2


@dataclass(frozen=True)
class Worked:
    """A response: the policy's distribution at each position, the token there, and its probability by the reference."""

    policy: tuple[tuple[float, float, float], ...]
    tokens: tuple[int, ...]
    reference: tuple[float, ...]


CHOSEN = (
    Worked(((0.5, 0.3, 0.2), (0.2, 0.6, 0.2), (0.1, 0.2, 0.7)), (A, B, E), (0.4, 0.5, 0.8)),
    Worked(((0.6, 0.3, 0.1), (0.1, 0.1, 0.8)), (A, E), (0.5, 0.9)),
)
REJECTED = (
    Worked(((0.5, 0.3, 0.2), (0.4, 0.4, 0.2), (0.25, 0.25, 0.5)), (B, A, E), (0.35, 0.5, 0.4)),
    Worked(((0.6, 0.3, 0.1), (0.3, 0.5, 0.2), (0.2, 0.2, 0.6)), (B, B, E), (0.25, 0.5, 0.5)),
)


def token_logprobs(responses):
    return [[math.log(step[t]) for step, t in zip(r.policy, r.tokens, strict=True)] for r in responses]


def log_collisions(responses):
    return [[math.log(sum(p**2 for p in step)) for step in r.policy] for r in responses]


def sums(rows):
    return torch.tensor([sum(row) for row in rows], dtype=torch.float64)


def lengths(responses):
    return torch.tensor([len(r.tokens) for r in responses])


def reference(responses):
    return sums([[math.log(p) for p in r.reference] for r in responses])


LP_W, LP_L = sums(token_logprobs(CHOSEN)), sums(token_logprobs(REJECTED))
N_W, N_L = lengths(CHOSEN), lengths(REJECTED)
H_W, H_L = LP_W - reference(CHOSEN), LP_L - reference(REJECTED)
MARGINS = H_W - H_L
MEAN_W, MEAN_L = LP_W / N_W, LP_L / N_L
IN_TURN = torch.stack([H_W, H_L], dim=1).flatten()
DESIRABLE = torch.tensor([True, False, True, False])


def near(*expected):
    return pytest.approx(expected, abs=6e-8)


def test_the_log_probabilities_are_those_of_the_worked_example():
    assert LP_W.tolist() == pytest.approx([-1.560648, -0.733969], abs=1e-6)
    assert LP_L.tolist() == pytest.approx([-2.813411, -2.407946], abs=1e-6)
    assert H_W.tolist() == pytest.approx([0.271934, 0.064539], abs=1e-6)
    assert H_L.tolist() == pytest.approx([-0.154151, 0.364643], abs=1e-6)
    assert length_normalised(LP_W, N_W).tolist() == pytest.approx([-0.520216, -0.366985], abs=1e-6)
    assert length_normalised(LP_L, N_L).tolist() == pytest.approx([-0.937804, -0.802649], abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected", "mean"),
    [
        (dpo_loss(MARGINS, beta=0.1), (0.6720699, 0.7082650), 0.6901674),
        (dpo_loss(MARGINS, beta=0.1, label_smoothing=0.1), (0.6763307, 0.7052639), 0.6907973),
        (robust_dpo_loss(MARGINS, beta=0.1, label_smoothing=0.1), (0.6667438, 0.7120163), 0.6893801),
        (ipo_loss(MARGINS, beta=0.1), (20.9207040, 28.0911087), 24.5059063),
        (
            ipo_loss(length_normalised(H_W, N_W) - length_normalised(H_L, N_L), beta=0.1),
            (23.5998907, 25.9007551),
            24.7503229,
        ),
        (simpo_loss(MEAN_W, MEAN_L, beta=2.0, margin=1.0), (0.7789516, 0.7595514), 0.7692515),
        (cpo_loss(LP_W, LP_L, beta=0.1), (0.6324695, 0.6129470), 0.6227083),
        (orpo_loss(MEAN_W, MEAN_L), (0.3639595, 0.3075182), 0.3357389),
        (log_odds(MEAN_W) - log_odds(MEAN_L), (0.8232196, 1.0215246), 0.9223721),
    ],
    ids=["dpo", "cdpo", "robust", "ipo-sums", "ipo-means", "simpo", "cpo", "orpo", "log-odds"],
)
def test_losses_match_hand_computation(loss, expected, mean):
    assert loss.tolist() == near(*expected)
    assert float(loss.mean()) == pytest.approx(mean, abs=6e-8)


def likelihood(average):
    return float(likelihood_loss(LP_W, N_W, average=average, tokens_per_row=5 / 2).mean())


def test_the_three_averages_of_the_likelihood_match_hand_computation():
    assert likelihood("token") == pytest.approx(0.4589234, abs=6e-8)
    assert likelihood("sequence") == pytest.approx(0.4436003, abs=6e-8)
    assert likelihood("none") == pytest.approx(1.1473085, abs=6e-8)


def test_cpo_and_orpo_with_their_likelihood_match_hand_computation():
    cpo = float(cpo_loss(LP_W, LP_L, beta=0.1).mean())
    assert cpo + likelihood("token") == pytest.approx(1.0816317, abs=6e-8)
    assert cpo + likelihood("none") == pytest.approx(1.7700167, abs=6e-8)
    ratios = orpo_loss(MEAN_W, MEAN_L)
    assert likelihood("token") + 0.1 * float(ratios.mean()) == pytest.approx(0.4924973, abs=6e-8)
    assert likelihood("sequence") + 0.1 * float(ratios.mean()) == pytest.approx(0.4771741, abs=6e-8)
    alone = likelihood_loss(LP_W[:1], N_W[:1], average="token", tokens_per_row=3.0) + 0.1 * ratios[:1]
    assert float(alone) == pytest.approx(0.5566119, abs=6e-8)


def wpo_weights():
    return (
        wpo_response_weights(LP_W, sums(log_collisions(CHOSEN)), N_W),
        wpo_response_weights(LP_L, sums(log_collisions(REJECTED)), N_L),
    )


def test_wpo_weights_match_hand_computation():
    chosen, rejected = wpo_weights()
    assert chosen.tolist() == near(1.3249406, 1.2573892)
    assert rejected.tolist() == near(1.0536053, 1.0537788)
    product = wpo_pair_weights(chosen, rejected, clamp=False)
    assert product.tolist() == near(1.3959645, 1.3250101)
    loss = product * dpo_loss(MARGINS, beta=0.1)
    assert loss.tolist() == near(0.9381857, 0.9384583)
    assert float(loss.mean()) == pytest.approx(0.9383220, abs=6e-8)


def test_wpo_weights_clamped_at_one_leave_dpo():
    product = wpo_pair_weights(*wpo_weights(), clamp=True)
    assert (product * dpo_loss(MARGINS, beta=0.1)).tolist() == near(0.6720699, 0.7082650)


def test_wpo_clamps_the_product_and_not_each_weight():
    weights = wpo_pair_weights(torch.tensor([4.0, 0.5]), torch.tensor([0.125, 3.0]), clamp=True)
    assert weights.tolist() == [0.5, 1.0]


def test_no_gradient_runs_through_wpo_weights():
    logprobs = LP_W.clone().requires_grad_()
    assert not wpo_response_weights(logprobs, sums(log_collisions(CHOSEN)), N_W).requires_grad


MISMATCHED = torch.tensor([-4.0, -3.5, -5.0, -2.8]) - torch.tensor([-4.3, -3.4, -5.5, -3.0])


def kto(z0, desirable_weight=1.0):
    return kto_loss(IN_TURN, DESIRABLE, torch.tensor(z0), beta=0.1, desirable_weight=desirable_weight)


def test_kto_matches_hand_computation():
    assert float(kto_reference_point(MISMATCHED.double())) == pytest.approx(0.225, abs=1e-6)
    assert kto(0.225).tolist() == near(0.4988267, 0.4905224, 0.5040115, 0.5034910)
    assert float(kto(0.225).mean()) == pytest.approx(0.4992129, abs=6e-8)
    assert kto(0.225, 1.33).tolist() == near(0.6634395, 0.4905224, 0.6703352, 0.5034910)
    assert float(kto(0.225, 1.33).mean()) == pytest.approx(0.5819470, abs=6e-8)
    assert kto(0.0).tolist() == near(0.4932021, 0.4961463, 0.4983865, 0.5091151)
    assert float(kto(0.0).mean()) == pytest.approx(0.4992125, abs=6e-8)


def test_the_undesirable_weight_scales_undesirable_responses_only():
    weighed = kto_loss(IN_TURN, DESIRABLE, torch.tensor(0.225), beta=0.1, undesirable_weight=2.0)
    assert weighed.tolist() == pytest.approx([0.4988267, 2 * 0.4905224, 0.5040115, 2 * 0.5034910], abs=2e-7)


def test_the_reference_point_of_kto_is_never_negative_and_carries_no_gradient():
    ratios = torch.tensor([-3.0, 1.0], requires_grad=True)
    z0 = kto_reference_point(ratios)
    assert float(z0) == 0.0
    assert not z0.requires_grad


def gradient(loss, argument):
    return torch.autograd.grad(loss(argument.requires_grad_()).sum(), argument)[0].tolist()


def test_gradients_match_hand_computation():
    dpo = gradient(lambda w: dpo_loss(w - reference(CHOSEN) - H_L, beta=0.1), LP_W.clone())
    assert dpo[0] == pytest.approx(-0.0489350, abs=6e-8)
    simpo = gradient(lambda w: simpo_loss(w / N_W, MEAN_L, beta=2.0, margin=1.0), LP_W.clone())
    assert simpo[0] == pytest.approx(-0.3607421, abs=6e-8)
    ipo = gradient(lambda w: ipo_loss((w - reference(CHOSEN)) / N_W - H_L / N_L, beta=0.1), LP_W.clone())
    assert ipo[1] == pytest.approx(-5.0892784, abs=6e-8)
    each = gradient(lambda h: kto_loss(h, DESIRABLE, torch.tensor(0.225), beta=0.1), IN_TURN.clone())
    assert each[:2] == near(-0.0249999, 0.0249910)


GAPS = RewardGaps(mean=0.3, std=0.5)


def test_beta_dpo_matches_hand_computation():
    assert MARGINS.tolist() == near(0.4260844, -0.3001046)
    batch = dynamic_beta(MARGINS.mean(), GAPS, beta=0.1, sensitivity=0.6)
    assert float(batch) == pytest.approx(0.0857794, abs=6e-8)
    loss = dpo_loss(MARGINS, beta=batch)
    assert loss.tolist() == near(0.6750395, 0.7061014)
    assert float(loss.mean()) == pytest.approx(0.6905705, abs=6e-8)
    assert filter_weights(MARGINS, GAPS).tolist() == near(0.9687056, 0.4866301)
    assert dynamic_beta(MARGINS, GAPS, beta=0.1, sensitivity=0.6).tolist() == near(0.1075651, 0.0639937)


def test_the_running_gaps_of_beta_dpo_match_hand_computation():
    after = GAPS.updated(MARGINS, momentum=0.9)
    assert after.mean == pytest.approx(0.2762990, abs=6e-8)
    assert after.std == pytest.approx(0.5013493, abs=6e-8)
    official = dynamic_beta(MARGINS.mean(), after, beta=0.1, sensitivity=0.6)
    assert float(official) == pytest.approx(0.0872015, abs=6e-8)


def test_one_margin_moves_the_mean_and_leaves_the_deviation():
    assert GAPS.updated(torch.tensor([1.3]), momentum=0.9) == RewardGaps(
        mean=pytest.approx(0.4), std=pytest.approx(0.5)
    )


def test_a_dynamic_beta_never_falls_below_its_floor():
    assert float(dynamic_beta(torch.tensor(-100.0), GAPS, beta=0.1, sensitivity=0.6)) == pytest.approx(1e-3)


def test_the_filter_of_beta_dpo_keeps_the_share_it_is_told_and_seldom_what_is_far_from_the_mean():
    weights = filter_weights(torch.tensor([0.3] * 8 + [9.0] * 2), GAPS)
    stay = pairs_that_stay(weights, share=0.8, generator=torch.Generator().manual_seed(0))
    assert stay.tolist() == [True] * 8 + [False] * 2
    whole = pairs_that_stay(torch.zeros(3), share=1.0, generator=torch.Generator().manual_seed(0))
    assert whole.tolist() == [True] * 3


def test_odds_of_a_response_that_is_certain_are_finite_and_have_a_finite_gradient():
    means = torch.tensor([0.0, -1e-9, -0.5, -40.0], requires_grad=True)
    loss = orpo_loss(means, torch.full((4,), -1.0))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(means.grad).all()


def test_a_loss_of_all_pairs_is_the_sum_over_any_shards():
    whole = dpo_loss(MARGINS, beta=0.1).sum()
    shards = sum(dpo_loss(margin, beta=0.1).sum() for margin in MARGINS.split(1))
    assert float(whole) == pytest.approx(float(shards))


@pytest.mark.parametrize(
    "call",
    [
        lambda: cpo_loss(LP_W, LP_L[:1], beta=0.1),
        lambda: orpo_loss(MEAN_W, MEAN_L[:1]),
        lambda: simpo_loss(MEAN_W, MEAN_L[:1], beta=2.0, margin=1.0),
        lambda: kto_loss(IN_TURN, DESIRABLE[:1], torch.tensor(0.0), beta=0.1),
        lambda: length_normalised(LP_W, N_W[:1]),
    ],
)
def test_tensors_that_would_broadcast_are_refused(call):
    with pytest.raises(ShapeError):
        call()
