"""Direct alignment: the loss of a whole step, whatever its shards, from a policy that runs on plain padded rows."""

import itertools
import math
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.algorithms import DirectAlgorithm
from pipeline.config.models import LoRAConfig
from pipeline.learning.direct_data import mismatched_groups
from pipeline.objectives.direct_alignment import (
    RewardGaps,
    dpo_loss,
    dynamic_beta,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    likelihood_loss,
    orpo_loss,
    simpo_loss,
)
from pipeline.records import DirectBatch, PromptGroup
from tests.support.learners import direct_config, direct_data, direct_trainer
from tests.support.lockstep import run_ranks

METHODS = get_args(DirectAlgorithm)

VARIANTS = {
    **{method: {"algorithm": method} for method in METHODS},
    "ipo of means": {"algorithm": "ipo", "length_normalised": True},
    "robust": {"losses": {"sigmoid": 0.0, "robust": 1.0}, "label_smoothing": 0.1},
    "mixture": {"losses": {"sigmoid": 0.8, "likelihood": 0.2}, "likelihood_average": "sequence"},
    "beta of every pair": {"algorithm": "beta_dpo", "dynamic_beta": {"form": "instance", "keep_share": 1.0}},
    "wpo clamped": {"algorithm": "wpo", "wpo_clamp": True},
}


@pytest.fixture(scope="module")
def references(tiny_policy, world, tokenizer):
    """The policy before alignment as its own reference, moved a little so that the first margins are not 0."""
    measured = direct_trainer(tiny_policy, direct_config()).logprobs

    def reference(groups):
        noise = torch.Generator().manual_seed(1)
        logprobs = measured(groups)
        return logprobs + torch.randn(logprobs.shape, generator=noise)

    return reference


def batches_of(world, tokenizer, config, references):
    return direct_data(world, tokenizer, config).with_references(references)


def logprobs_by_hand(policy, groups):
    """Row by row, without packing: [B, k] sums and [B, k] sums of log sum_v pi(v)^2."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    sums, collisions = [], []
    for group in groups:
        for response in group.response_ids:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logp = model(ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            sums.append(logp.gather(1, torch.tensor(response).unsqueeze(1)).sum())
            collisions.append((2 * logp).logsumexp(-1).sum())
    k = len(groups[0].response_ids)
    return torch.stack(sums).view(-1, k), torch.stack(collisions).view(-1, k), model


def loss_by_hand(method, lp, collisions, batch, lr, policy):
    """The papers' formulas, with the numbers that the names stand for."""
    lengths = torch.tensor([[len(r) for r in g.response_ids] for g in batch.groups])
    h = None if lr is None else lp - lr
    match method:
        case "dpo":
            return dpo_loss(h[:, 0] - h[:, 1], beta=0.1).mean()
        case "selective_dpo":
            return dpo_loss(h[:, 0] - h[:, 1], beta=0.01).mean()
        case "ipo":
            return ipo_loss(h[:, 0] - h[:, 1], beta=0.1).mean()
        case "simpo":
            return simpo_loss(*(lp / lengths).unbind(1), beta=2.5, margin=1.25).mean()
        case "cpo":
            preference = -torch.nn.functional.logsigmoid(0.1 * (lp[:, 0] - lp[:, 1])).mean()
            return preference - lp[:, 0].sum() / lengths[:, 0].sum()
        case "orpo":
            nll = likelihood_loss(lp[:, 0], lengths[:, 0], average="none", tokens_per_row=1).sum()
            return 0.1 * orpo_loss(*(lp / lengths).unbind(1)).mean() + nll / lengths[:, 0].sum()
        case "raft":
            return -lp[:, 0].sum() / lengths[:, 0].sum()
        case "wpo":
            weights = ((lp - collisions) / lengths).detach().exp().prod(1)
            return (weights * dpo_loss(h[:, 0] - h[:, 1], beta=0.01)).mean()
        case "kto":
            others = logprobs_by_hand(policy, batch.mismatched.groups)[0]
            z0 = kto_reference_point((others - batch.mismatched.reference_logprobs).flatten())
            return kto_loss(h.flatten(), batch.desirable.flatten(), z0, beta=0.1).mean()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "beta_dpo"])
