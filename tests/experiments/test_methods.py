"""The plan of a comparison of methods, its measurements, and its tables, on literal numbers."""

import json

import pytest

from pipeline.benchmark.alpaca_eval.annotations import Annotations
from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError, DataError
from pipeline.experiments.findings import FinishedRun
from pipeline.experiments.grid import Run, Variant
from pipeline.experiments.method_measurements import heldout_examples, training_budget
from pipeline.experiments.method_tables import as_markdown, comparison_tables, reading, win_rate, with_judgments
from pipeline.experiments.methods import METHODS, judge_of, plan_cells
from pipeline.loops.reward import reward_stage
from pipeline.loops.sft import sft_stage


def cells(methods, seeds=(0,), overrides=()):
    return plan_cells("table1_tiny", overrides, methods, seeds)


def test_every_method_meets_every_seed_and_the_cells_of_a_seed_share_policy_data_and_judge():
    planned = cells(["dpo", "kto", "ppo", "vrm_ppo"], seeds=(0, 1))
    assert [(cell.variant.name, cell.seed) for cell in planned[:4]] == [
        ("dpo", 0),
        ("kto", 0),
        ("ppo", 0),
        ("vrm_ppo", 0),
    ]
    of_seed_0 = [cell.recipe for cell in planned if cell.seed == 0]
    policies = {sft_stage(recipe).fingerprint for recipe in of_seed_0}
    assert len(policies) == 1
    assert len({reward_stage(judge_of(recipe), *policies).fingerprint for recipe in of_seed_0}) == 1
    assert len({cell.config_hash for cell in planned}) == 8


def test_ppo_and_vrm_ppo_differ_in_the_head_of_their_reward_model_alone():
    ppo, vrm_ppo = (cell.recipe for cell in cells(["ppo", "vrm_ppo"]))
    assert (ppo.reward.head, vrm_ppo.reward.head) == ("bt", "vrm")
    assert ppo.alignment == vrm_ppo.alignment
    assert judge_of(ppo).reward.head == "vrm"


def test_a_method_added_later_leaves_the_other_cells_as_they_are():
    before = {cell.variant.name: cell.config_hash for cell in cells(["dpo", "ppo"])}
    after = {cell.variant.name: cell.config_hash for cell in cells(["simpo", "ppo", "dpo"])}
    assert before.items() <= after.items()


def test_settings_of_a_method_reach_its_cells_alone_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: table1_tiny\ncomparison: {settings: {dpo: [alignment.direct.beta=0.3]}}\n")
    dpo, kto = (c.recipe.alignment.direct for c in plan_cells(str(recipe), (), ["dpo", "kto"], [0]))
    assert (dpo.beta, kto.beta) == (0.3, 0.1)
    (dpo,) = plan_cells(str(recipe), ["alignment.direct.beta=0.7"], ["dpo"], [0])
    assert dpo.recipe.alignment.direct.beta == 0.7


def test_the_benchmarks_of_rewards_are_part_of_a_cell(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "why ?", "chosen": "a", "rejected": "b"}\n')
    named = [f"comparison.reward_benchmarks=[{{name: mine, files: [{pairs}]}}]"]
    first = plan_cells("table1_tiny", named, ["dpo"], [0])[0].config_hash
    assert first != cells(["dpo"])[0].config_hash
    pairs.write_text('{"prompt": "why ?", "chosen": "a", "rejected": "c"}\n')
    assert plan_cells("table1_tiny", named, ["dpo"], [0])[0].config_hash != first


@pytest.mark.parametrize("override", ["alignment.algorithm=dpo", "reward.head=bt", "seed=3", "alignment.pairs=policy"])
def test_what_the_comparison_varies_cannot_be_set(override):
    with pytest.raises(ConfigError, match="the comparison varies it itself"):
        cells(["dpo"], overrides=[override])


def test_every_method_is_a_recipe_that_loads():
    assert len(cells(list(METHODS))) == len(METHODS)


