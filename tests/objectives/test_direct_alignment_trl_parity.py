"""The losses of direct alignment against TRL's own trainers: the same tokens, a tiny random Qwen3 and its reference."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.objectives.direct_alignment import (
    cpo_loss,
    dpo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    length_normalised,
    likelihood_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    wpo_pair_weights,
    wpo_response_weights,
)

TESTED = "1.16.0"
ROWS = [
    {"prompt": "why ?", "chosen": " because it is so .", "rejected": " no ."},
    {"prompt": "how much is it ?", "chosen": " two .", "rejected": " it is very much more than two ."},
    {"prompt": "who ?", "chosen": " the one and the other .", "rejected": " the other and the one ."},
]


@pytest.fixture(scope="module")
def trl():
    # Its imports warn about versions of packages that these tests do not use.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", reason=f"parity with TRL needs trl=={TESTED}")
        if trl.__version__ != TESTED:
            pytest.skip(f"parity was established with trl=={TESTED}, not {trl.__version__}")
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference
        from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    return SimpleNamespace(
        dpo=(trl.DPOTrainer, trl.DPOConfig),
        kto=(trl.KTOTrainer, trl.KTOConfig),
        cpo=(CPOTrainer, CPOConfig),
        orpo=(ORPOTrainer, ORPOConfig),
        pairs=DataCollatorForPreference,
        unpaired=DataCollatorForUnpairedPreference,
    )


@pytest.fixture
def models(tiny_policy):
    """A policy, and a reference some tenths of a nat away from it."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in (policy, reference):
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return policy.train(), reference.eval()


