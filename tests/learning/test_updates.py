import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.config.load import load_recipe
from pipeline.config.reward import PairLossConfig, VariationalLossConfig
from pipeline.data.prompts import PromptStream
from pipeline.errors import CheckpointError, NumericsError, ShapeError
from pipeline.evaluation.reward_scale import RewardScale
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.learning.engine import TorchEngine
from pipeline.learning.experience import build_experience
from pipeline.learning.rewarded_rows import reward_rows
from pipeline.learning.schedule import learning_rate_factor, warmup_factor
from pipeline.objectives.reward_comparison import relative_contributions
from pipeline.objectives.variational import sample_dirichlet, weight_supervision
from pipeline.records import Prompt, PromptGroup, RewardScore, Rollout, SamplingParams, TokenEvaluation
from pipeline.rollouts.prefetch import StepPlan
from pipeline.rollouts.published_versions import await_file
from pipeline.rollouts.torch_rollouts import TorchRollouts
from tests.support.experience import experience_of_step
from tests.support.fakes import FakeRollouts, FakeScorer
from tests.support.learners import ALIGNMENT, HEAD, collator, ppo_learner, prompts_of, reward_trainer, tokenised


class ShardOfMany(TorchEngine):
    """One rank of several, run alone: collects its gradient instead of stepping."""

    def __init__(self, *args, rank, world_size, **kwargs):
        super().__init__(*args, **kwargs)
        self.rank, self.world_size = rank, world_size

    def step(self, learning_rate_factor, *, resting=None):
        return 0.0


def gradients(engine):
    return {n: p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None}


def sharded_gradients(make_trainer, batch, world_size, run):
    total = {}
    for rank in range(world_size):

        def make_engine(*args, rank=rank, **kwargs):
            return ShardOfMany(*args, rank=rank, world_size=world_size, **kwargs)

        learner = make_trainer(make_engine)
        run(learner, batch)
        for name, gradient in gradients(learner.engine).items():
            total[name] = total.get(name, 0) + gradient
    return total


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def unevenly_annotated(pairs):
    """Every third pair without scores, every other third without one objective of the chosen response."""
    annotated = []
    for i, tokenised_pair in enumerate(pairs):
        pair = tokenised_pair.pair
        if i % 3 == 0:
            pair = replace(pair, scores_chosen=None, scores_rejected=None)
        if i % 3 == 1:
            partial = {name: score for name, score in pair.scores_chosen.items() if name != "honesty"}
            pair = replace(pair, scores_chosen=partial)
        annotated.append(replace(tokenised_pair, pair=pair))
    return annotated


@pytest.mark.parametrize(
    ("head", "loss"),
    [
        ("vrm", {}),
        ("gate", {"score_weight": 0.1}),
        ("regression", {}),
        ("vrm", {"supervision": "mse", "supervision_on": "sample", "target_from": "both"}),
        ("vrm", {"supervision": "rank", "supervision_on": "expected_log", "target_from": "diff", "free_bits": 0.01}),
        ("vrm", {"supervision": "mae", "kl_reduction": "mean", "kl_weight_w": 0.1, "kl_weight_z": 0.1}),
        ("bt", {"kl_reduction": "mean"}),
        ("bt_aux", {}),
        ("ensemble", {}),
    ],
)
def test_reward_gradients_of_1_2_and_4_shards_agree(head, loss, tiny_policy, world, tokenizer):
    loss = VariationalLossConfig(**loss)
    collate = replace(collator(world, tokenizer), target_from=loss.target_from)
    batch = collate(unevenly_annotated(tokenised(world, tokenizer)[:13]), step=3)

    def trainer(max_tokens):
        return lambda make_engine: reward_trainer(
            tiny_policy, world, tokenizer, head=head, loss=loss, make_engine=make_engine, max_tokens=max_tokens
        )

    def run(learner, batch):
        learner.update(batch, 3)

    whole = sharded_gradients(trainer(10_000), batch, 1, run)
    assert any(g.abs().max() > 1e-3 for g in whole.values())
    for world_size, max_tokens in ((1, 200), (2, 300), (4, 150), (4, 10_000)):
        assert_same(sharded_gradients(trainer(max_tokens), batch, world_size, run), whole)


