"""The rewards that policies imply, by hand."""

import math
from typing import get_args

import pytest
import torch

from pipeline.config.algorithms import DirectAlgorithm
from pipeline.config.alignment import AlignmentConfig
from pipeline.config.direct_alignment import DirectConfig, LossWeights
from pipeline.config.implicit_reward import ImplicitRewardName
from pipeline.errors import ShapeError
from pipeline.objectives.direct_alignment import cpo_loss, dpo_loss, ipo_loss, orpo_loss, simpo_loss
from pipeline.objectives.implicit_rewards import IMPLICIT_FORMS, form_of_method, implicit_rewards
from pipeline.objectives.preference import bradley_terry_loss

LOGPROBS, REFERENCE, LENGTHS = torch.tensor([-1.5, -6.0]), torch.tensor([-2.0, -5.0]), torch.tensor([3, 4])


def rewards(name, beta=1.0):
    form = IMPLICIT_FORMS[name]
    return implicit_rewards(form, LOGPROBS, REFERENCE if form.needs_reference else None, LENGTHS, beta=beta)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "wpo", "selective_dpo", "beta_dpo"])
def test_a_method_with_a_reference_implies_the_log_ratio(name):
    assert rewards(name).tolist() == pytest.approx([0.5, -1.0])
    assert rewards(name, beta=0.1).tolist() == pytest.approx([0.05, -0.1])


def test_other_methods_imply_what_their_loss_compares():
    assert rewards("ipo_mean").tolist() == pytest.approx([0.5 / 3, -0.25])
    assert rewards("simpo", beta=2.0).tolist() == pytest.approx([-1.0, -3.0])
    assert rewards("cpo").tolist() == pytest.approx([-1.5, -6.0])
    odds = [math.log(math.exp(m) / (1.0 - math.exp(m))) for m in (-0.5, -1.5)]
    assert rewards("orpo").tolist() == pytest.approx(odds, rel=1e-5)


def margin(name, beta=1.0):
    chosen, rejected = rewards(name, beta)
    return (chosen - rejected).unsqueeze(0)


def test_the_loss_of_a_method_is_a_function_of_its_implicit_margin():
    h, means = LOGPROBS - REFERENCE, LOGPROBS / LENGTHS
    torch.testing.assert_close(dpo_loss(h[:1] - h[1:], beta=0.3), bradley_terry_loss(margin("dpo", 0.3)))
    torch.testing.assert_close(ipo_loss(h[:1] - h[1:], beta=0.3), (margin("ipo") - 1.0 / 0.6) ** 2)
    torch.testing.assert_close(
        simpo_loss(means[:1], means[1:], beta=2.0, margin=0.5), bradley_terry_loss(margin("simpo", 2.0) - 0.5)
    )
    torch.testing.assert_close(cpo_loss(LOGPROBS[:1], LOGPROBS[1:], beta=0.3), bradley_terry_loss(margin("cpo", 0.3)))
    torch.testing.assert_close(orpo_loss(means[:1], means[1:]), bradley_terry_loss(margin("orpo")))


@pytest.mark.parametrize("name", [*get_args(DirectAlgorithm)])
def test_the_form_of_a_configured_method_is_the_one_of_its_name(name):
    config = AlignmentConfig.model_validate({"algorithm": name, "samples_per_prompt": 2}).direct
    expected = "cpo" if name == "raft" else name
    assert form_of_method(config) == IMPLICIT_FORMS[expected]


def test_ipo_of_means_implies_a_mean():
    config = DirectConfig(losses=LossWeights(sigmoid=0.0, squared=1.0), length_normalised=True)
    assert form_of_method(config) == IMPLICIT_FORMS["ipo_mean"]


def test_every_name_has_a_form():
    assert set(get_args(ImplicitRewardName)) == set(IMPLICIT_FORMS)


@pytest.mark.parametrize(("name", "reference"), [("dpo", None), ("simpo", REFERENCE)])
def test_a_reference_is_given_exactly_where_it_is_read(name, reference):
    with pytest.raises(ShapeError, match="give exactly what it reads"):
        implicit_rewards(IMPLICIT_FORMS[name], LOGPROBS, reference, LENGTHS, beta=1.0)
