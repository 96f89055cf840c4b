"""The experiments job: what is finished is never computed again, and what failed does not take the others with it."""

import io
import json
from dataclasses import asdict, replace

import pytest

from actors.alignment_tasks import align_one, prepare_policy, train_shared_reward_model
from actors.experiment_tasks import train_one
from actors.frozen_state_tasks import compute_missing_states, keep_states, states_of
from actors.ray_tasks import ProcessResources
from jobs.experiments import compute_on_the_cluster, demand_of, experiment_command, run_experiment
from pipeline.config.load import load_recipe
from pipeline.data.run_data import load_data
from pipeline.errors import CheckpointError, ConfigError, CorruptManifest, NumericsError, WorkerError
from pipeline.experiments.grid import EXPERIMENTS
from pipeline.learning.reward_data import RewardData
from pipeline.models.backbone import load_tokenizer
from tests.experiments.test_findings import result
from tests.experiments.test_policy_findings import aligned

parse = experiment_command.options

SMALL = (
    "data.planted.num_train_pairs=64",
    "data.planted.num_heldout_pairs=16",
    "reward.num_steps=4",
    "reward.batch_pairs=8",
    "reward.eval_every=2",
    "policy.tiny.hidden_size=16",
    "policy.tiny.intermediate_size=16",
    "cluster.reward.cpus_per_rank=2",
)

ONE_CORE = ProcessResources(cpus=1.0, gpus=0.0, data_root="")
BFLOAT16 = "reward.backbone_dtype=bfloat16"


SMALL_ALIGNMENT = (
    *SMALL,
    *("data.planted.num_sft_texts=64", "data.planted.num_train_prompts=32", "data.planted.num_heldout_prompts=8"),
    *("sft.num_steps=2", "sft.batch_size=8"),
    *("alignment.num_steps=3", "alignment.prompts_per_step=8", "alignment.ppo.mini_batch_size=4"),
    *("alignment.max_response_tokens=12", "benchmark.max_response_tokens=12"),
)


def options_of(name, out, *more):
    return parse([name, "--out", str(out), "--seeds", "0", "1", *more])


def texts_of(recipe, policy):
    """Every prompt with a response that a run reads: to this prompt, or held-out to another."""
    data = load_data(recipe)
    mismatched = [pair.pair for pair in RewardData.of(recipe, data, load_tokenizer(policy)).mismatched_heldout_pairs]
    assert mismatched
    pairs = [*data.train_pairs, *data.heldout_pairs, *mismatched]
    return {(str(pair.prompt), response) for pair in pairs for response in (pair.chosen, pair.rejected)}


class Fake:
    """Computes at once, in reverse order, and remembers what it was asked for."""

    def __init__(self, failing=()):
        self.failing = failing
        self.computed = []

    def __call__(self, runs, out):
        for index, run in reversed(list(enumerate(runs))):
            self.computed.append((run.variant.name, run.seed))
            if (run.variant.name, run.seed) in self.failing:
                yield index, NumericsError("a gradient is not finite")
            else:
                yield index, result([1.0, -1.0, float(run.seed)])


def test_a_second_call_computes_only_what_is_missing(tmp_path):
    first, second, third = Fake(failing=[("gate", 1)]), Fake(), Fake()
    with pytest.raises(WorkerError, match=r"(?s)1 of 12 runs failed.*gate, seed 1: NumericsError: a gradient"):
        run_experiment(options_of("heads", tmp_path), first)
    assert len(first.computed) == 12
    assert len((tmp_path / "heads.csv").read_text().splitlines()) == 1 + 11
    table = run_experiment(options_of("heads", tmp_path), second)
    assert second.computed == [("gate", 1)]
    assert "12 runs, seeds 0, 1" in table
    run_experiment(options_of("label_noise", tmp_path), third)
    assert len(third.computed) == 20 - 4  # vrm and bt without noise stand in heads
    assert {path.name for path in tmp_path.iterdir()} >= {
        "heads.csv",
        "heads.txt",
        "heads.png",
        "heads_curves.png",
        "label_noise.csv",
    }