def test_a_regression_head_learns_the_annotated_scores_and_nothing_else(tiny_policy, world, tokenizer):
    pairs, collate = tokenised(world, tokenizer)[:6], collator(world, tokenizer)
    batch = collate(pairs, step=0)
    learner = reward_trainer(tiny_policy, world, tokenizer, head="regression", num_steps=12)
    errors = [learner.update(batch, step)["train/score_error"] for step in range(12)]
    assert errors[0] == pytest.approx(batch.scores.square().mean().item(), rel=1e-5)  # it starts at 0
    assert errors[-1] < 0.5 * errors[0]
    silent = [replace(p, pair=replace(p.pair, scores_chosen=None, scores_rejected=None)) for p in pairs]
    learner = reward_trainer(tiny_policy, world, tokenizer, head="regression")
    assert learner.update(collate(silent, step=0), 0)["grad_norm"] == 0.0  # no pair loss without scores


def test_the_pair_loss_changes_the_gradient_and_not_the_metrics(tiny_policy, world, tokenizer):
    pairs = [
        replace(p, pair=replace(p.pair, margin=margin))
        for p, margin in zip(tokenised(world, tokenizer), (2.0, 0.0, 1.0, None), strict=False)
    ]
    batch = collator(world, tokenizer)(pairs, step=0)
    metrics = {
        form: reward_trainer(tiny_policy, world, tokenizer, head="bt", pair_loss=PairLossConfig(form=form)).update(
            batch, 0
        )
        for form in ("bt", "margin", "scaled", "ties")
    }
    assert len({m["train/nll"] for m in metrics.values()}) == 1
    assert len({m["grad_norm"] for m in metrics.values()}) == 4


def test_the_gradient_at_the_weight_head_is_logged_and_whether_the_step_was_clipped(tiny_policy, world, tokenizer):
    batch = collator(world, tokenizer)(tokenised(world, tokenizer)[:6], step=0)
    learner = reward_trainer(tiny_policy, world, tokenizer, max_tokens=100_000)
    seen = []
    learner.engine.module.head.weight_head.register_full_backward_hook(
        lambda module, _, gradients: seen.extend(gradients)
    )
    metrics = learner.update(batch, 0)
    [gradient] = seen
    assert metrics["train/weight_head_gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert metrics["clipped"] == float(metrics["grad_norm"] > 1.0)
    in_parts = reward_trainer(tiny_policy, world, tokenizer, max_tokens=1).update(batch, 0)
    assert in_parts["train/weight_head_gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert "train/weight_head_gradient_norm" not in reward_trainer(tiny_policy, world, tokenizer, head="bt").update(
        batch, 0
    )


def test_supervising_the_sample_supervises_the_weights_that_made_the_reward(tiny_policy, world, tokenizer):
    batch = collator(world, tokenizer)(tokenised(world, tokenizer)[:6], step=3)
    sampled = VariationalLossConfig(supervision_on="sample")
    metrics = reward_trainer(tiny_policy, world, tokenizer, loss=sampled).update(batch, 3)
    # At the start alpha is the prior's for every prompt, so the draws are those of the seeds alone.
    weights = sample_dirichlet(torch.full((6, 4), 30.0), batch.noise_seeds)
    loss = weight_supervision(batch.target, batch.target_mask, weights.log(), "kl")
    assert metrics["train/supervision"] == pytest.approx(loss.mean().item(), rel=1e-3)


def samples_of(learner, world, tokenizer):
    rollouts = FakeRollouts(tokenizer)
    rollouts.load_weights(learner.publish_weights(0))
    prompts = PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0).batch(0, 3)
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=12, samples_per_prompt=3, seed=1)
    return rollouts.generate(prompts, sampling)


def experience_of(learner, world, tokenizer):
    return experience_from(learner, samples_of(learner, world, tokenizer))


def rewarded(samples):
    scores = FakeScorer().score([s.prompt.messages for s in samples], [s.response_text for s in samples])
    return reward_rows(samples, scores, ALIGNMENT, RewardScale(mean=0.0, std=1.0))[0]


def experience_from(learner, samples):
    evaluated, _ = learner.evaluate(samples)
    return build_experience(evaluated, rewarded(samples), ALIGNMENT, kl_coefficient=0.05)[0]


