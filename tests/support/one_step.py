"""One update of every learner, as something that any engine can run and any other can be compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config.alignment import PPOConfig
from pipeline.config.models import OptimiserConfig, TinyModelConfig
from pipeline.config.reward import RewardConfig
from pipeline.config.sft import SFTConfig
from pipeline.data.collate import tokenise_texts
from pipeline.learning import builders
from pipeline.learning.builders import DirectTrainerSpec, PPOLearnerSpec, RewardTrainerSpec, SFTTrainerSpec
from pipeline.learning.engine import TorchEngine
from pipeline.learning.training_state import SavedState, trained_parameters
from pipeline.models.backbone import create_tiny_causal_lm, save_causal_lm
from pipeline.models.critic import PolicyWithCritic
from pipeline.rollouts.numerics_gate import choose_probes
from tests.learning.test_updates import experience_from, samples_of
from tests.support.learners import (
    ALIGNMENT,
    HEAD,
    collator,
    direct_config,
    direct_data,
    prompts_of,
    statistics_of,
    tokenised,
    untrained_reward_model,
)

FOUR_HEADS = TinyModelConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=64, max_positions=128
)
"""Two ranks have a key-value head each; four ranks share two."""

OPTIMISER = OptimiserConfig(learning_rate=1e-3, max_grad_norm=1e9, warmup_fraction=0.0)
"""Nothing is clipped, so Adam's first moment after a step from the start is a tenth of the gradient."""


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """A learner, what it trains on in its first step, and what it evaluates before. Can be pickled."""

    name: str
    spec: Any
    batch: Any
    heldout: Any

    def learner(self, make_engine: Callable[..., Any], make_reference: Callable[..., Any]) -> Any:
        arguments = (make_reference,) if self.name == "ppo" else ()
        kind = {"ppo": "ppo_learner"}.get(self.name, f"{self.name}_trainer")
        return getattr(builders, f"build_{kind}")(self.spec, _with_a_value_head(make_engine), *arguments)


def _with_a_value_head(make_engine):
    """A value head starts at zero, and then no gradient reaches the critic's backbone."""

    def make(module, *arguments, **options):
        if isinstance(module, PolicyWithCritic):
            torch.nn.init.normal_(module.value_head.weight, generator=torch.Generator().manual_seed(1))
        return make_engine(module, *arguments, **options)

    return make


def four_headed_policy(tokenizer, directory):
    model = create_tiny_causal_lm(FOUR_HEADS, tokenizer, seed=0)
    save_causal_lm(model.state_dict(), model.config, tokenizer, directory)
    return directory


def step_of(name, policy, world, tokenizer, directory, *, lora=None, pooling="last", max_tokens=80, recompute=False):
    """The step of a stage, on the policy of a directory; direct alignment always recomputes activations."""
    match name:
        case "sft":
            texts = tokenise_texts(world.sft_texts()[:8], tokenizer, max_length=128)
            config = SFTConfig(num_steps=4, optimiser=OPTIMISER, max_tokens_per_micro_batch=max_tokens, lora=lora)
            spec = SFTTrainerSpec(config=config, policy_uri=policy, dtype="float32", seed=0)
            return OneStep(name=name, spec=spec, batch=texts[:5], heldout=texts[5:])
        case "reward":
            pairs, collate = tokenised(world, tokenizer), collator(world, tokenizer)
            config = RewardConfig(
                vrm=HEAD,
                optimiser=OPTIMISER,
                max_tokens_per_micro_batch=2 * max_tokens,
                pooling=pooling,
                gradient_checkpointing=recompute,
                lora=lora,
            )
            spec = RewardTrainerSpec(
                config=config, backbone_uri=policy, statistics=statistics_of(world), num_steps=4, seed=0
            )
            # A step behind the warm-up of the KL terms.
            return OneStep(name=name, spec=spec, batch=collate(pairs[:5], 3), heldout=collate(pairs[5:9], 0))
        case "direct":
            config = direct_config("wpo", optimiser=OPTIMISER.model_dump(), lora=lora)
            data = direct_data(world, tokenizer, config)
            spec = DirectTrainerSpec(
                config=config,
                policy_uri=policy,
                dtype="float32",
                num_steps=4,
                max_tokens_per_micro_batch=2 * max_tokens,
                gradient_checkpointing=True,
                seed=0,
            )
            alone = builders.build_direct_trainer(spec, TorchEngine)
            # A reference other than the policy: equal margins have no sign.
            batch = data.with_references(lambda groups: 0.9 * alone.logprobs(groups)).batch(0)
            return OneStep(name=name, spec=spec, batch=batch, heldout=batch)
        case "ppo":
            return _ppo_step(policy, world, tokenizer, directory, lora=lora, max_tokens=max_tokens, recompute=recompute)
    raise AssertionError(name)


