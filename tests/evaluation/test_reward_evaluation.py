"""From rewards to the table, on a handful of rows by hand and on published rows rated by their length."""

import hashlib
import json
import math

import pyarrow.parquet as pq
import pytest

from pipeline.data.evaluation_examples import EvaluationExample, read_examples
from pipeline.errors import DataError
from pipeline.evaluation import reward_evaluation
from pipeline.evaluation.reward_evaluation import as_json, evaluation_table, survey
from pipeline.evaluation.rewardbench import SUBSETS_2
from pipeline.evaluation.scored_rows import RewardedResponse, ScoredComparison, ScoredRows, key_number
from tests.support.paths import SHARED_DATA


def scored(chosen, rejected, *, subset="all", name="r", prompt="p", std=0.0, lengths=(1, 1), **changes):
    """A row with rewards; single numbers make a pair."""
    chosen, rejected = ([side] if isinstance(side, float | int) else side for side in (chosen, rejected))
    fields = {
        "id": name,
        "subset": subset,
        "source": "mine",
        "content_key": as_key(name),
        "prompt_key": as_key(prompt),
        "cut": False,
        "annotators_tie": False,
        "chosen": tuple(RewardedResponse(reward=r, characters=lengths[0]) for r in chosen),
        "rejected": tuple(RewardedResponse(reward=r, characters=lengths[1]) for r in rejected),
        "margin_std": std,
        "log_odds": chosen[0] - rejected[0],
    }
    return ScoredComparison(**{**fields, **changes})


def as_key(text):
    return key_number(hashlib.sha256(text.encode()).hexdigest()[:16])


def evaluate(rows, benchmark, **options):
    return reward_evaluation.evaluate(ScoredRows.of(rows), benchmark, answer_threshold=None, **options)


def differences_of(rows, others, benchmark, **options):
    return reward_evaluation.metric_differences(ScoredRows.of(rows), ScoredRows.of(others), benchmark, **options)


def values(estimates):
    return {name: estimate.value for name, estimate in estimates.items()}


def test_pairs_by_hand():
    rows = [
        scored(2, 1, subset="a", prompt="1", lengths=(9, 4)),
        scored(1, 1, subset="a", prompt="2", lengths=(9, 4), cut=True),
        scored(0, 3, subset="b", prompt="3", lengths=(2, 4)),
        scored(5, 3, subset="b", prompt="4", lengths=(4, 4)),
    ]
    evaluation = evaluate(rows, "pairs", seed=0)
    assert (evaluation.rows, evaluation.prompts, evaluation.responses, evaluation.cut) == (4, 4, 8, 1)
    assert values(evaluation.accuracies) == {"accuracy": 0.5, "accuracy_tie_half": 0.625, "ties": 0.25}
    assert evaluation.longer_is_better == {"accuracy": 0.5, "accuracy_tie_half": 0.625, "ties": 0.25}
    assert evaluation.diagnostics["mean_abs_margin"].value == pytest.approx((1 + 0 + 3 + 2) / 4)
    assert evaluation.subsets["a"]["accuracy"] == 0.5
    assert evaluation.subsets["b"]["rows"] == 2.0
    assert 0 <= evaluation.subsets["b"]["low"] < 0.5 < evaluation.subsets["b"]["high"] <= 1


def test_rows_the_annotators_could_not_decide_are_left_out_of_a_second_number_only():
    rows = [scored(2, 1, prompt="1"), scored(0, 1, prompt="2", annotators_tie=True), scored(1, 1, prompt="3")]
    accuracies = values(evaluate(rows, "pairs", seed=0).accuracies)
    assert accuracies["accuracy_tie_half"] == pytest.approx(1.5 / 3)
    assert accuracies["annotators_decided"] == pytest.approx(1.5 / 2)