@pytest.mark.parametrize("critic", ["separate", "value_head"])
def test_ppo_gradients_of_1_2_and_4_shards_agree(critic, tiny_policy, world, tokenizer, tmp_path):
    ppo = ALIGNMENT.ppo.model_copy(update={"mini_batch_size": 9, "epochs": 1, "critic": critic})
    config = ALIGNMENT.model_copy(update={"ppo": ppo})
    experience = experience_of(ppo_learner(tiny_policy, world, tokenizer, tmp_path), world, tokenizer)

    def learner(max_tokens):
        budget = config.model_copy(update={"max_tokens_per_micro_batch": max_tokens})
        return lambda make_engine: ppo_learner(
            tiny_policy, world, tokenizer, tmp_path, config=budget, make_engine=make_engine
        )

    def run(learner, experience):
        learner.update(experience, 0)

    whole = sharded_gradients(learner(10_000), experience, 1, run)
    assert any(g.abs().max() > 1e-4 for g in whole.values())
    for world_size, max_tokens in ((1, 60), (2, 60), (4, 10_000)):
        assert_same(sharded_gradients(learner(max_tokens), experience, world_size, run), whole)


def test_the_first_ppo_step_starts_at_ratio_one(tiny_policy, world, tokenizer, tmp_path):
    ppo = ALIGNMENT.ppo.model_copy(update={"mini_batch_size": 9, "epochs": 1})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=ALIGNMENT.model_copy(update={"ppo": ppo}))
    metrics = learner.update(experience_of(learner, world, tokenizer), 0)
    assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ppo/clip_fraction"] == 0.0
    assert metrics["ppo/approximate_kl"] == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < metrics["ppo/entropy"] <= math.log(len(tokenizer))


def test_evaluation_equals_the_policy_and_its_own_reference_at_the_start(tiny_policy, world, tokenizer, tmp_path):
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path)
    rollouts = FakeRollouts(tokenizer)
    rollouts.load_weights(learner.publish_weights(0))
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=12, samples_per_prompt=1, seed=1)
    samples = rollouts.generate(prompts_of(world, tokenizer)[:5], sampling)
    for sample, evaluation in zip(samples, learner.evaluate_tokens(samples), strict=True):
        assert len(evaluation.logprobs) == len(sample.response_ids)
        assert evaluation.logprobs == pytest.approx(evaluation.reference_logprobs, abs=1e-5)
        assert set(evaluation.values) == {0.0}


def test_the_learner_divides_logits_by_the_temperature_that_the_engine_sampled_at(
    tiny_policy, world, tokenizer, tmp_path
):
    ppo = ALIGNMENT.ppo.model_copy(update={"mini_batch_size": 8, "epochs": 1})
    config = ALIGNMENT.model_copy(update={"ppo": ppo, "temperature": 0.7})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    rollouts = TorchRollouts(tiny_policy, dtype="float32")
    rollouts.load_weights(learner.publish_weights(0))
    stream = PromptStream(prompts=tuple(prompts_of(world, tokenizer)), seed=0)
    prompts, sampling = StepPlan(prompts=stream, config=config).batch(0)
    assert sampling.temperature == 0.7
    samples = rollouts.generate(prompts, sampling)
    for sample, evaluation in zip(samples, learner.evaluate_tokens(samples), strict=True):
        assert evaluation.logprobs == pytest.approx(sample.logprobs, abs=1e-4)
        assert evaluation.reference_logprobs == pytest.approx(sample.logprobs, abs=1e-4)
    metrics = learner.update(experience_from(learner, samples), 0)
    assert metrics["ppo/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["ppo/approximate_kl"] == pytest.approx(0.0, abs=1e-6)


def test_the_entropy_of_an_update_is_that_of_the_logits_at_the_sampling_temperature(
    tiny_policy, world, tokenizer, tmp_path
):
    def sharpened(policy):
        """Logits of a random model are all alike; ten times as large they are not."""
        with torch.no_grad():
            policy.model.norm.weight.mul_(10.0)
        return policy

    ppo = ALIGNMENT.ppo.model_copy(update={"mini_batch_size": 9, "epochs": 1})
    config = ALIGNMENT.model_copy(update={"ppo": ppo, "temperature": 0.7})
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path, config=config)
    sharpened(learner.engine.module.policy)
    samples = samples_of(learner, world, tokenizer)
    policy = sharpened(AutoModelForCausalLM.from_pretrained(tiny_policy)).eval()
    entropies = []
    for sample in samples:
        with torch.no_grad():
            logits = policy(torch.tensor([[*sample.prompt.token_ids, *sample.response_ids]])).logits[0]
        before_each_token = logits[len(sample.prompt.token_ids) - 1 : -1]
        entropies.extend(torch.distributions.Categorical(logits=before_each_token / 0.7).entropy().tolist())
    entropy = learner.update(experience_from(learner, samples), 0)["ppo/entropy"]
    assert entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    assert entropy < 0.9 * math.log(len(tokenizer))