def _ppo_step(policy, world, tokenizer, directory, *, lora, max_tokens, recompute):
    """With adapters the reference is the policy without them; else it is a model of its own, and so is the critic."""
    critic = "separate" if lora is None else "value_head"
    ppo = PPOConfig(epochs=1, mini_batch_size=9, policy=OPTIMISER, critic=critic, critic_learning_rate=1e-3, lora=lora)
    probes = choose_probes(prompts_of(world, tokenizer), vocabulary_size=len(tokenizer), seed=0, count=2)
    untrained_reward_model(policy, f"{directory}/reward model")
    memory = {"max_tokens_per_micro_batch": max_tokens, "gradient_checkpointing": recompute}
    spec = PPOLearnerSpec(
        config=ALIGNMENT.model_copy(update={"ppo": ppo} | memory),
        policy_uri=policy,
        reward_model_uri=f"{directory}/reward model",
        dtype="float32",
        probes=tuple(probes),
        publish_directory=f"{directory}/published",
        seed=0,
    )
    alone = OneStep(name="ppo", spec=spec, batch=None, heldout=None).learner(
        TorchEngine, builders.reference_in_process("float32", "cpu")
    )
    samples = samples_of(alone, world, tokenizer)
    return OneStep(name="ppo", spec=spec, batch=experience_from(alone, samples), heldout=samples)


def take(step: OneStep, learner, directory):
    """Evaluates, updates and writes the training state, as each rank does; returns what it evaluated and measured."""
    evaluated = evaluated_by(step, learner)
    metrics = learner.update(step.batch, 0)
    learner.snapshot().write(directory)
    return evaluated, metrics


def evaluated_by(step, learner):
    """Metrics, or what PPO says of every token, as names with numbers."""
    if step.name != "ppo":
        return learner.evaluate(step.heldout)
    evaluated = learner.evaluate_tokens(step.heldout)
    fields = ("logprobs", "reference_logprobs", "values")
    return {f"{field} {i}": x for field in fields for i, x in enumerate(getattr(evaluated, field).values.tolist())}


def first_moments(directory, module):
    """A tenth of the gradient of every trained parameter, from a training state after one step."""
    return saved_numbers("exp_avg", directory, module)


def saved_numbers(kind, directory, module):
    """What a training state holds of every trained parameter: its "weight", or a moment of the optimiser."""
    parameters = trained_parameters(module)
    with SavedState(directory, {name: tuple(p.shape) for name, p in parameters.items()}) as saved:
        return {name: saved.read(kind, name, 0, p.numel()) for name, p in parameters.items()}


def largest_gap(ours, theirs):
    """Largest distance of two gradients of a parameter, relative to its norm, or a thousandth of all where larger."""
    assert ours.keys() == theirs.keys()
    floor = 1e-3 * float(torch.cat([g.flatten() for g in theirs.values()]).norm())
    return max(float((ours[n] - theirs[n]).norm()) / max(floor, float(theirs[n].norm())) for n in theirs)