def test_best_of_n_by_hand():
    rows = [scored(2, [1, 0, 1]), scored(2, [2, 0, 2], prompt="q"), scored(0, [1, -1, -1], prompt="s")]
    evaluation = evaluate(rows, "best_of_n", seed=0)
    assert values(evaluation.accuracies) == pytest.approx({"accuracy": 1 / 3, "accuracy_tie_shared": (1 + 1 / 3) / 3})
    assert evaluation.diagnostics == {}


def test_rewardbench_counts_a_tie_as_wrong_in_its_sections():
    rows = [
        scored(1, 0, subset="hep-go", prompt="1"),
        scored(1, 1, subset="hep-go", prompt="2"),
        scored(1, 0, subset="math-prm", prompt="3"),
        scored(0, 1, subset="mine", prompt="4"),
    ]
    accuracies = values(evaluate(rows, "rewardbench", seed=0).accuracies)
    assert accuracies["Reasoning"] == pytest.approx((164 * 0.5 + 984 * 1.0) / (164 + 984))
    assert accuracies["score"] == accuracies["Reasoning"]  # the only section there is
    assert accuracies["accuracy"] == 0.5  # over all rows, foreign ones too


def test_rewardbench_2_averages_best_of_4_and_ties():
    rows = [
        scored(2, [1, 0, 1], subset="Math", prompt="1"),
        scored(0, [1, 0, 1], subset="Math", prompt="2"),
        scored(1, [1, 0, 0], subset="Focus", prompt="3"),
        scored([5], [0], subset="Ties", name="ref:1", prompt="4"),
        scored([5, 5], [0], subset="Ties", name="tied:1", prompt="5"),
    ]
    evaluation = evaluate(rows, "rewardbench2", seed=0)
    assert values(evaluation.accuracies) == pytest.approx(
        {"Math": 0.5, "Focus": 0.5, "Ties": 1.0, "score": (0.5 + 0.5 + 1.0) / 3}
    )
    # Both rows of a number are drawn together, so no draw tears the perfect pair apart.
    assert (evaluation.accuracies["Ties"].low, evaluation.accuracies["Ties"].high) == (1.0, 1.0)


def test_rm_bench_by_hand():
    rows = [scored([1, 2, 3], [1, 2, 3], subset="chat"), scored([9, 9, 9], [1, 2, 3], subset="code", prompt="q")]
    accuracies = values(evaluate(rows, "rm_bench", seed=0).accuracies)
    assert accuracies == pytest.approx(
        {"easy": 1.0, "normal": 0.5, "hard": 0.5, "chat": 1 / 3, "code": 1.0, "score": 2 / 3}
    )


def test_two_models_are_compared_on_the_same_draws():
    ours = [scored(1.0 if n < 630 else -1.0, 0.0, prompt=str(n)) for n in range(1000)]
    theirs = [scored(1.0 if n < 600 else -1.0, 0.0, prompt=str(n)) for n in range(1000)]
    differences = differences_of(ours, theirs, "pairs", seed=0)
    assert differences["accuracy"].value == pytest.approx(0.03)
    assert 0.015 < differences["accuracy"].low < differences["accuracy"].high < 0.045
    assert differences["nll"].high < 0
    with_itself = differences_of(ours[:20], ours[:20], "pairs", seed=0)["accuracy"]
    assert (with_itself.value, with_itself.low, with_itself.high) == (0.0, 0.0, 0.0)


def test_a_model_with_a_posterior_is_compared_with_one_without():
    differences = differences_of([scored(2, 1, std=0.3)], [scored(0, 1)], "pairs", seed=0)
    assert differences["accuracy"].value == 1.0
    assert "aurc/std" not in differences


def test_the_other_models_file_may_name_its_subsets_otherwise():
    ours = [scored(2, 1, subset="hep-go"), scored(0, 1, subset="donotanswer", prompt="q")]
    theirs = [scored(0, 1, subset="code"), scored(0, 1, subset="safety", prompt="q")]
    differences = differences_of(ours, theirs, "rewardbench", seed=0)
    assert (differences["Reasoning"].value, differences["Safety"].value) == (1.0, 0.0)


