import pytest

from pipeline.records import Answer, RewardScore
from pipeline.reporting.report import ReportData, StageSummary, report_page, results_table, weight_correlation


def answer(prompt_id, output, mean, weights=(0.7, 0.3)):
    scores = (mean, mean) if weights else ()
    return Answer(
        prompt_id=prompt_id,
        instruction=f"question {prompt_id} <b>",
        output=output,
        generator="g",
        score=RewardScore(mean=mean, std=0.5, objective_weights=weights, objective_scores=scores),
    )


def stage(**metrics):
    return StageSummary(name="align_policy", seconds=65.0, node_peak_gib=7.25, versions={"torch": "2"}, metrics=metrics)


def report(**changes):
    values = {
        "name": "tiny",
        "recipe": {"seed": 0},
        "objectives": ("helpfulness", "honesty"),
        "stages": [stage()],
        "reward_rows": [{"step": s, "train/nll": 0.6, "eval/nll": 0.5} for s in range(3)],
        "alignment_rows": [{"step": s, "reward/mean": s, "kl/per_response": 1.5, "gate/max": 1e-6} for s in range(3)],
        "reward_metrics": {
            "eval/accuracy": 0.9, "eval/longer_is_better": 0.4, "eval/nll": 0.3, "eval/margin": 2.0,
            "eval/active_units": 7.0,
        },
        "reward_model_fingerprint": "0123456789abcdef",
        "benchmark_metrics": {
            "reward/win_rate": 0.75, "reward/low": 0.5, "reward/high": 0.9, "reward/base": 1.0, "reward/aligned": 2.0,
            "words/base": 10.0, "words/aligned": 12.0,
        },
        "base": [answer("a", "first", 1.0), answer("b", "second", 3.0, (0.2, 0.8))],
        "aligned": [answer("a", "gained", 2.0), answer("b", "forfeited", 0.0)],
        "kinds": {"a": "plan", "b": "quick"},
        "planted_weights": {
            "plan": {"helpfulness": 0.9, "honesty": 0.1}, "quick": {"helpfulness": 0.1, "honesty": 0.9}
        },
    }  # fmt: skip
    return ReportData(**(values | changes))


def test_the_page_is_self_contained_and_escapes_what_models_say():
    page = report_page(report())
    assert "<b>" not in page.replace("<body>", "")
    assert "question a &lt;b&gt;" in page
    assert 'src="http' not in page
    assert "href=" not in page


def test_the_worst_loss_stands_first():
    samples = report_page(report()).split("Samples, before and after")[1]
    assert samples.index("forfeited") < samples.index(">gained<")


def test_the_table_names_the_headline_numbers():
    table = dict(results_table(report()))
    assert table["reward model: fingerprint"] == "0123456789ab"
    assert table["reward model: held-out accuracy"] == "0.900"
    assert table["win rate over base, by the reward model"] == "0.750  [0.500, 0.900]"
    assert table["time"] == "1:05"
    assert table["peak memory of the driver's node, GiB"] == "7.2"


def test_the_gap_to_the_truth_is_told_and_drawn_where_the_truth_is_known():
    assert "gold-proxy gap in sd, first to last step" not in dict(results_table(report()))
    rows = [
        {"step": s, "kl/per_response": 1.5, "gate/max": 1e-6, "gold/mean": 3.0, "gold/gap": s - 0.25} for s in range(3)
    ]
    known = report(alignment_rows=rows)
    assert dict(results_table(known))["gold-proxy gap in sd, first to last step"] == "-0.25 to +1.75"
    assert len(report_page(known)) > 0


def test_the_weight_correlation_by_hand():
    # inferred (.7, .3, .2, .8) against (.9, .1, .1, .9): deviations (.2, -.2, -.3, .3) and (.4, -.4, -.4, .4)
    assert weight_correlation(report()) == pytest.approx(0.4 / (0.26 * 0.64) ** 0.5)


def test_a_bradley_terry_run_has_no_weights_to_show():
    plain = [answer("a", "x", 1.0, ())]
    page = report_page(report(base=plain, aligned=plain, kinds={}, planted_weights={}))
    assert "Objective weights by kind" not in page


def test_the_cost_of_a_stage_holds_the_peak_memory_of_its_ranks_where_it_has_any():
    assert stage().cells == ("align_policy", "1:05", "7.2", "", "", "")
    needed = {"memory/rank_peak_gib": 3.0, "memory/device_peak_gib": 61.55, "memory/rollout_worker_peak_gib": 5.5}
    on_gpu = stage(**needed)
    assert on_gpu.cells == ("align_policy", "1:05", "7.2", "3.0", "61.5", "5.5")
    assert "<td>61.5</td>" in report_page(report(stages=[on_gpu]))


FIDELITY = {
    "reasons/helpfulness/pair_accuracy": 0.82,
    "reasons/helpfulness/pairs": 400.0,
    "reasons/honesty/pair_accuracy": 0.61,
    "reasons/honesty/pairs": 400.0,
}


def test_only_verified_objectives_are_reasons_and_their_fidelity_is_told():
    data = report(reward_metrics=report().reward_metrics | FIDELITY)
    told = dict(results_table(data))
    assert told["held-out pairs that the score of helpfulness orders as its annotator"] == "0.820"
    assert told["held-out pairs that the score of honesty orders as its annotator"] == "0.610, too few to be a reason"
    samples = report_page(data).split("Samples, before and after")[1]
    # Prompt a: scores 2 against 1 at weight 0.7. Prompt b: the aligned answer has the weights (0.7, 0.3), 0 against 3.
    assert "helpfulness +0.70" in samples
    assert "helpfulness -0.60" in samples
    assert "honesty" not in samples.split("<h2>")[0]


def test_without_verified_objectives_no_reason_is_shown():
    samples = report_page(report()).split("Samples, before and after")[1].split("<h2>")[0]
    assert "aligned minus base" not in samples


def test_a_policy_that_was_aligned_directly_is_reported_by_its_implicit_reward():
    rows = [{"step": s, "train/loss": 0.6, "train/margin": 0.1 * s} for s in range(3)]
    held_out = {
        "loss": 0.5,
        "accuracy": 0.71,
        "margin": 0.25,
        "chosen_change": -1.5,
        "rejected_change": -4.0,
        "kl": 3.0,
    }
    rows.append({"step": 2} | {f"eval/{name}": value for name, value in held_out.items()})
    table = dict(results_table(report(alignment_rows=rows)))
    assert table["implicit reward: held-out accuracy"] == "0.710"
    assert table["change of log-probability, chosen and rejected, nats per response"] == "-1.50 and -4.00"
    assert "KL to the reference, nats per response" not in table
    assert "data:image/png;base64," in report_page(report(alignment_rows=rows))