def test_a_committed_run_says_what_it_was(tmp_path):
    run_experiment(options_of("collapse", tmp_path), Fake())
    for path in (tmp_path / "runs").iterdir():
        record = json.loads(path.read_text())
        assert path.stem == record["config_hash"]
        assert record["config"]["seed"] == record["seed"]
        assert "cluster" not in record["config"]
        assert record["versions"]["torch"]


def test_a_result_that_cannot_be_read_is_named(tmp_path):
    run_experiment(options_of("collapse", tmp_path), Fake())
    broken = next((tmp_path / "runs").iterdir())
    broken.write_text("{}")
    with pytest.raises(CorruptManifest, match=f"{broken.name} is no result of a run .*Delete it"):
        run_experiment(options_of("collapse", tmp_path), Fake())


def test_a_dry_run_lists_the_runs_and_what_each_holds(tmp_path):
    table = run_experiment(options_of("heads", tmp_path, "--dry-run", "reward.num_steps=3"), Fake())
    assert table.count("seed 1  ensemble") == 1
    assert "training run" in table
    assert list(tmp_path.iterdir()) == []


def test_bad_input_ends_before_anything_is_computed(tmp_path, capsys):
    with pytest.raises(ConfigError, match="varies it itself"):
        run_experiment(options_of("heads", tmp_path, "reward.head=bt"), Fake())
    with pytest.raises(ConfigError, match="seeds are whole numbers"):
        options_of("heads", tmp_path, "two")
    with pytest.raises(SystemExit, match="2"):
        experiment_command(["heads", "--recipe", "tinny", "--out", str(tmp_path)])
    assert "Did you mean 'tiny'?" in capsys.readouterr().err


def test_a_run_holds_what_the_recipe_gives_all_ranks():
    demand = demand_of(load_recipe("experiments_tiny", ["cluster.reward={ranks: 2, cpus_per_rank: 1}"]))
    assert (demand.count, demand.cpus, demand.gpus) == (1, 2.0, 0.0)


def test_files_are_an_experiment_too_with_a_frozen_backbone_in_bfloat16(world, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in world.train_pairs()))
    overrides = [
        *(f"data.sources=[{{path: {pairs}}}]", "data.heldout_fraction=0.3"),
        *("reward.trainable_layers=0", "reward.backbone_dtype=bfloat16"),
    ]
    outcome = train_one(load_recipe("experiments_tiny", [*SMALL, *overrides]), ONE_CORE)
    assert len(outcome["prompts"]) == len(outcome["margins"]["mean"]) > 5
    assert "reasons/weight_correlation" not in outcome["metrics"]  # nobody knows the truth
    assert outcome["metrics"]["eval/accuracy"] >= 0.0


def test_alignments_are_reported_by_their_gold_reward(tmp_path, capsys):
    def one_arm_fails(runs, out):
        assert out == str(tmp_path)
        for index, run in enumerate(runs):
            failed = run.variant.name == "vrm, KL 0"
            yield index, NumericsError("a gradient is not finite") if failed else aligned()

    with pytest.raises(WorkerError, match="2 of 16 runs failed"):
        run_experiment(options_of("overoptimization", tmp_path), one_arm_fails)
    assert "16/16  vrm lcb, KL 0, seed 1  gold win rate 0.500" in capsys.readouterr().out
    assert "vrm lcb, KL 0" in (tmp_path / "overoptimization.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        *(
            "overoptimization.csv",
            "overoptimization_curves.csv",
            "overoptimization.txt",
            "overoptimization.png",
            "overoptimization_curves.png",
            "runs",
        ),
    }


def test_arms_with_and_without_supervision_start_alike_and_learn_from_other_reward_models(tmp_path, monkeypatch):
    whole = EXPERIMENTS["supervised_alignment"]
    two = replace(whole, variants=tuple(v for v in whole.variants if v.name in ("weights and scores", "nothing")))
    monkeypatch.setitem(EXPERIMENTS, "supervised_alignment", two)

    def in_this_process(runs, out):
        for index, run in enumerate(runs):
            policy = prepare_policy(run.recipe, out, ONE_CORE)
            reward_model = train_shared_reward_model(run.recipe, policy, out, ONE_CORE)
            yield index, align_one(run.recipe, policy, reward_model, ONE_CORE)

    command = ["supervised_alignment", "--out", str(tmp_path), "--seeds", "0", *SMALL_ALIGNMENT]
    words = run_experiment(parse(command), in_this_process)
    assert "weights and scores: the gold reward ends" in words
    records = {r["variant"]: r for r in (json.loads(p.read_text()) for p in (tmp_path / "runs").iterdir())}
    supervised, free = records["weights and scores"], records["nothing"]
    assert [point["step"] for point in supervised["curve"]] == [0.0, 1.0, 2.0]
    assert supervised["curve"][0]["gold/mean"] == free["curve"][0]["gold/mean"]
    assert supervised["curve"][0]["reward/mean"] != free["curve"][0]["reward/mean"]
    assert run_experiment(parse(command), Fake()) == words  # all is committed: the fake has nothing to compute


