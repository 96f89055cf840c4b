"""Our losses and advantages against TRL's own trainers, on the same numbers. Skipped where TRL is not installed."""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.config.alignment import AlignmentConfig
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.learning.algorithm import SampledTokens, policy_loss
from pipeline.models.critic import Policy
from pipeline.models.packing import pack
from pipeline.objectives.advantages import group_centred, group_zscores, leave_one_out, overlong_penalty
from pipeline.objectives.aggregation import MiniBatchSize
from pipeline.objectives.policy import truncated_importance_weights
from pipeline.records import Prompt, RewardScore, Rollout, TokenEvaluation
from tests.support.experience import experience_of_step

TESTED = "1.16.0"


@pytest.fixture(scope="module")
def trl():
    # Its imports warn about versions of packages that these tests do not use.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl", reason=f"parity with TRL needs trl=={TESTED}")
        if trl.__version__ != TESTED:
            pytest.skip(f"parity was established with trl=={TESTED}, not {trl.__version__}")
        from trl.trainer import grpo_trainer, rloo_trainer

    return SimpleNamespace(trl=trl, grpo=grpo_trainer.GRPOTrainer, rloo=rloo_trainer.RLOOTrainer)


def tokens():
    """Eight responses of 1 to 6 tokens whose policy, old policy and reference differ by some tenths of a nat."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[6], [1], [3], [5], [2], [6], [4], [1]])
    mask = torch.arange(6) < lengths
    new, old, reference = (0.5 * torch.randn(8, 6, generator=generator) - 2.0 for _ in range(3))
    new, old, reference = (torch.where(mask, x, torch.zeros_like(x)) for x in (new, old, reference))
    advantages = torch.randn(8, generator=generator)
    return new.requires_grad_(), old, reference, advantages, mask


def trl_loss(
    trainer, new, old, reference, advantages, mask, config, *, loss_type, level="token", cispo_bound=None, weights=None
):
    """`_compute_loss` of one process that accumulates nothing, fed with our logprobs in place of a model's."""
    ppo = config.ppo

    class OneProcess:
        num_processes = 1

        def reduce(self, tensor, reduction):
            return tensor

        def gather(self, tensor):
            return tensor

    own = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=config.kl.coefficient,
        loss_type=loss_type,
        epsilon_low=ppo.clip_range,
        epsilon_high=ppo.upper_clip_range if cispo_bound is None else cispo_bound,
        args=SimpleNamespace(delta=ppo.dual_clip_ratio, use_bias_correction_kl=False, steps_per_generation=1),
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=config.max_response_tokens,
        accelerator=OneProcess(),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(8, 1, dtype=torch.long),
        "prompt_mask": torch.ones(8, 1, dtype=torch.long),
        "completion_ids": torch.zeros(8, 6, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "old_logps": (old * mask).sum(-1),
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": weights,
    }
    return trainer._compute_loss(own, None, inputs)


def our_loss(new, old, reference, advantages, mask, config, *, weights=None):
    size = MiniBatchSize(num_tokens=int(mask.sum()), num_responses=8, max_response_tokens=config.max_response_tokens)
    tokens = SampledTokens(
        logprobs=old,
        reference_logprobs=reference,
        advantages=advantages.unsqueeze(-1).expand_as(new),
        importance_weights=torch.ones_like(old) if weights is None else weights,
        mask=mask,
    )
    terms = policy_loss(new, tokens, ppo=config.ppo, kl=config.kl, size=size)
    return terms.surrogate + (config.kl.coefficient * terms.kl if config.kl.place == "loss" else 0.0)


def config_of(algorithm, *, coefficient=0.04, **ppo):
    return AlignmentConfig.model_validate(
        {
            "algorithm": algorithm,
            "samples_per_prompt": 4,
            "prompts_per_step": 2,
            "max_response_tokens": 7,
            "ppo": {"mini_batch_size": 8, **ppo},
            "kl": {"coefficient": coefficient},
        }
    )