def test_the_table_names_what_matters():
    rows = [scored(2, 1, subset="a", lengths=(9, 4)), scored(0, 1, subset="b", prompt="q", lengths=(9, 4))]
    evaluation = evaluate(rows, "pairs", seed=0)
    table = evaluation_table(
        evaluation, differences_of(rows, rows, "pairs", seed=0), {"reasons/honesty/correlation": 0.5}
    )
    assert "2 rows of 2 prompts, 4 responses; 0 rows longer than the model reads" in table
    accuracy = next(line for line in table.splitlines() if line.startswith("accuracy "))
    assert accuracy.split() == ["accuracy", "0.500", "[0.000,", "1.000]", "1.000"]  # the last: longer is better
    assert "this minus the other" in table
    assert "*" not in table.split("* the interval excludes 0")[0]


def test_pairs_of_several_sources_are_told_apart():
    rows = [
        scored(2, 1, name="1", prompt="1", source="a", lengths=(3, 1)),
        scored(0, 1, name="2", prompt="2", source="a"),
        scored(1, 3, name="3", prompt="3", source="b"),
    ]
    evaluation = evaluate(rows, "pairs", seed=0)
    of_a, of_b = ({k.rpartition("/")[2]: v for k, v in evaluation.sources.items() if f"/{s}/" in k} for s in "ab")
    assert (of_a["pairs"], of_a["accuracy"], of_a["longer_is_better"]) == (2, 0.5, 0.75)
    assert of_a["nll"] == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2)
    assert (of_a["accuracy_low"], of_a["accuracy_high"]) == (0.0, 1.0)
    assert of_b.keys() == {"pairs", "accuracy", "nll", "longer_is_better"}  # one prompt varies nowhere
    table = evaluation_table(evaluation, {}, {})
    assert "source                       accuracy" in table
    keys = ScoredRows.of(rows).content_key[[2, 0, 1]]
    assert ScoredRows.of(rows).in_order_of(keys, place="f.jsonl").sources == ("b", "a", "a")


def test_numbers_that_are_not_there_are_null_in_json():
    evaluation = evaluate([scored(2, 1, lengths=(9, 4))], "pairs", seed=0)
    written = json.loads(json.dumps(as_json(evaluation), allow_nan=False))
    assert written["diagnostics"]["accuracy/chosen_shorter"] == {"value": None, "low": None, "high": None}
    assert written["accuracies"]["accuracy"] == {"value": 1.0, "low": None, "high": None}  # one prompt varies nowhere


def comparison(chosen, rejected, *, subset="all", name="r"):
    return EvaluationExample(
        id=name,
        subset=subset,
        source="f",
        place="f.jsonl, line 3",
        prompt=({"role": "user", "content": "why ?"},),
        chosen=("a",) * chosen,
        rejected=("b",) * rejected,
        annotators_tie=False,
    )


@pytest.mark.parametrize(
    ("row", "benchmark", "letter"),
    [
        (comparison(1, 3), "pairs", "line 3: 1 chosen and 3 rejected.*'pairs' takes one.* --benchmark best_of_n or"),
        (comparison(3, 3), "pairs", "Choose --benchmark rm_bench"),
        (comparison(1, 1), "rm_bench", "takes three chosen and three rejected"),
        (comparison(4, 3, subset="Ties", name="9"), "rewardbench2", "ids ref:<n> and tied:<n>"),
        (comparison(4, 3), "rm_bench", "No benchmark here takes such rows"),
        (comparison(1, 1, subset="mine"), "rewardbench", "the subsets of these rows are mine, but the benchmark"),
    ],
)
def test_rows_of_another_form_are_refused_before_a_model_is_loaded(row, benchmark, letter):
    with pytest.raises(DataError, match=letter):
        survey([row], benchmark)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="hold no rows"):
        survey([], "pairs")