def test_alignments_without_a_known_truth_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="compares the reward with the planted truth"):
        run_experiment(options_of("overoptimization", tmp_path, "data.sources=[{path: mine.jsonl}]"), Fake())


def test_states_of_a_frozen_backbone_are_computed_once_for_all_seeds_and_labels(tiny_policy, tmp_path, monkeypatch):
    overrides = [*SMALL, f"policy.checkpoint={tiny_policy}", "reward.trainable_layers=0"]
    recipe = load_recipe("experiments_tiny", overrides)
    flipped = load_recipe("experiments_tiny", [*overrides, "data.label_flips=0.4", "reward.head=bt"])
    states = str(tmp_path / "states")
    counts = [list(compute_missing_states([recipe], ONE_CORE, states, shard, 2)) for shard in (0, 1)]
    (zero, first), (also_zero, second) = (of_shard[0] for of_shard in counts)
    assert (zero, also_zero, first + second) == (0, 0, len(texts_of(recipe, tiny_policy)))
    assert [of_shard[-1] for of_shard in counts] == [(first, first), (second, second)]
    assert min(first, second) > 40
    assert list(compute_missing_states([recipe, flipped], ONE_CORE, states, 0, 1)) == [(0, 0)]
    as_needed = train_one(recipe, ONE_CORE)
    assert {"reasons/weight_correlation", "reasons/decisive_pairs"} <= as_needed["metrics"].keys()
    monkeypatch.delattr("pipeline.models.reward_model.packed_states")  # from here on no trainer can compute any
    looked_up = train_one(recipe, ONE_CORE, states)
    assert looked_up["margins"]["mean"] == pytest.approx(as_needed["margins"]["mean"], abs=1e-5)
    assert looked_up["metrics"]["train/accuracy"] == as_needed["metrics"]["train/accuracy"]
    assert train_one(flipped, ONE_CORE, states)["metrics"]["eval/accuracy"] >= 0.0
    with pytest.raises(NameError):  # another precision is another function
        train_one(load_recipe("experiments_tiny", [*overrides, BFLOAT16]), ONE_CORE, states)
    too_small = load_recipe("experiments_tiny", [*overrides, "cluster.states_gib=1e-6"])
    with pytest.raises(ConfigError, match=r"more than cluster\.states_gib = 1e-06. Raise it"):
        list(compute_missing_states([too_small], ONE_CORE, states, 0, 1))
    [damaged, *_] = (tmp_path / "states").glob("*/*.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read.*Delete it to compute it again"):
        train_one(recipe, ONE_CORE, states)


def test_a_backbone_that_trains_or_starts_from_noise_has_no_states(tiny_policy):
    frozen, given = "reward.trainable_layers=0", f"policy.checkpoint={tiny_policy}"
    places = [states_of(load_recipe("experiments_tiny", overrides), "states") for overrides in ([frozen], [given], [])]
    assert places == [None, None, None]
    assert states_of(load_recipe("experiments_tiny", [frozen, given]), "states").startswith("states/")