# ----------------------------------------------------------------------------- budget


def test_the_budget_of_direct_alignment_is_what_its_log_says():
    (cell,) = cells(["selective_dpo"])
    rows = [
        {"step": 0, "rows": 64.0, "tokens": 900.0},
        {"step": 1, "rows": 64.0, "tokens": 1100.0},
        {"step": 1, "eval/loss": 0.5},
    ]
    budget = training_budget(cell.recipe, rows, [{}, {"data/train_rows": 32.0}], num_pairs=64)
    assert budget == {
        "budget/pairs": 32.0,
        "budget/pair_passes": 128.0,
        "budget/steps": 2.0,
        "budget/trained_tokens": 2000.0,
        "budget/sampled_tokens": 0.0,
    }


def test_the_budget_of_ppo_counts_what_it_samples_and_the_pairs_of_its_reward_model():
    (cell,) = cells(["ppo"], overrides=["reward.num_steps=10", "reward.batch_pairs=8"])
    config = cell.recipe.alignment
    responses = config.prompts_per_step * config.samples_per_prompt
    budget = training_budget(cell.recipe, [{"response/tokens": 10.0}] * 3, [{}], num_pairs=64)
    assert budget["budget/pairs"] == 64.0
    assert budget["budget/pair_passes"] == 80.0
    assert budget["budget/sampled_tokens"] == 30.0 * responses
    assert budget["budget/trained_tokens"] == 30.0 * responses * config.ppo.epochs
    assert budget["budget/steps"] == 3 * config.ppo.epochs * responses / config.ppo.mini_batch_size


def test_held_out_pairs_are_grouped_by_the_kind_of_their_prompt(world):
    examples = heldout_examples(world.heldout_pairs(), world.gold)
    assert {example.subset for example in examples} <= {"plan", "factual", "risky", "quick"}
    assert examples[0].chosen == (world.heldout_pairs()[0].chosen,)


# ----------------------------------------------------------------------------- tables


def finished(method, seed, gold, accuracy=0.75, **changes):
    """A cell of four prompts whose answers changed by `gold`."""
    budget = dict.fromkeys(("pairs", "pair_passes", "steps", "trained_tokens", "sampled_tokens", "seconds"), 10.0)
    metrics = {
        "words/aligned": 11.0,
        "words/base": 10.0,
        "kl/to_start": 2.5,
        "response/finished": 1.0,
        "table2/held-out pairs/accuracy": accuracy,
        "table2/held-out pairs/accuracy/low": accuracy - 0.1,
        "table2/held-out pairs/accuracy/high": accuracy + 0.1,
        **{f"budget/{name}": value for name, value in budget.items()},
    }
    return FinishedRun(
        run=Run(
            trains="method",
            variant=Variant(name=method, overrides=()),
            seed=seed,
            recipe=load_recipe("table1_tiny"),
            config_hash=f"{method}{seed}",
        ),
        result={
            "metrics": metrics | changes,
            "curve": [],
            "prompts": [f"p{i}" for i in range(len(gold))],
            "margins": {"gold": gold, "reward": [-g for g in gold]},
            "seconds": 10.0,
        },
    )


def test_the_win_rate_pools_the_prompts_of_all_seeds_and_a_tie_is_one_half():
    runs = [finished("dpo", 0, [1.0, 1.0, 0.0, -1.0]), finished("dpo", 1, [1.0, 1.0, 1.0, 1.0])]
    value, low, high = win_rate(runs, "gold")
    assert value == pytest.approx(6.5 / 8)
    assert low < value < high