def test_the_survey_says_what_makes_a_score_incomparable():
    rows = [comparison(1, 3, subset=subset) for subset in (SUBSETS_2 - {"Ties", "Math"}) | {"mine"}]
    seen = survey(rows, "rewardbench2")
    assert seen.notes == ["not there, so left out: Math, Ties", "not of the published rewardbench2: mine"]
    assert len(seen.content_key) == 5
    assert len(seen.prompt_keys) == 1
    assert survey([comparison(1, 1, subset="anything")], "pairs").notes == []


def rated_by_length(row):
    def side(texts):
        return tuple(RewardedResponse(reward=float(len(t)), characters=len(t)) for t in texts)

    return ScoredComparison(
        id=row.id,
        subset=row.subset,
        source=row.source,
        content_key=key_number(row.content_key),
        prompt_key=key_number(row.prompt_key),
        cut=False,
        annotators_tie=False,
        chosen=side(row.chosen),
        rejected=side(row.rejected),
        margin_std=0.0,
        log_odds=0.0,
    )


def published(file, **options):
    path = SHARED_DATA / file
    if not path.exists():
        pytest.skip(f"{path} is not here: a published benchmark")
    return [rated_by_length(row) for row in read_examples([str(path)], **options)]


def test_length_alone_passes_the_easy_third_of_rm_bench_and_fails_the_hard_one():
    """What RM-Bench was built to show; style rises in length."""
    evaluation = evaluate(published("rm_bench/rm_bench.parquet", subset_field="domain"), "rm_bench", seed=0)
    scores = values(evaluation.accuracies)
    assert scores == evaluation.longer_is_better
    assert scores["easy"] > 0.8
    assert 0.4 < scores["normal"] < 0.6
    assert scores["hard"] < 0.2


def test_best_of_n_on_published_lists_agrees_with_a_plain_count(tmp_path):
    """RMB names its responses otherwise; renamed, its lists of 2 to 6 losers are best-of-n rows."""
    source = SHARED_DATA / "rmb" / "rmb_bon_sample.parquet"
    if not source.exists():
        pytest.skip(f"{source} is not here: a published benchmark")
    rows = [
        {
            "prompt": row["conversation_input"],
            "chosen": row["best"],
            "rejected": [loser["answer"] for loser in row["losers"]],
        }
        for row in pq.read_table(source).to_pylist()
    ]
    file = tmp_path / "rmb.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = evaluate([rated_by_length(row) for row in read_examples([str(file)])], "best_of_n", seed=0)

    # One of the 785 lists holds its best answer among the losers too, and no model can order that.
    rows = [row for row in rows if row["chosen"] not in row["rejected"]]
    longest = sum(len(row["chosen"]) > max(map(len, row["rejected"])) for row in rows)
    assert evaluation.accuracies["accuracy"].value == pytest.approx(longest / 784)
    assert evaluation.responses == sum(1 + len(row["rejected"]) for row in rows)


def test_length_alone_is_worse_than_a_coin_on_the_adversarial_pairs_of_llmbar():
    evaluation = evaluate(published("llmbar/llmbar.parquet"), "rewardbench", seed=0)
    assert evaluation.accuracies["Chat Hard"].high < 0.5
    assert evaluation.diagnostics["length_correlation"].value == pytest.approx(1.0)
    assert evaluation.diagnostics["prefers_longer"].value == 1.0
    assert math.isclose(evaluation.subsets["llmbar-natural"]["rows"], 64)


TIES_PAIR = (("ref:1", ["sky"]), ("tied:1", ["red", "blue"]))


@pytest.mark.parametrize("identity", ["ref:1", "tied:1", "ref:01"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_repeated_id_of_ties_is_refused_in_every_order(identity, place, tmp_path):
    rows = [{"id": name, "subset": "Ties", "prompt": name, "chosen": c, "rejected": ["cat"]} for name, c in TIES_PAIR]
    rows.insert(place, rows[0] | {"id": identity, "prompt": "again", "chosen": ["a chosen one"]})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"rows.jsonl, line [23]: the id '(ref|tied):0?1' of Ties .* line [12]\. Keep one"
    ):
        survey(read_examples([str(path)], subset_field="subset"), "rewardbench2")