def test_the_loss_and_its_gradient_are_those_of_plain_rows(method, tiny_policy, world, tokenizer, references):
    config = direct_config(method)
    batch = batches_of(world, tokenizer, config, references).batch(0)
    trainer = direct_trainer(tiny_policy, config)
    gradients = {}
    step = trainer.engine.step

    def keep_gradients(factor):
        gradients.update({n: p.grad.clone() for n, p in trainer.engine.module.named_parameters()})
        return step(factor)

    trainer.engine.step = keep_gradients
    metrics = trainer.update(batch, 0)
    lp, collisions, model = logprobs_by_hand(tiny_policy, batch.groups)
    loss = loss_by_hand(method, lp, collisions, batch, batch.reference_logprobs, tiny_policy)
    loss.backward()
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        difference = (gradients[f"policy.{name}"] - parameter.grad).abs().max()
        assert difference < 1e-5 * max(1.0, largest), name


def test_beta_dpo_takes_its_beta_from_the_whole_step_and_remembers_the_margins(
    tiny_policy, world, tokenizer, references
):
    config = direct_config("beta_dpo", dynamic_beta={"keep_share": 1.0})
    batch = batches_of(world, tokenizer, config, references).batch(0)
    trainer = direct_trainer(tiny_policy, config)
    h = logprobs_by_hand(tiny_policy, batch.groups)[0].detach() - batch.reference_logprobs
    margins = h[:, 0] - h[:, 1]
    before = RewardGaps(mean=0.0, std=1.0)
    beta = dynamic_beta(margins.mean(), before, beta=0.1, sensitivity=0.6)
    metrics = trainer.update(batch, 0)
    assert metrics["beta_dpo/beta"] == pytest.approx(float(beta), rel=1e-4)
    assert metrics["train/loss"] == pytest.approx(float(dpo_loss(margins, beta=beta).mean()), rel=1e-5)
    after = before.updated(margins, momentum=0.9)
    assert (trainer.gaps.mean, trainer.gaps.std) == pytest.approx((after.mean, after.std), rel=1e-4)
    kept = direct_trainer(tiny_policy, direct_config("beta_dpo")).update(batch, 0)
    assert (kept["rows"], kept["beta_dpo/left_out"]) == (5.0, 1.0)  # 0.8 of six pairs, rounded up


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_and_micro_batches_leave_losses_and_parameters_as_they_are(
    variant, tiny_policy, world, tokenizer, references
):
    slow = {"learning_rate": 1e-4, "warmup_fraction": 0.0}
    config = direct_config(**VARIANTS[variant], optimiser=slow)
    batches = batches_of(world, tokenizer, config, references)

    def run(world_size, max_tokens):
        def build(make_engine):
            return direct_trainer(tiny_policy, config, make_engine=make_engine, max_tokens=max_tokens)

        def work(trainer):
            metrics = [trainer.update(batches.batch(step), step) for step in range(2)]
            metrics.append(trainer.evaluate(batches.heldout))
            return metrics, {name: t.clone() for name, t in trainer.engine.stream().tensors}

        results = run_ranks(world_size, build, work)
        for metrics, _ in results:
            assert metrics == results[0][0], "every rank returns the metrics of the whole batch"
        return results[0]

    whole, model = run(1, 10_000)
    assert all(math.isfinite(value) for metrics in whole for value in metrics.values())
    for world_size, max_tokens in ((1, 40), (2, 100), (4, 10_000)):
        metrics, parted = run(world_size, max_tokens)
        for ours, theirs in zip(metrics, whole, strict=True):
            for name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (world_size, max_tokens, name)
        differences = torch.cat([(parted[name] - model[name]).abs().flatten() for name in model])
        # Adam divides a gradient by its own size: where it is all rounding, so is the step. Those are few.
        assert differences.mean() < 1e-6


def test_another_number_of_ranks_resumes_with_the_same_state(tiny_policy, world, tokenizer, references, tmp_path):
    config = direct_config("beta_dpo", optimiser={"learning_rate": 1e-4, "warmup_fraction": 0.0})
    batches = batches_of(world, tokenizer, config, references)
    whole = direct_trainer(tiny_policy, config)
    expected = [whole.update(batches.batch(step), step) for step in range(2)]

    def build(make_engine):
        return direct_trainer(tiny_policy, config, make_engine=make_engine, max_tokens=100)

    def first_step(trainer):
        trainer.update(batches.batch(0), 0)
        trainer.snapshot().write(str(tmp_path))

    run_ranks(2, build, first_step)
    resumed = direct_trainer(tiny_policy, config)
    resumed.restore(str(tmp_path))
    metrics = resumed.update(batches.batch(1), 1)
    assert metrics == pytest.approx(expected[1], rel=1e-5, abs=1e-5)
    assert resumed.gaps.mean == pytest.approx(whole.gaps.mean, abs=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "raft"])