def assert_same_loss_and_gradient(theirs, ours, new):
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    (expected,) = torch.autograd.grad(theirs, new, retain_graph=True)
    (gradient,) = torch.autograd.grad(ours, new)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 1e-3


LOSSES = pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (config_of("grpo"), {"loss_type": "grpo"}),
        (config_of("grpo", clip_range_high=0.28, dual_clip_ratio=1.5), {"loss_type": "grpo"}),
        (config_of("dr_grpo"), {"loss_type": "dr_grpo"}),
        (config_of("dapo"), {"loss_type": "dapo"}),
        (config_of("gspo", clip_range=0.1, clip_range_high=0.2), {"loss_type": "grpo", "level": "sequence"}),
        (config_of("cispo", clip_range_high=1.0), {"loss_type": "cispo", "cispo_bound": 2.0}),
    ],
    ids=["grpo", "grpo-dual-clip", "dr_grpo", "dapo", "gspo", "cispo"],
)


@LOSSES
def test_the_loss_is_the_grpo_trainers(trl, config, arguments):
    new, *rest = tokens()
    theirs = trl_loss(trl.grpo, new, *rest, config, **arguments)
    assert_same_loss_and_gradient(theirs, our_loss(new, *rest, config), new)


@LOSSES
def test_the_loss_weighed_by_importance_is_the_grpo_trainers(trl, config, arguments):
    new, *rest = tokens()
    weights = 2.0 * torch.rand(8, 6, generator=torch.Generator().manual_seed(1))
    theirs = trl_loss(trl.grpo, new, *rest, config, weights=weights, **arguments)
    assert_same_loss_and_gradient(theirs, our_loss(new, *rest, config, weights=weights), new)


def test_the_loss_is_the_rloo_trainers(trl):
    new, *rest = tokens()
    config = config_of("rloo")
    theirs = trl_loss(trl.rloo, new, *rest, config, loss_type="rloo")
    assert_same_loss_and_gradient(theirs, our_loss(new, *rest, config), new)


def test_the_overlong_penalty_is_trls(trl):
    from trl.rewards import get_soft_overlong_punishment

    lengths = [1, 79, 80, 81, 99, 100, 130]
    theirs = get_soft_overlong_punishment(100, 20)([[0] * n for n in lengths])
    ours = overlong_penalty(torch.tensor(lengths), max_tokens=100, buffer_tokens=20)
    assert ours.tolist() == pytest.approx(theirs)


REWARDS = [[1.0, 2.0, 3.0, 6.0], [0.5, -0.25, 0.5, 0.125]]
ROWS = [{"prompt": "why ?"}] * 4 + [{"prompt": "how ?"}] * 4