def rollout(tokens, text="", finish="stop", logprobs=None):
    prompt = Prompt(id="p", messages=({"role": "user", "content": "why ?"},), token_ids=(1, 2))
    return Rollout(
        prompt=prompt,
        sample_index=0,
        response_ids=tuple(tokens),
        response_text=text,
        logprobs=tuple(logprobs or [0.0] * len(tokens)),
        policy_version=0,
        finish_reason=finish,
    )


@pytest.mark.parametrize(
    ("gae_lambda", "discount", "first_advantage"),
    [
        (1.0, 1.0, 0.35),  # -.35 + .7
        (0.5, 1.0, 0.0),  # -.35 + .5 * .7
        (0.5, 0.5, -0.3),  # -.1 + .5 * .25 - .5 = -.475, and .25 * .7
    ],
)
def test_experience_by_hand(gae_lambda, discount, first_advantage):
    estimator = {"gae_lambda": gae_lambda, "discount": discount, "whiten_advantages": False}
    ppo = ALIGNMENT.ppo.model_copy(update=estimator | {"reward_clip": 2.0, "missing_eos_penalty": 1.0})
    evaluations = [
        TokenEvaluation(logprobs=(-1.0, -1.0), reference_logprobs=(-2.0, -1.5), values=(0.5, 0.25)),
        TokenEvaluation(logprobs=(-3.0,), reference_logprobs=(-3.0,), values=(0.0,)),
    ]
    scores = [RewardScore(mean=m, std=0.0, objective_weights=(), objective_scores=()) for m in (3.0, 101.0)]
    experience, metrics = experience_of_step(
        Rollouts.of([rollout((7, 8), logprobs=(-1.0, -1.1)), rollout((9,), finish="length", logprobs=(-3.0,))]),
        scores,
        TokenEvaluations.of(evaluations),
        ALIGNMENT.model_copy(update={"ppo": ppo, "max_response_tokens": 2}),
        kl_coefficient=0.1,
        reward_scale=RewardScale(mean=1.0, std=2.0),
    )
    # z-scores 1 and 50 -> 2 (clipped); the second was cut: 2 - 1 = 1.
    # row 0: R = (-.1 * 1, -.1 * .5 + 1) = (-.1, .95); gamma = 1: delta = (-.1 + .25 - .5, .95 - .25) = (-.35, .7)
    torch.testing.assert_close(experience.critic.returns, torch.tensor([first_advantage + 0.5, 0.95, 1.0]))
    torch.testing.assert_close(experience.advantages, torch.tensor([first_advantage, 0.7, 1.0]))
    assert experience.num_response_tokens == 3
    assert tuple(experience.sequences) == (
        PromptGroup(prompt_ids=(1, 2), response_ids=((7, 8),)),
        PromptGroup(prompt_ids=(1, 2), response_ids=((9,),)),
    )
    assert metrics["kl/per_response"] == pytest.approx((1.0 + 0.5 + 0.0) / 2)
    assert metrics["engine_gap/max"] == pytest.approx(0.1)
    assert metrics["response/stopped"] == 0.5


def test_of_two_equal_rewards_the_uncertain_one_pays_less_where_the_recipe_asks_for_the_lower_bound():
    ppo = ALIGNMENT.ppo.model_copy(update={"reward_transform": "lcb", "lcb_coefficient": 2.0})
    experience, metrics = experience_of_step(
        Rollouts.of([rollout((7,)), rollout((8,))]),
        [scored(mean=3.0, std=0.5), scored(mean=3.0)],
        TokenEvaluations.of([evaluated(), evaluated()]),
        ALIGNMENT.model_copy(update={"ppo": ppo, "max_response_tokens": 2}),
        kl_coefficient=0.1,
        reward_scale=RewardScale(mean=1.0, std=2.0),
    )
    # (3 - 2 * .5 - 1) / 2 and (3 - 1) / 2
    assert experience.critic.returns.tolist() == [0.5, 1.0]
    assert metrics["reward/shaped"] == 0.75
    assert metrics["reward/mean"] == 3.0
    assert metrics["reward/posterior_std"] == 0.25