@pytest.mark.components
def test_a_small_grid_trains_for_real_over_the_cluster(tmp_path, local_ray, monkeypatch):
    whole = EXPERIMENTS["heads"]
    two = replace(whole, variants=tuple(v for v in whole.variants if v.name in ("vrm", "ensemble")))
    monkeypatch.setitem(EXPERIMENTS, "heads", two)
    table = run_experiment(parse(["heads", "--out", str(tmp_path), "--seeds", "0", *SMALL]), compute_on_the_cluster)
    assert "ensemble min" in table
    records = {r["variant"]: r for r in (json.loads(p.read_text()) for p in (tmp_path / "runs").iterdir())}
    assert set(records) == {"vrm", "ensemble"}
    vrm, ensemble = records["vrm"], records["ensemble"]
    assert vrm["prompts"] == ensemble["prompts"]
    assert (set(vrm["margins"]), set(ensemble["margins"])) == ({"mean", "lcb"}, {"mean", "lcb", "min"})
    assert -1.0 <= vrm["metrics"]["reasons/weight_correlation"] <= 1.0
    assert "reasons/weight_correlation" not in ensemble["metrics"]
    assert ensemble["metrics"]["eval/posterior_std"] > 0.0
    assert [point["step"] for point in vrm["curve"]] == [2.0, 4.0]

    def nothing_to_do(runs, out):
        raise AssertionError("everything is finished")

    run_experiment(parse(["heads", "--out", str(tmp_path), "--seeds", "0", *SMALL]), nothing_to_do)


@pytest.mark.components
def test_a_pass_over_frozen_states_tells_how_far_it_is(tiny_policy, tmp_path, local_ray):
    overrides = [*SMALL, f"policy.checkpoint={tiny_policy}", "reward.trainable_layers=0"]
    recipe = load_recipe("experiments_tiny", overrides)
    console = io.StringIO()
    keep_states([recipe], demand_of(recipe), str(tmp_path), max_restarts=0, name="experiments", console=console)
    count = len(texts_of(recipe, tiny_policy))
    size = f"{count * 2 * 64 * 4 / 2**20:.1f} MiB"  # prompt and response, 64 dimensions in float32
    last = console.getvalue().splitlines()[-1]
    assert f"experiments           {count}/{count}  states of the frozen backbone, {size}  " in last
    assert last.endswith(" responses/s  0:00 left")
    console = io.StringIO()
    keep_states([recipe], demand_of(recipe), str(tmp_path), max_restarts=0, name="experiments", console=console)
    assert console.getvalue() == ""


@pytest.mark.components
@pytest.mark.long
def test_arms_of_a_seed_align_for_real_from_one_policy_and_against_one_reward_model(tmp_path, local_ray, monkeypatch):
    whole = EXPERIMENTS["overoptimization"]
    two = replace(whole, variants=tuple(v for v in whole.variants if v.name in ("vrm", "vrm lcb")))
    monkeypatch.setitem(EXPERIMENTS, "overoptimization", two)
    # Behind the test above: its processes are warm.
    command = parse(["overoptimization", "--out", str(tmp_path), "--seeds", "0", *SMALL_ALIGNMENT])
    assert "vrm lcb minus vrm" in run_experiment(command, compute_on_the_cluster)
    shared = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").glob("*/manifest.json")}
    assert sorted(path.parent.name.split("-")[0] for path in shared) == ["sft", "train_reward_model"]
    places = {json.loads(path.read_text())["variant"]: path for path in (tmp_path / "runs").iterdir()}
    mean, lcb = (json.loads(places[name].read_text()) for name in ("vrm", "vrm lcb"))
    assert mean["prompts"] == lcb["prompts"]
    assert len(mean["margins"]["gold"]) == len(mean["prompts"]) == 8
    assert [point["step"] for point in mean["curve"]] == [0.0, 1.0, 2.0]
    # Both begin with the same policy, the same prompts and the same luck; what they are rewarded for differs.
    assert mean["curve"][0] == lcb["curve"][0]
    assert mean["curve"][0]["kl/per_response"] == pytest.approx(0.0, abs=1e-5)
    assert mean["metrics"]["gold/base"] == lcb["metrics"]["gold/base"]
    assert mean["metrics"]["reward/shaped"] != lcb["metrics"]["reward/shaped"]
    assert mean["metrics"]["engine_gap/max"] < 1e-4

    places["vrm lcb"].unlink()
    run_experiment(command, compute_on_the_cluster)
    again = json.loads(places["vrm lcb"].read_text())
    assert (again["curve"], again["margins"]) == (lcb["curve"], lcb["margins"])
    assert {path: path.stat().st_mtime_ns for path in shared} == shared