def test_the_tables_hold_every_method_with_each_seed():
    runs = [finished("dpo", s, [1.0, 1.0, 0.0, -1.0], accuracy=a) for s, a in ((0, 0.7), (1, 0.8))]
    tables = comparison_tables([*runs, finished("ppo", 0, [1.0] * 4)])
    rates = tables["table1"]["dpo"]["win_rates"]
    assert rates["gold"]["value"] == pytest.approx(0.625)
    assert rates["reward"]["value"] == pytest.approx(0.375)
    assert set(rates["gold"]["by_seed"]) == {0, 1}
    accuracy = tables["table2"]["dpo"]["held-out pairs/accuracy"]
    assert accuracy["mean"] == pytest.approx(0.75)
    assert accuracy["by_seed"] == [0.7, 0.8]
    assert accuracy["low"] == pytest.approx(0.75 - 12.706 * 0.05, abs=1e-3)  # t of two seeds
    json.dumps(tables, allow_nan=False)


def test_one_seed_has_the_interval_of_its_rows():
    row = comparison_tables([finished("dpo", 0, [1.0] * 4)])["table2"]["dpo"]["held-out pairs/accuracy"]
    assert (row["low"], row["high"]) == (pytest.approx(0.65), pytest.approx(0.85))


def test_a_metric_without_an_interval_is_shown_without_one():
    run = finished("dpo", 0, [1.0] * 4)
    del run.result["metrics"]["table2/held-out pairs/accuracy/low"]
    text = as_markdown(comparison_tables([run]))
    assert "| dpo | 75.0 |" in text


def test_the_markdown_has_length_and_kl_beside_every_win_rate():
    text = as_markdown(comparison_tables([finished("dpo", 0, [1.0, 1.0, 1.0, -1.0]), finished("ppo", 0, [1.0] * 4)]))
    assert "| method | gold win rate % | VRM win rate % | words (start) | KL to the start | finished |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| ppo | 100.0")]
    assert "| 11.0 (10.0) | 2.50 | 100% |" in row
    assert "| ppo | 10 | 10 | 10 | 10 | 10 | 10 |" in text


@pytest.mark.parametrize(
    ("gold", "verdict", "above"),
    [
        ([1.0] * 4, "beats the start", "1 of 1"),
        ([-1.0] * 4, "loses to the start", "0 of 1"),
        ([1.0, -1.0, 1.0, -1.0], "is not told from the start", "0 of 1"),
    ],
)
def test_the_reading_of_a_row_follows_its_interval(gold, verdict, above):
    sentence = reading("dpo", [finished("dpo", 0, gold)])
    assert sentence.startswith(f"dpo {verdict} by gold")
    assert f"in {above} seeds" in sentence
    assert "10% longer, at a KL of 2.5 nats" in sentence
    assert "orders 75% of the held-out pairs" in sentence


def annotations(preferences, instructions=("P0", "p1", "p2", "p3")):
    return Annotations(
        baseline="base",
        model="aligned",
        instructions=instructions,
        preferences=preferences,
        baseline_lengths=[1] * len(instructions),
        model_lengths=[1] * len(instructions),
    )


def test_another_judge_adds_a_column_of_mean_probabilities():
    run = with_judgments(finished("dpo", 0, [1.0, 1.0, -1.0, -1.0]), annotations([1.9, 1.6, None, 1.0]))
    assert win_rate([run], "judge")[0] == pytest.approx((0.9 + 0.6 + 0.0) / 3)
    assert "| gold win rate % | VRM win rate % | judge win rate % |" in as_markdown(comparison_tables([run]))


def test_a_prompt_that_was_not_judged_is_named():
    with pytest.raises(DataError, match="dpo, seed 0, lack 1 of 4 prompts, first 'p3'"):
        with_judgments(finished("dpo", 0, [1.0] * 4), annotations([1.9, 1.6, 1.0], ("p0", "p1", "p2")))


def test_without_the_truth_the_reward_model_judges():
    run = finished("dpo", 0, [-1.0] * 4)
    del run.result["margins"]["gold"]
    assert reading("dpo", [run]).startswith("dpo beats the start by VRM")
    assert "gold win rate" not in as_markdown(comparison_tables([run]))