@pytest.mark.parametrize("head", ["vrm", "gate", "regression"])
def test_contributions_of_a_saved_model_add_up_to_the_reward_above_its_held_out_mean(
    head, tiny_policy, world, tokenizer, tmp_path
):
    trainer = reward_trainer(tiny_policy, world, tokenizer, head=head)
    collate, heldout = collator(world, tokenizer), tokenised(world, tokenizer, "heldout")
    for step in range(3):
        trainer.update(collate(tokenised(world, tokenizer)[:8], step), step)
    trainer.evaluate(collate(heldout, 0))
    trainer.export(str(tmp_path))
    scorer = RewardModelScorer.load(str(tmp_path), max_tokens_per_batch=512)
    card = scorer.card
    assert sum(card.mean_contributions) == pytest.approx(card.reward_mean, abs=1e-6)
    pairs = [pair.pair for pair in heldout]
    scores = scorer.score(
        [pair.prompt for pair in pairs] * 2, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    )
    relative = [relative_contributions(score, card.mean_contributions) for score in scores]
    for score, parts in zip(scores, relative, strict=True):
        assert sum(parts) == pytest.approx(score.mean - card.reward_mean, abs=1e-5)
    # Of the mean held-out response, no objective adds anything.
    for column in zip(*relative, strict=True):
        assert sum(column) / len(column) == pytest.approx(0.0, abs=1e-5)


def test_a_reward_that_is_no_sum_over_objectives_has_no_mean_contributions(tiny_policy, world, tokenizer):
    trainer = reward_trainer(tiny_policy, world, tokenizer, head="bt_aux")
    trainer.evaluate(collator(world, tokenizer)(tokenised(world, tokenizer, "heldout"), 0))
    assert trainer.card.mean_contributions == ()


def test_an_evaluation_measures_the_mean_and_compares_it_with_a_sample(tiny_policy, world, tokenizer):
    learner = reward_trainer(tiny_policy, world, tokenizer)
    batch = collator(world, tokenizer)(tokenised(world, tokenizer)[:8], step=0)
    first = learner.evaluate(batch)
    other_noise = learner.evaluate(replace(batch, noise_seeds=batch.noise_seeds + 1))
    changed = {name for name in first if first[name] != other_noise[name]}
    assert (
        {"eval/sampled_nll"}
        <= changed
        <= {"eval/sampled_nll", "eval/sampled_accuracy", "alarm/latent_bypass", "eval/alarms"}
    )
    assert "alarm/memorised_prompts" not in first  # no update to compare with
    learner.update(batch, 0)
    assert "alarm/memorised_prompts" in learner.evaluate(batch)


def test_a_gate_learns_and_its_weights_follow_their_target(tiny_policy, world, tokenizer):
    learner = reward_trainer(tiny_policy, world, tokenizer, head="gate", num_steps=12, max_tokens=100_000)
    batch = collator(world, tokenizer)(tokenised(world, tokenizer)[:32], step=0)
    metrics = [learner.update(batch, step) for step in range(12)]
    assert metrics[0]["train/nll"] == pytest.approx(math.log(2), abs=0.15)
    assert metrics[-1]["train/nll"] < 0.5
    assert metrics[-1]["train/supervision"] < metrics[0]["train/supervision"]
    assert metrics[-1]["train/kl_w"] == metrics[-1]["train/kl_z"] == 0.0
    evaluated = learner.evaluate(batch)
    assert evaluated["eval/active_units"] >= 2
    assert "eval/concentration" not in evaluated


@pytest.mark.parametrize(
    "changed", [{}, {"decoder": "mlp"}, {"decoder": "film"}, {"weight_param": "mean_conc"}], ids=str
)
def test_training_lowers_the_loss_and_exposes_no_collapse_at_the_default_weight(changed, tiny_policy, world, tokenizer):
    config = HEAD.model_copy(update=changed)
    learner = reward_trainer(tiny_policy, world, tokenizer, vrm=config, num_steps=12, max_tokens=100_000)
    batch = collator(world, tokenizer)(tokenised(world, tokenizer)[:32], step=0)
    losses = [learner.update(batch, step)["train/nll"] for step in range(12)]
    assert losses[0] == pytest.approx(math.log(2), abs=0.15)
    assert losses[-1] < 0.5
    metrics = learner.evaluate(batch)
    assert metrics["eval/active_units"] >= 2
    assert metrics["eval/margin"] > 0.1