def trainer_of(kinds, policy, tokenizer, directory, rows, *, reference=None, **arguments):
    from datasets import Dataset

    trainer_class, config_class = kinds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer_class(
            model=policy,
            **({} if reference is None else {"ref_model": reference}),
            args=config_class(
                output_dir=str(directory),
                per_device_train_batch_size=len(rows),
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to=[],
                **arguments,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )


def pair_examples(tokenizer):
    """Token ids of the rows; the responses of a pair differ in length, and each ends with the end token."""

    def response(text):
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    return [
        {
            "prompt_ids": tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
            "chosen_ids": response(row["chosen"]),
            "rejected_ids": response(row["rejected"]),
        }
        for row in ROWS
    ]


def response_sums(model, input_ids, attention_mask, completion_mask):
    """[B] log-probabilities, log sums of squared probabilities, and lengths, by the plainest way there is."""
    log_pi = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
    mask = completion_mask[:, 1:]
    logprobs = log_pi.gather(-1, input_ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    collisions = (2.0 * log_pi).logsumexp(-1)
    return (logprobs * mask).sum(-1), (collisions * mask).sum(-1), mask.sum(-1)


def sums_of(model, batch):
    return response_sums(model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"])


def assert_same_loss_and_gradients(theirs, ours, policy):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    parameters = list(policy.parameters())
    expected = torch.autograd.grad(theirs, parameters)
    for gradient, other in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3


def dpo_family(loss_type, chosen, rejected, references):
    """Our loss of TRL's name, of what `response_sums` returns for the chosen and the rejected responses."""
    (lp_w, c_w, n_w), (lp_l, c_l, n_l) = chosen, rejected
    h_w, h_l = lp_w - references[0], lp_l - references[1]
    match loss_type:
        case "sigmoid":
            return dpo_loss(h_w - h_l, beta=0.3)
        case "robust":
            return robust_dpo_loss(h_w - h_l, beta=0.3, label_smoothing=0.2)
        case "ipo":
            return ipo_loss(length_normalised(h_w, n_w) - length_normalised(h_l, n_l), beta=0.3)
        case "wpo":
            weights = wpo_pair_weights(
                wpo_response_weights(lp_w, c_w, n_w), wpo_response_weights(lp_l, c_l, n_l), clamp=False
            )
            return weights * dpo_loss(h_w - h_l, beta=0.3)


@pytest.mark.parametrize(
    ("loss_type", "arguments"),
    [
        ("sigmoid", {}),
        ("robust", {"loss_type": "robust", "label_smoothing": 0.2}),
        ("ipo", {"loss_type": "ipo"}),
        ("wpo", {"use_weighting": True}),
    ],
)
def test_loss_and_gradient_are_the_dpo_trainers(loss_type, arguments, trl, models, tokenizer, tmp_path):
    policy, reference = models
    trainer = trainer_of(trl.dpo, policy, tokenizer, tmp_path, ROWS, reference=reference, beta=0.3, **arguments)
    batch = trl.pairs(pad_token_id=tokenizer.pad_token_id)(pair_examples(tokenizer))
    theirs = trainer._compute_loss(policy, batch, False)
    with torch.no_grad():
        references = sums_of(reference, batch)[0].chunk(2)
    chosen, rejected = zip(*(sums.chunk(2) for sums in sums_of(policy, batch)), strict=True)
    ours = dpo_family(loss_type, chosen, rejected, references).mean()
    assert_same_loss_and_gradients(theirs, ours, policy)


def test_ipo_of_the_paper_is_trls_times_lengths_where_all_lengths_are_equal():
    """Their target is 1/(2 beta) nats a token, the paper's 1/(2 beta) nats: with one length the betas convert."""
    h_w, h_l, length = torch.tensor([0.4, -1.0]), torch.tensor([-0.2, 0.3]), torch.tensor([5, 5])
    means = length_normalised(h_w, length) - length_normalised(h_l, length)
    torch.testing.assert_close(ipo_loss(h_w - h_l, beta=0.02), 25.0 * ipo_loss(means, beta=0.1))


UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in ROWS
    for side in ("chosen", "rejected")
]


def unpaired_examples(tokenizer):
    rows = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for pair in pair_examples(tokenizer)
        for side in ("chosen", "rejected")
    ]
    return [row | {"KL_completion_ids": rows[i - 1]["completion_ids"]} for i, row in enumerate(rows)]


def kto_parts(policy, reference, batch):
    """Log-ratios with gradient, and those of the mismatched responses."""
    mismatched = [batch[f"KL_{name}"] for name in ("input_ids", "attention_mask", "completion_mask")]
    with torch.no_grad():
        other = response_sums(policy, *mismatched)[0] - response_sums(reference, *mismatched)[0]
        baseline = sums_of(reference, batch)[0]
    return sums_of(policy, batch)[0] - baseline, other


@pytest.fixture
def kto(trl, models, tokenizer, tmp_path):
    """The trainer, its batch, and the policy with a reference so near that z0 is above 0."""
    policy, reference = models
    trainer = trainer_of(
        trl.kto,
        policy,
        tokenizer,
        tmp_path,
        UNPAIRED,
        reference=reference,
        beta=0.3,
        desirable_weight=1.33,
        undesirable_weight=0.75,
    )
    with torch.no_grad():  # the reference finds each token less likely than the policy does
        reference.lm_head.weight.mul_(4.0)
    return trainer, trl.unpaired(pad_token_id=tokenizer.pad_token_id)(unpaired_examples(tokenizer)), policy, reference


def our_kto(log_ratios, labels, z0):
    return kto_loss(log_ratios, labels, z0, beta=0.3, desirable_weight=1.33, undesirable_weight=0.75)


def test_loss_and_gradient_are_the_kto_trainers(kto):
    trainer, batch, policy, reference = kto
    theirs = trainer._compute_loss(policy, batch, False)
    log_ratios, mismatched = kto_parts(policy, reference, batch)
    z0 = kto_reference_point(mismatched)
    assert float(z0) > 0.1
    assert_same_loss_and_gradients(theirs, our_kto(log_ratios, batch["label"], z0).mean(), policy)


def test_trls_reference_point_is_one_of_each_micro_batch_and_ours_is_one_of_the_step(kto):
    trainer, batch, policy, reference = kto
    halves = [{name: values[rows] for name, values in batch.items()} for rows in (slice(0, 2), slice(2, 6))]
    theirs = sum(trainer._compute_loss(policy, half, False) * len(half["label"]) for half in halves) / 6
    log_ratios, mismatched = kto_parts(policy, reference, batch)
    per_half = [kto_reference_point(mismatched[:2]).expand(2), kto_reference_point(mismatched[2:]).expand(4)]
    assert_same_loss_and_gradients(theirs, our_kto(log_ratios, batch["label"], torch.cat(per_half)).mean(), policy)
    whole = our_kto(log_ratios, batch["label"], kto_reference_point(mismatched)).mean()
    assert abs(float((whole - theirs).detach())) > 1e-4


def cpo_batch(tokenizer):
    """What `tokenize_row` and its collator make of the rows, of our token ids."""
    from torch.nn.utils.rnn import pad_sequence

    examples = pair_examples(tokenizer)
    batch = {}
    for side in ("chosen", "rejected"):
        ids = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for row in examples]
        labels = [torch.tensor([-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]) for row in examples]
        batch[f"{side}_input_ids"] = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        batch[f"{side}_attention_mask"] = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        batch[f"{side}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    return batch


def side_sums(policy, batch, side):
    logprobs, _, lengths = response_sums(
        policy,
        batch[f"{side}_input_ids"],
        batch[f"{side}_attention_mask"],
        (batch[f"{side}_labels"] != -100).long(),
    )
    return logprobs, lengths


def trainers_loss(trainer, policy, batch):
    return trainer.get_batch_loss_metrics(policy, batch)[0]


def test_loss_and_gradient_are_the_cpo_trainers(trl, models, tokenizer, tmp_path):
    policy, batch = models[0], cpo_batch(tokenizer)
    arguments = {"beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.7}
    trainer = trainer_of(trl.cpo, policy, tokenizer, tmp_path, ROWS, **arguments)
    (lp_w, n_w), (lp_l, _) = side_sums(policy, batch, "chosen"), side_sums(policy, batch, "rejected")
    likelihood = likelihood_loss(lp_w, n_w, average="token", tokens_per_row=float(n_w.float().mean()))
    ours = (cpo_loss(lp_w, lp_l, beta=0.3, label_smoothing=0.1) + 0.7 * likelihood).mean()
    assert_same_loss_and_gradients(trainers_loss(trainer, policy, batch), ours, policy)


def test_loss_and_gradient_are_the_simpo_trainers(trl, models, tokenizer, tmp_path):
    policy, batch = models[0], cpo_batch(tokenizer)
    arguments = {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.8, "cpo_alpha": 0.0}
    trainer = trainer_of(trl.cpo, policy, tokenizer, tmp_path, ROWS, **arguments)
    means = (length_normalised(*side_sums(policy, batch, side)) for side in ("chosen", "rejected"))
    ours = simpo_loss(*means, beta=2.5, margin=0.8).mean()
    assert_same_loss_and_gradients(trainers_loss(trainer, policy, batch), ours, policy)


def orpo_terms(policy, batch, *, counts_prompt):
    chosen = side_sums(policy, batch, "chosen")
    ratio = orpo_loss(length_normalised(*chosen), length_normalised(*side_sums(policy, batch, "rejected")))
    if counts_prompt:
        attended = batch["chosen_attention_mask"]
        logprobs, _, lengths = response_sums(policy, batch["chosen_input_ids"], attended, attended)
    else:
        logprobs, lengths = chosen
    likelihood = likelihood_loss(logprobs, lengths, average="token", tokens_per_row=float(lengths.float().mean()))
    return (likelihood + 0.2 * ratio).mean()


def test_loss_and_gradient_are_the_orpo_trainers_whose_likelihood_counts_the_prompt(trl, models, tokenizer, tmp_path):
    policy, batch = models[0], cpo_batch(tokenizer)
    trainer = trainer_of(trl.orpo, policy, tokenizer, tmp_path, ROWS, beta=0.2)
    theirs = trainers_loss(trainer, policy, batch)
    paper = orpo_terms(policy, batch, counts_prompt=False)
    assert abs(float((paper - theirs).detach())) > 1e-3
    assert_same_loss_and_gradients(theirs, orpo_terms(policy, batch, counts_prompt=True), policy)
