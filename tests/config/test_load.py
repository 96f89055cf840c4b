"""A recipe becomes a frozen configuration, or an error that says what is wrong with it."""

from typing import get_args

import pytest
from pydantic import ValidationError

from pipeline.config.algorithms import STANDARD_VALUES, Algorithm
from pipeline.config.alignment import AlignmentConfig, PPOConfig
from pipeline.config.load import RECIPES, load_recipe
from pipeline.config.models import OptimiserConfig
from pipeline.errors import ConfigError

MINIMAL = "name: mine\nobjectives: [helpfulness, safety]\n"


def write(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_overrides_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    path = write(tmp_path, MINIMAL + "alignment: {num_steps: 40, temperature: 0.9}\n")
    overrides = ["alignment.num_steps=50", "alignment.kl.target=6", "data.prompts=[a.jsonl,b.parquet]"]
    recipe = load_recipe(path, [*overrides, "data.sources=[{path: pairs.jsonl}]"])
    assert recipe.alignment.num_steps == 50
    assert recipe.alignment.temperature == 0.9
    assert recipe.alignment.top_p == 1.0
    assert recipe.alignment.kl.target == 6.0
    assert recipe.data.prompts == ("a.jsonl", "b.parquet")


def test_numbers_in_scientific_notation_are_numbers():
    assert load_recipe("tiny", ["reward.optimiser.learning_rate=1e-4"]).reward.optimiser == (
        load_recipe("tiny", ["reward.optimiser.learning_rate=0.0001"]).reward.optimiser
    )


def test_a_loaded_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("tiny").alignment.num_steps = 3


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_loads_under_its_own_name(name):
    assert load_recipe(name).name == name


def test_a_recipe_may_extend_another(tmp_path):
    write(tmp_path, MINIMAL + "alignment: {num_steps: 40, temperature: 0.9}\n", "base.yaml")
    path = write(tmp_path, f"extends: {tmp_path}/base.yaml\nname: child\nalignment: {{num_steps: 50}}\n")
    recipe = load_recipe(path)
    assert (recipe.name, recipe.alignment.num_steps, recipe.alignment.temperature) == ("child", 50, 0.9)
    assert recipe.objectives == ("helpfulness", "safety")


def test_a_prior_is_one_concentration_for_all_objectives_or_one_for_each():
    key = "reward.vrm.prior_alpha"
    assert load_recipe("tiny", [f"{key}=[4,1,1,2]"]).reward.vrm.prior_concentrations(4) == (4, 1, 1, 2)
    assert load_recipe("tiny", [f"{key}=2"]).reward.vrm.prior_concentrations(4) == (2, 2, 2, 2)
    with pytest.raises(ConfigError, match=r"prior_alpha has 2 numbers for 4 objectives.*brevity"):
        load_recipe("tiny", [f"{key}=[4,1]"])
    with pytest.raises(ConfigError, match=r"must lie between alpha_min = 0.05"):
        load_recipe("tiny", [f"{key}=[4,1,1,0.01]"])


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    write(tmp_path, f"extends: {tmp_path}/b.yaml\n", "a.yaml")
    write(tmp_path, f"extends: {tmp_path}/a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"in a circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe(f"{tmp_path}/a.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alignment.num_stps=50", "alignment.num_stps: unknown key; did you mean alignment.num_steps?"),
        ("alignment.ppo.clip=0.1", "alignment.ppo.clip: unknown key; did you mean alignment.ppo.clip_range?"),
        ("clster.rollout.workers=2", "clster: unknown key; did you mean cluster?"),
        ("clip_range=0.1", "clip_range: unknown key; did you mean alignment.ppo.clip_range?"),
        ("zzz=1", "zzz: unknown key; known at the top: name, seed, objectives,"),
        ("alignment.num_steps=many", "alignment.num_steps = 'many': input should be a valid integer"),
        ("alignment.num_steps=5.5", "alignment.num_steps = 5.5: input should be a valid integer"),
        ("alignment.num_steps=0", "alignment.num_steps = 0: input should be greater than or equal to 1"),
        ("alignment.num_steps=", "alignment.num_steps = None: input should be a valid integer"),
        ("policy.dtype=fp16", "policy.dtype = 'fp16': input should be 'float32' or 'bfloat16'"),
        ("sft.optimiser.learning_rate=inf", "learning_rate = 'inf': input should be a finite number"),
        ("alignment=5", "alignment = 5: this is a section; set one of its keys: num_steps, "),
        ("data.prompts=prompts.jsonl", "data.prompts = 'prompts.jsonl': this is a list; write [prompts.jsonl]"),
        ("objectives=[safety]", "objectives = ['safety']: give at least 2"),
        ("data.prompts=[a,7]", "data.prompts[1] = 7: input should be a valid string"),
        ("alignment.ppo.mini_batch_size=100", "is not a multiple of ppo.mini_batch_size = 100; change one"),
        ("reward.vrm.decoder=hadamard", "semantic_dims = 16; set reward.vrm.semantic_dims=4"),
        ("reward.loss={supervision: mse, supervision_on: expected_log}", "use supervision 'kl' or 'rank'"),
        ("reward={head: gate, loss: {supervision_on: expected_log}}", "'gate' has no posterior"),
        ("reward={head: gate, vrm: {decoder: mlp}}", "vrm.decoder = 'mlp' needs head = 'vrm'"),
        ("reward={loss: {score_weight: 0.1}, vrm: {decoder: film}}", "'film' has no objective scores"),
        ("reward.reward_weights=[1, 2]", "reward_weights belong to head = 'regression', not to 'vrm'"),
        ("reward={head: regression, reward_weights: [1, 2]}", "has 2 numbers for 4 objectives"),
        ("reward.pair_loss={form: ties, label_smoothing: 0.1}", "belongs to form 'bt', not to 'ties'"),
        ("alignment.num_steps", "'alignment.num_steps' is no override; write key.path=value"),
        ("=5", "'=5' is no override"),
        ("seed=${nope}", "overrides ['seed=${nope}']: Interpolation key 'nope' not found"),
        ("data.prompts=[a", "overrides ['data.prompts=[a']: while parsing"),
    ],
)
def test_a_bad_override_is_an_error_message(override, message):
    with pytest.raises(ConfigError) as error:
        load_recipe("tiny", [override])
    assert message in str(error.value)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        load_recipe("tiny", ["seed=x", "alignment.temperature=-1"])
    assert "seed = 'x'" in str(error.value)
    assert "alignment.temperature = -1" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [unclosed", r"mine\.yaml is no YAML"),
        ("- a\n- b\n", r"mine\.yaml holds a list"),
        ("", "name: must be given"),
        ("name: mine\n", "objectives: must be given"),
        (MINIMAL + "alignmnt: {}\n", "alignmnt: unknown key; did you mean alignment?"),
        ("extends: nosuch\n", "there is no recipe 'nosuch'"),
    ],
)
def test_a_bad_recipe_is_an_error_message(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_file_that_is_no_text_is_an_error_message(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_missing_recipe_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'tinny'. Did you mean 'tiny'\?.*smollm2_cpu"):
        load_recipe("tinny")
    with pytest.raises(ConfigError, match=r"recipe .*/no\.yaml does not exist"):
        load_recipe(f"{tmp_path}/no.yaml")


# --------------------------------------------------------------------------- algorithms

GROUP = "alignment.samples_per_prompt=8"


def test_an_algorithm_is_a_name_for_its_standard_values():
    dapo = load_recipe("tiny", ["alignment.algorithm=dapo", GROUP]).alignment
    assert (dapo.ppo.advantages, dapo.ppo.aggregation, dapo.ppo.drop_uniform_groups) == (
        "group_zscore",
        "token_mean",
        True,
    )
    assert (dapo.ppo.clip_range, dapo.ppo.upper_clip_range) == (0.2, 0.28)
    assert not dapo.ppo.trains_a_critic
    gspo = load_recipe("tiny", ["alignment.algorithm=gspo", GROUP]).alignment
    assert (gspo.ppo.ratio, gspo.ppo.clip_range, gspo.ppo.upper_clip_range) == ("geometric_mean", 3e-4, 4e-4)


def test_what_a_recipe_writes_wins_over_the_algorithm(tmp_path):
    path = write(
        tmp_path, MINIMAL + "alignment: {algorithm: grpo, samples_per_prompt: 4, ppo: {policy: {weight_decay: 0.0}}}\n"
    )
    grpo = load_recipe(path, ["alignment.kl.coefficient=0.001"]).alignment
    assert (grpo.kl.coefficient, grpo.kl.estimator, grpo.kl.place) == (0.001, "k3", "loss")
    assert (grpo.ppo.policy.learning_rate, grpo.ppo.policy.weight_decay) == (1e-6, 0.0)


@pytest.mark.parametrize("algorithm", STANDARD_VALUES)
def test_a_written_out_configuration_means_the_same_again(algorithm):
    config = AlignmentConfig(algorithm=algorithm, samples_per_prompt=2)
    assert AlignmentConfig.model_validate(config.model_dump(mode="json")) == config


def test_every_algorithm_has_standard_values_and_ppo_has_the_defaults():
    assert set(STANDARD_VALUES) == set(get_args(Algorithm))
    assert AlignmentConfig(algorithm="ppo") == AlignmentConfig()


def test_sections_built_in_python_count_as_written_where_they_were_set():
    config = AlignmentConfig(
        algorithm="dapo", samples_per_prompt=2, ppo=PPOConfig(clip_range=0.1, policy=OptimiserConfig(learning_rate=0.5))
    )
    assert (config.ppo.clip_range, config.ppo.upper_clip_range) == (0.1, 0.28)
    assert config.ppo.policy.learning_rate == 0.5


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"])
def test_a_group_of_one_is_refused(algorithm):
    with pytest.raises(ConfigError, match=rf"{algorithm} \(.*\) compares .* samples_per_prompt = 1 must be at least 2"):
        load_recipe("tiny", [f"alignment.algorithm={algorithm}"])


def test_ppo_and_reinforce_need_no_group():
    assert load_recipe("tiny", ["alignment.algorithm=reinforce_plus_plus"]).alignment.samples_per_prompt == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["alignment.algorithm=ppoo"], "alignment.algorithm = 'ppoo': input should be 'ppo', 'grpo', 'dr_grpo'"),
        (["alignment.algorithm=[ppo]"], "alignment.algorithm = ['ppo']: input should be 'ppo'"),
        (["alignment.kl.place=loss"], "alignment.kl: estimator = k1 in the loss has a gradient whose mean is zero"),
        (["alignment.ppo.dual_clip_ratio=1.1"], "dual_clip_ratio = 1.1 must exceed 1 + the upper clip range, 1.2"),
        (
            ["alignment.algorithm=cispo", GROUP, "alignment.ppo.dual_clip_ratio=3"],
            "dual_clip_ratio = 3.0 is for surrogate = clip, not cispo",
        ),
        (
            ["alignment.algorithm=gspo", GROUP, "alignment.ppo.clip_range=0.2"],
            "alignment.ppo: clip_range_high = 0.0004 is below clip_range = 0.2: one of them comes from",
        ),
        (["alignment.ppo.drop_uniform_groups=true"], "samples_per_prompt = 1 must be at least 2"),
        (["alignment.prefetch=continue"], "the policy before, so ppo.tis_cap must weigh them; 2 is usual"),
        (
            ["cluster.reward={ranks: 6, sequence_parallel: 4}"],
            "sequence_parallel = 4 does not divide ranks = 6; set sequence_parallel to one of 1, 2, 3, 6, or ranks to "
            "a multiple of 4 such as 8",
        ),
        (["cluster.rollout.gpus_per_worker=1.5"], "a part of one GPU or on whole ones, not on 1.5; set 1 or 2"),
        (
            ["cluster.rollout={gpus_per_worker: 2, tensor_parallel_size: 4}"],
            "tensor_parallel_size = 4 takes one GPU a shard, but gpus_per_worker = 2; set both to one number",
        ),
        (
            ["cluster.rollout={gpus_per_worker: 2, placement: colocated}"],
            "placement = colocated puts an engine on the GPU of one rank of the learner, and this one has 2 shards",
        ),
        (
            ["cluster.rollout={tensor_parallel_size: 2, weight_transfer: ipc}"],
            "weight_transfer = ipc puts an engine on the GPU of one rank of the learner, and this one has 2 shards",
        ),
        (["alignment.kl={coefficient: 0, target: 6}"], "and coefficient = 0 stays 0; give it a value to start from"),
        (["alignment.kl={target: 6, horizon: 10}"], "kl.horizon = 10 is so short that one step of"),
        (["benchmark.best_of=8", "benchmark.temperature=0"], "best_of = 8 at temperature = 0 samples the same answer"),
        (["cluster.rollout.autoscale.max_workers=4"], "autoscale compares who waits for whom"),
    ],
)
def test_choices_that_cannot_go_together_are_an_error_message(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_recipe("tiny", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "overrides", "own"),
    [
        ("name: mine\nobjectives: [kind, short]\n", (), True),
        ("extends: tiny\nname: mine\n", (), False),
        ("extends: tiny\nobjectives: [kind, short]\n", (), True),
        ("extends: tiny\n", ("objectives=[kind,short]",), True),
        ("extends: tiny\nown_objectives: true\n", (), True),
    ],
)
def test_objectives_are_the_users_own_unless_the_package_named_them(tmp_path, recipe, overrides, own):
    assert load_recipe(write(tmp_path, recipe), overrides).own_objectives == own