def test_the_literal_objective_collapses_and_the_default_weight_does_not(tiny_policy, world, tokenizer):
    """docs/method.md section 3: at KL weight 1 the optimum is a constant reward. Accuracy alone would not tell."""
    paper = load_recipe("paper_literal").reward
    literal = paper.loss
    assert (literal.kl_weight_w, literal.kl_weight_z, literal.kl_warmup_fraction) == (1.0, 1.0, 0.0)
    batch = collator(world, tokenizer)(tokenised(world, tokenizer)[:32], step=0)

    def trained(loss, vrm):
        learner = reward_trainer(
            tiny_policy,
            world,
            tokenizer,
            num_steps=60,
            loss=loss.model_copy(update={"supervision_weight": 0.0, "score_weight": 0.0}),
            vrm=vrm.model_copy(update={"semantic_dims": HEAD.semantic_dims, "hidden_size": HEAD.hidden_size}),
            max_tokens=100_000,
            lr=3e-3,
        )
        for step in range(60):
            # Fresh noise each step, as in training: with one fixed draw the model would memorise the noise.
            metrics = learner.update(replace(batch, noise_seeds=batch.noise_seeds + 1000 * step), step)
        return metrics | learner.evaluate(batch)

    collapsed, useful = trained(literal, paper.vrm), trained(VariationalLossConfig(), HEAD)
    assert collapsed["train/kl_w"] + collapsed["train/kl_z"] < 0.1
    assert collapsed["eval/nll"] == pytest.approx(math.log(2), abs=0.01)
    assert collapsed["eval/sampled_nll"] == pytest.approx(math.log(2), abs=0.05)  # one draw of 32 pairs
    assert collapsed["eval/margin"] < 0.02
    assert collapsed["eval/accuracy"] > 0.8
    assert (collapsed["alarm/z_collapse"], useful["alarm/z_collapse"]) == (1.0, 0.0)
    assert collapsed["eval/active_units"] == 0
    assert useful["train/kl_w"] + useful["train/kl_z"] > 1.0
    assert useful["train/nll"] < 0.5
    assert useful["eval/margin"] > 0.5
    assert useful["eval/active_units"] >= 2


@pytest.mark.parametrize(
    "loss", [{}, {"supervision": "rank", "supervision_on": "expected_log"}, {"supervision": "mse"}], ids=str
)
def test_no_annotation_and_no_supervision_weight_train_the_same_model(loss, tiny_policy, world, tokenizer):
    pairs = tokenised(world, tokenizer)[:8]
    batch = collator(world, tokenizer)(pairs, step=0)
    unannotated = [replace(p, pair=replace(p.pair, scores_chosen=None, scores_rejected=None)) for p in pairs]
    bare = collator(world, tokenizer)(unannotated, step=0)
    states = []
    for weight, rows in ((0.0, batch), (0.1, bare), (0.1, batch)):
        config = VariationalLossConfig(supervision_weight=weight, score_weight=weight, **loss)
        learner = reward_trainer(tiny_policy, world, tokenizer, loss=config)
        for step in range(2):
            learner.update(rows, step)
        states.append(dict(learner.engine.stream().tensors))
    without_weight, without_scores, supervised = states
    assert all(torch.equal(without_weight[name], without_scores[name]) for name in without_weight)
    assert not all(torch.equal(without_weight[name], supervised[name]) for name in without_weight)