def trl_trainer(trainer_class, config_class, tiny_policy, tokenizer, directory, *, beta=0.0, **arguments):
    """A real trainer of two prompts, each sampled four times, that is told our rewards."""
    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer_class(
            model=tiny_policy,
            reward_funcs=lambda completions, **_: [reward for group in REWARDS for reward in group],
            args=config_class(
                output_dir=str(directory),
                num_generations=4,
                per_device_train_batch_size=8,
                max_completion_length=4,
                beta=beta,
                use_cpu=True,
                bf16=False,
                report_to=[],
                **arguments,
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )


def sampled(trainer):
    """What it has just sampled, and made of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trainer._generate_and_score_completions(ROWS)


@pytest.mark.parametrize(("scale", "estimate"), [("group", group_zscores), ("none", group_centred)])
def test_group_advantages_are_the_grpo_trainers(scale, estimate, trl, tiny_policy, tokenizer, tmp_path):
    trainer = trl_trainer(trl.grpo, trl.trl.GRPOConfig, tiny_policy, tokenizer, tmp_path, scale_rewards=scale)
    torch.testing.assert_close(estimate(torch.tensor(REWARDS)), sampled(trainer)["advantages"].view(2, 4))


def test_leave_one_out_advantages_are_the_rloo_trainers(trl, tiny_policy, tokenizer, tmp_path):
    trainer = trl_trainer(trl.rloo, trl.trl.RLOOConfig, tiny_policy, tokenizer, tmp_path)
    torch.testing.assert_close(leave_one_out(torch.tensor(REWARDS)), sampled(trainer)["advantages"].view(2, 4))


def test_the_advantages_of_rewards_with_a_kl_are_the_rloo_trainers(trl, tiny_policy, tokenizer, tmp_path):
    config = config_of("rloo", coefficient=0.5)
    trainer = trl_trainer(trl.rloo, trl.trl.RLOOConfig, tiny_policy, tokenizer, tmp_path, beta=0.5)
    with torch.no_grad():  # a policy some tenths of a nat from its reference
        trainer.model.lm_head.weight.mul_(1.3)
    theirs = sampled(trainer)
    lengths = theirs["completion_mask"].sum(-1).tolist()
    samples = [
        Rollout(
            prompt=Prompt(id=f"p{i // 4}", messages=(), token_ids=tuple(prompt[prompt_mask.bool()].tolist())),
            sample_index=i % 4,
            response_ids=tuple(completion[:length].tolist()),
            response_text="",
            logprobs=(0.0,) * length,
            policy_version=0,
            finish_reason="stop",
        )
        for i, (prompt, prompt_mask, completion, length) in enumerate(
            zip(theirs["prompt_ids"], theirs["prompt_mask"], theirs["completion_ids"], lengths, strict=True)
        )
    ]
    packed = pack([sample.tokens for sample in samples])
    with torch.no_grad():
        logprobs, reference = (
            Policy(model)(packed, max(lengths), 1.0).tolist() for model in (trainer.model, trainer.ref_model)
        )
    plain_rewards = config.ppo.model_copy(update={"reward_transform": "none", "reward_clip": None})
    experience, metrics = experience_of_step(
        Rollouts.of(samples),
        [RewardScore(mean=r, std=0.0, objective_weights=(), objective_scores=()) for row in REWARDS for r in row],
        TokenEvaluations.of(
            [
                TokenEvaluation(logprobs=tuple(p[:n]), reference_logprobs=tuple(q[:n]), values=(0.0,) * n)
                for p, q, n in zip(logprobs, reference, lengths, strict=True)
            ]
        ),
        config.model_copy(update={"ppo": plain_rewards, "max_response_tokens": 4}),
        kl_coefficient=config.kl.coefficient,
        reward_scale=RewardScale(mean=0.0, std=1.0),
    )
    advantages = experience.advantages[experience.offsets[:-1]]  # of the first token; all of a response are equal
    torch.testing.assert_close(advantages, theirs["advantages"], atol=1e-4, rtol=1e-4)
    assert abs(metrics["kl/per_response"]) > 0.1
    assert (advantages - leave_one_out(torch.tensor(REWARDS)).flatten()).abs().max() > 0.1


def test_the_weights_of_what_an_engine_sampled_are_the_grpo_trainers(trl, tiny_policy, tokenizer, tmp_path):
    trainer = trl_trainer(
        trl.grpo,
        trl.trl.GRPOConfig,
        tiny_policy,
        tokenizer,
        tmp_path,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=2.0,
    )
    generate, engine = trainer._generate, []

    def as_an_engine(prompts):
        """Samples with the model, as if an engine had, to which every token has a probability of e^-4.6."""
        trainer.use_vllm = False
        prompt_ids, completion_ids, tool_mask, completions, _, *others = generate(prompts)
        trainer.use_vllm = True
        engine.extend([-4.6] * len(ids) for ids in completion_ids)
        return prompt_ids, completion_ids, tool_mask, completions, engine, *others

    trainer._generate = as_an_engine
    theirs = sampled(trainer)
    mask = theirs["completion_mask"].bool()
    weights = truncated_importance_weights(theirs["old_per_token_logps"], torch.full(mask.shape, -4.6), mask, cap=2.0)
    torch.testing.assert_close(theirs["importance_sampling_ratio"], weights)
    assert (weights == 2.0).any()
    assert (weights < 1.0).any()