def test_every_method_of_pairs_learns_to_prefer_the_chosen_responses(method, tiny_policy, world, tokenizer):
    config = direct_config(method, order="shuffled", keep_easiest=1.0)
    trainer = direct_trainer(tiny_policy, config, num_steps=24)
    batches = direct_data(world, tokenizer, config, num_pairs=6).with_references(trainer.logprobs)
    losses = [trainer.update(batches.batch(0), step) for step in range(24)]
    assert losses[-1]["train/loss"] < losses[0]["train/loss"]
    assert losses[-1]["train/margin"] > losses[0]["train/margin"]
    assert losses[-1]["train/accuracy"] > 0.8


def test_nothing_has_moved_before_the_first_step(tiny_policy, world, tokenizer):
    config = direct_config("dpo")
    trainer = direct_trainer(tiny_policy, config)
    batches = direct_data(world, tokenizer, config).with_references(trainer.logprobs)
    metrics = trainer.evaluate(batches.heldout)
    assert metrics["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["eval/change_rms"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["alarm/likelihood_displacement"] == 0.0


def test_the_reference_of_adapters_is_the_policy_without_them_and_the_export_holds_them_merged(
    tiny_policy, world, tokenizer, tmp_path
):
    config = direct_config("dpo", lora=LoRAConfig(rank=4, alpha=8))
    trainer, plain = direct_trainer(tiny_policy, config), direct_trainer(tiny_policy, direct_config("dpo"))
    data = direct_data(world, tokenizer, config)
    reference = trainer.logprobs(data.examples.groups)
    assert torch.equal(reference, plain.logprobs(data.examples.groups))
    batches = data.with_references(trainer.logprobs)
    for step in range(3):
        trainer.update(batches.batch(step), step)
    trained = trainer.logprobs(data.heldout.groups)
    assert (trained - batches.heldout.reference_logprobs).abs().max() > 1e-2
    trainer.export(str(tmp_path))
    by_hand = logprobs_by_hand(str(tmp_path), data.heldout.groups)[0]
    torch.testing.assert_close(by_hand.detach(), trained, atol=1e-3, rtol=1e-4)


def test_unpaired_responses_weigh_by_their_class(tiny_policy, world, tokenizer, references):
    pairs = direct_data(world, tokenizer, direct_config("kto")).examples.groups[:4]
    groups = tuple(
        PromptGroup(prompt_ids=g.prompt_ids, response_ids=(g.response_ids[b % 2],)) for b, g in enumerate(pairs)
    )
    others = mismatched_groups(groups, max_length=128)
    assert others[1] == PromptGroup(prompt_ids=groups[1].prompt_ids, response_ids=groups[0].response_ids)
    assert others[0].response_ids == groups[3].response_ids
    config = direct_config("kto", desirable_weight=1.33, undesirable_weight=0.5)
    trainer = direct_trainer(tiny_policy, config)
    batch = DirectBatch(
        groups=groups,
        desirable=torch.tensor([[True], [False], [True], [True]]),
        reference_logprobs=references(groups),
        mismatched=_referenced(others, references),
        seed=0,
    )
    lp = logprobs_by_hand(tiny_policy, groups)[0]
    z0 = kto_reference_point((logprobs_by_hand(tiny_policy, others)[0] - batch.mismatched.reference_logprobs).flatten())
    expected = kto_loss(
        (lp - batch.reference_logprobs).flatten(),
        batch.desirable.flatten(),
        z0,
        beta=0.1,
        desirable_weight=1.33,
        undesirable_weight=0.5,
    ).mean()
    metrics = trainer.update(batch, 0)
    assert metrics["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["kto/reference_point"] == pytest.approx(float(z0), abs=1e-4)
    assert "train/accuracy" not in metrics


def _referenced(groups, references):
    from pipeline.records import ReferencedResponses

    return ReferencedResponses(groups=groups, reference_logprobs=references(groups))


def test_the_batches_of_a_selection_go_from_easy_to_hard_and_begin_again(world, tokenizer):
    data = direct_data(world, tokenizer, direct_config("selective_dpo", epochs=2))
    ordered = type(data)(
        config=data.config, examples=data.examples, trained=[5, 3, 9, 1, 0, 2, 7, 8, 4], heldout=data.heldout, seed=0
    )
    assert ordered.num_steps == 3  # twice nine pairs, six a step
    assert list(itertools.chain(*map(ordered.rows, range(3)))) == 2 * [5, 3, 9, 1, 0, 2, 7, 8, 4]