def test_the_learning_rate_warms_up_and_decays_to_zero():
    factors = [learning_rate_factor(s, num_steps=10, warmup_fraction=0.2) for s in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert 0 < factors[9] < 0.05
    assert [warmup_factor(s, num_steps=10, warmup_fraction=0.4) for s in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_a_diverged_step_is_not_taken(tiny_policy, world, tokenizer):
    learner = reward_trainer(tiny_policy, world, tokenizer)
    before = {n: p.clone() for n, p in learner.engine.module.named_parameters()}
    loss = sum(p.sum() for p in learner.engine.module.parameters()) * float("inf")
    learner.engine.backward(loss, last=True)
    with pytest.raises(NumericsError, match="gradient norm is"):
        learner.engine.step(1.0)
    assert all(torch.equal(p, before[n]) for n, p in learner.engine.module.named_parameters())


def test_a_checkpoint_of_another_model_is_refused(tiny_policy, world, tokenizer, tmp_path):
    reward_trainer(tiny_policy, world, tokenizer, head="bt").snapshot().write(str(tmp_path))
    with pytest.raises(CheckpointError, match="does not restore this model"):
        reward_trainer(tiny_policy, world, tokenizer, head="vrm").restore(str(tmp_path))


def scored(mean=0.0, std=0.0):
    return RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())


def evaluated(logprobs=(-1.0,), values=(0.0,)):
    return TokenEvaluation(logprobs=logprobs, reference_logprobs=(-1.0,) * len(logprobs), values=values)


@pytest.mark.parametrize(
    ("rollouts", "scores", "evaluations", "error", "message"),
    [
        ([rollout((7,))], [], [evaluated()], ShapeError, "1 rollouts and 0 scores"),
        ([rollout(())], [scored()], [evaluated((), ())], ShapeError, "prompt 'p', sample 0: 0 response tokens"),
        ([rollout((7,))], [scored()], [evaluated(values=(0.0, 0.0))], ShapeError, "1 learner logprobs, .* 2 values"),
        ([rollout((7,))], [scored(mean=math.nan)], [evaluated()], NumericsError, "1 of 2 reward mean .*first nan"),
        ([rollout((7,), text="why")], [scored()], [evaluated((-math.inf,))], NumericsError, "first -inf.*begins 'why'"),
    ],
)
def test_a_batch_that_would_poison_the_update_is_refused_by_name(rollouts, scores, evaluations, error, message):
    with pytest.raises(error, match=message):
        experience_of_step(
            Rollouts.of(rollouts),
            scores,
            TokenEvaluations.of(evaluations),
            ALIGNMENT.model_copy(update={"max_response_tokens": 2}),
            kl_coefficient=0.1,
            reward_scale=RewardScale(mean=0.0, std=1.0),
        )


def test_a_policy_is_published_in_the_dtype_it_computes_in_and_exported_as_it_is_trained(
    tiny_policy, world, tokenizer, tmp_path
):
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path / "published", dtype="bfloat16")
    published = load_file(f"{learner.publish_weights(0).location}/model.safetensors")
    learner.export(str(tmp_path / "result"))
    exported = load_file(tmp_path / "result" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert exported.keys() <= published.keys()  # an engine wants lm_head.weight, too
    assert all(torch.equal(published[name], exported[name].bfloat16()) for name in exported)


def test_the_two_latest_policies_stay_published(tiny_policy, world, tokenizer, tmp_path):
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path)
    for version in (0, 1, 2, 9, 3):  # 9 is the rest of a killed run
        weights = learner.publish_weights(version)
        assert weights.version == version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy-000003"]
    learner.publish_weights(4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy-000003", "policy-000004"]


def test_a_file_that_follows_holds_the_policy_that_was_sent(tiny_policy, world, tokenizer, tmp_path):
    learner = ppo_learner(tiny_policy, world, tokenizer, tmp_path)
    # Cloned: version 2 will be written over the pages of version 0.
    plain = load_file(f"{learner.publish_weights(0).location}/model.safetensors")
    plain = {name: tensor.clone() for name, tensor in plain.items()}
    weights = learner.publish_weights(1, file_follows=True)
    assert weights.file_follows
    assert weights.probes == learner.publish_weights(1, file_follows=True).probes
    sent = {name: tensor.clone() for name, tensor in learner.policy_tensors()}
    with torch.no_grad():
        for parameter in learner.engine.module.parameters():
            parameter.add_(1.0)  # the next update comes before the file
    learner.write_due_file()  # nothing is due any more
    await_file(weights.location, 30.0)
    followed = load_file(f"{weights.location}/model.safetensors")
    assert followed.keys() == sent.keys() == plain.keys()
    assert all(torch.equal(followed[name], sent[name]) and torch.equal(sent[name], plain[name]) for name in sent)
    # Nobody was sent this one.
    weights = learner.publish_weights(2, file_follows=True)
    learner.write_due_file()
    await_file(weights.location, 30.0)
    moved = load_file(f"{weights.location}/model.safetensors")
    assert all(torch.equal(moved[name], plain[name] + 1.0) for name in plain)
