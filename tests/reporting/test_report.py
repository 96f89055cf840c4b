from dataclasses import replace

from pipeline.records import Answer, RewardScore
from pipeline.reporting.report import ReasonBar, reason_bars, report_page, sample_pairs
from pipeline.reporting.report_data import ReportData, StageSummary
from pipeline.reporting.results import results_table, source_rows
from pipeline.rollouts.kept_samples import KeptSample, SamplesOfPolicy


def answer(prompt_id, output, mean, weights=(0.7, 0.3)):
    scores = (mean, mean) if weights else ()
    return Answer(
        prompt_id=prompt_id,
        instruction=f"question {prompt_id} <b>",
        output=output,
        generator="g",
        score=RewardScore(mean=mean, std=0.5, objective_weights=weights, objective_scores=scores),
    )


def stage(name="align_policy", is_skipped=False, **metrics):
    return StageSummary(
        name=name,
        seconds=65.0,
        is_skipped=is_skipped,
        node_peak_gib=7.25,
        versions={"torch": "2"},
        metrics=metrics,
    )


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
            "eval/active_units": 7.0, "eval/accuracy_low": 0.85, "eval/accuracy_high": 0.94, "data/heldout_pairs": 512,
            "eval/accuracy_over_length_low": 0.4, "eval/accuracy_over_length_high": 0.6, "eval/scale": 2.0,
            "reasons/collinearity": 0.2,
        },
        "reward_model_fingerprint": "0123456789abcdef",
        "benchmark_metrics": {
            "reward/win_rate": 0.75, "reward/low": 0.5, "reward/high": 0.9, "reward/base": 1.0, "reward/aligned": 2.0,
            "words/base": 10.0, "words/aligned": 12.0, "opening/base": 0.5, "opening/aligned": 0.5,
        },
        "base": [answer("a", "first", 1.0), answer("b", "second", 3.0, (0.2, 0.8))],
        "aligned": [answer("a", "gained", 2.0), answer("b", "forfeited", 0.0)],
        "kinds": {"a": "plan", "b": "quick"},
        "over_time": (),
        "planted_weights": {
            "plan": {"helpfulness": 0.9, "honesty": 0.1}, "quick": {"helpfulness": 0.1, "honesty": 0.9}
        },
        "gold": None,
    }  # fmt: skip
    return ReportData(**(values | changes))


def test_the_page_shows_each_source_with_its_intervals_and_what_was_left_out():
    sources = {
        "eval/source/a/pairs": 20.0, "eval/source/a/accuracy": 0.7, "eval/source/a/accuracy_low": 0.6,
        "eval/source/a/accuracy_high": 0.8, "eval/source/a/nll": 0.5, "eval/source/a/longer_is_better": 0.45,
        "data/source/a/train_pairs": 180.0, "data/left_out/a/an_empty_response": 3.0,
        "data/left_out/ab/identical_responses": 9.0,
    }  # fmt: skip
    metrics = report().reward_metrics | sources
    assert source_rows(metrics) == [
        ("a", "180", "20", "0.700 [0.600, 0.800]", "0.500", "0.450", "3 with an empty response")
    ]
    assert '<td data-name="held-out accuracy">0.700 [0.600, 0.800]</td>' in report_page(report(reward_metrics=metrics))
    assert "Sources of the pairs" not in report_page(report())


def kept(updates, **responses):
    samples = tuple(
        KeptSample(
            prompt_id=name,
            prompt=f"prompt {name}",
            response=response,
            reward=updates / 10,
            reward_std=0.25,
            finish_reason="length" if response == "cut" else "stop",
        )
        for name, response in responses.items()
    )
    return SamplesOfPolicy(updates=updates, samples=samples)


def test_the_same_prompts_stand_beside_each_other_at_the_start_in_the_middle_and_at_the_end():
    over_time = (kept(0, a="one <b>", b="uno"), kept(12, a="two", b="cut"), kept(24, a="three", b="tres", c="only now"))
    section = report_page(report(over_time=over_time)).split("<h2>Samples over time</h2>")[1].split("<h2")[0]
    places = [section.index(word) for word in ("prompt a", "one &lt;b&gt;", ">two<", ">three<", "prompt b", ">uno<")]
    assert places == sorted(places)
    assert section.count("before the first update") == section.count("after 12 updates") == 2
    assert "2.40 ± 0.25" in section
    assert section.count("cut at the length limit") == 1
    assert "only now" not in section
    assert "Samples over time" not in report_page(report())


def test_what_was_validated_and_kept_is_told():
    row = {"kl/per_response": 1.0, "gate/max": 0.0, "rollout/kept": 6.0, "rollout/left_out": 2.0}
    rows = [{"step": 0, **row, "rollout/kept_mib": 0.5}, {"step": 1, **row, "rollout/kept_mib": 1.0}]
    validated = {"eval/updates": 2.0, "eval/reward": 0.5, "eval/reward_low": 0.25, "eval/reward_high": 0.75}
    table = dict(results_table(report(alignment_rows=[*rows, rows[1] | validated | {"eval/kl": 2.0}])))
    assert table["rollouts kept for `vrm rollouts`"] == "12 of 16 in 1.0 MiB"
    assert table["reward of held-out prompts after 2 updates"] == "0.500 [0.250, 0.750]"
    # It is not taken for a direct alignment, which has a held-out KL too.
    assert table["KL to the reference, nats per response"] == "1.00"


def test_the_page_is_self_contained_and_escapes_what_models_say():
    page = report_page(report())
    assert "question a <b>" not in page
    assert "question a &lt;b&gt;" in page
    assert 'src="http' not in page
    assert page.count("href=") == page.count('href="#')


def test_the_worst_loss_stands_first():
    samples = report_page(report()).split("Samples, before and after")[1]
    assert samples.index("forfeited") < samples.index(">gained<")


def true_reward(prompt, response):
    return {"first": 3.0, "gained": 2.5, "second": 1.0, "forfeited": 1.0}[response]


def test_the_true_reward_of_each_sample_stands_beside_it_where_it_is_known():
    known = report(gold=true_reward)
    b, a = sample_pairs(known)
    assert (b.gold, b.is_fooled) == ((1.0, 1.0), False)
    assert (a.gold, a.is_fooled) == ((3.0, 2.5), True)  # the reward rose from 1 to 2, the true reward fell
    samples = report_page(known).split("Samples, before and after")[1]
    assert [samples.count(f"gold {value}") for value in ("3.00", "2.50", "1.00")] == [1, 1, 2]
    assert samples.count("Reward and gold disagree") == 1
    assert not sample_pairs(report())[1].is_fooled
    assert "gold" not in report_page(report()).split("Samples, before and after")[1].split("<h2")[0]
    over_time = report_page(report(gold=lambda prompt, response: len(response), over_time=(kept(0, a="four"),)))
    assert "gold 4.00" in over_time.split("Samples over time")[1]


def test_every_chart_has_a_sentence_on_what_healthy_looks_like():
    page = report_page(report())
    charts = page.split('<figure class="chart">')[1:]
    assert len(charts) == 4  # NLL; reward, KL and the gap, of which rows have numbers
    assert all("<b>Healthy:</b>" in chart for chart in charts)
    weights = page.split("Objective weights by kind of prompt")[1].split("<h2")[0]
    assert "<b>Healthy:</b> both bars of an objective are about equally long." in weights
    assert '<span class="bar inferred first" style="width: 70.0%">' in weights
    assert '<span class="bar planted quiet" style="width: 90.0%">' in weights


def test_the_alarms_of_the_terminal_stand_in_the_report_with_threshold_value_and_steps():
    rows = [
        {"step": 9, "eval/ece": 0.2, "alarm/miscalibration": 1.0},
        {"step": 19, "eval/ece": 0.05, "alarm/miscalibration": 0.0, "train/reward_std": 3.0},
        {"step": 19, "eval/reward_std": 1.0, "alarm/scale_drift": 1.0},
    ]
    finished = {"eval/ece": 0.05, "alarm/miscalibration": 0.0, "alarm/scale_drift": 1.0, "eval/reward_std": 1.0}
    page = report_page(report(reward_rows=rows, reward_metrics=report().reward_metrics | finished))
    # The signal of training is told too, although the finished model's metrics lack it.
    assert "alarm scale_drift (train/reward_std = 3, eval/reward_std = 1): rewards of training" in page
    assert "Amber: the standard deviations of rewards of training and held-out responses differ by more" in page
    assert "1 of 2 alarms is raised by the finished reward model or policy; 2 were raised at some step." in page
    table = page.split("All alarms with their thresholds")[1].split("</table>")[0]
    assert table.index("scale_drift") < table.index("miscalibration")
    assert "in 1 of 2 checks, in step 10" in table
    assert "eval/ece = 0.05" in table


def test_the_table_names_the_headline_numbers():
    table = dict(results_table(report()))
    assert table["reward model: fingerprint"] == "0123456789ab"
    assert table["reward model: held-out accuracy"] == "0.900"
    assert table["win rate over base, by the reward model"] == "0.750  [0.500, 0.900]"
    label = "reward model: calibration error, before and after calibration"
    assert label not in table
    calibrated = report().reward_metrics | {"eval/ece_uncalibrated": 0.062, "eval/ece": 0.021}
    assert dict(results_table(report(reward_metrics=calibrated)))[label] == "0.062, 0.021"
    assert table["time"] == "1:05"
    assert table["peak memory of the driver's node, GiB"] == "7.2"


def test_a_stage_that_an_earlier_job_finished_adds_no_time_and_is_named():
    data = report(stages=[stage(name="sft", is_skipped=True), stage()])
    assert dict(results_table(data))["time"] == "1:05, without what an earlier job finished: sft"
    assert "sft (earlier job)" in report_page(data)


def test_the_gap_to_the_truth_is_told_and_drawn_where_the_truth_is_known():
    assert "gold-proxy gap in sd, first to last step" not in dict(results_table(report()))
    rows = [
        {"step": s, "kl/per_response": 1.5, "gate/max": 1e-6, "gold/mean": 3.0, "gold/gap": s - 0.25} for s in range(3)
    ]
    known = report(alignment_rows=rows)
    assert dict(results_table(known))["gold-proxy gap in sd, first to last step"] == "-0.25 to +1.75"
    assert "gold reward, by the planted truth" in report_page(known)
    assert "gold reward, by the planted truth" not in report_page(report())


def test_after_a_kl_stop_the_report_is_about_the_policy_that_was_exported():
    rows = [
        {"step": 16, "reward/mean": 0.2, "kl/per_response": 8.8, "gate/max": 1e-6},
        {"step": 17, "reward/mean": 0.7, "kl/per_response": 12.1},  # the KL limit stopped it in front of its update
    ]
    exported = {"kl/per_response": 8.8, "kl/stopped_at_step": 17.0, "kl/at_stop": 12.1}
    stopped = report(alignment_rows=rows, stages=[replace(stage(name="align_policy"), metrics=exported)])
    table = dict(results_table(stopped))
    assert table["KL to the reference, nats per response"] == "8.80"
    assert (
        table["stopped by alignment.kl.stop_above; the commit before is kept"] == "step 17, at 12.10 nats per response"
    )
    assert table["largest engine-learner logprob gap at the gate"] == "1.0e-06"
    assert "8.8 nats" in report_page(stopped)


def test_the_page_opens_with_the_verdict():
    page = report_page(report())
    opening = page.split("<h2")[1]
    assert opening.startswith(' id="verdict">Verdict')
    assert "1 good</span>" in opening
    assert "2 unsure</span>" in opening
    begin = '<div class="finding {0}"><strong>{0}</strong><div><p>'
    assert begin.format("good") + "The reward is usable: it orders 90.0% [85.0, 94.0]" in opening
    assert "Green: the 95% interval of the accuracy lies above 50%, and that of its lead over" in opening
    assert begin.format("unsure") + "Its reasons cannot be verified" in opening
    assert begin.format("unsure") + "It is not known whether the policy improved: even by" in opening


def test_where_the_truth_is_known_weights_and_named_reasons_are_held_against_it():
    assert not [label for label in dict(results_table(report())) if "planted weights" in label]
    known = {"reasons/weight_correlation": 0.977, "reasons/decisive_accuracy": 0.8}
    told = dict(results_table(report(reward_metrics=report().reward_metrics | known)))
    assert told["correlation of inferred with planted weights, held out"] == "0.977"
    assert told["named reasons that are the true ones, held out"] == "0.800"


def test_a_bradley_terry_run_has_no_weights_to_show():
    plain = [answer("a", "x", 1.0, ())]
    page = report_page(report(base=plain, aligned=plain, kinds={}, planted_weights={}))
    assert "Objective weights by kind" not in page


def test_the_cost_of_a_stage_holds_the_peak_memory_of_its_ranks_where_it_has_any():
    assert stage().cells == ("align_policy", "1:05", "7.2", "", "", "")
    needed = {"memory/rank_peak_gib": 3.0, "memory/device_peak_gib": 61.55, "memory/rollout_worker_peak_gib": 5.5}
    on_gpu = stage(**needed)
    assert on_gpu.cells == ("align_policy", "1:05", "7.2", "3.0", "61.5", "5.5")
    assert '<td data-name="of its GPU">61.5</td>' in report_page(report(stages=[on_gpu]))


FIDELITY = {
    "reasons/helpfulness/pair_accuracy": 0.82,
    "reasons/helpfulness/pairs": 400.0,
    "reasons/honesty/pair_accuracy": 0.61,
    "reasons/honesty/pairs": 400.0,
}


def test_only_verified_objectives_are_reasons_and_their_fidelity_is_told():
    data = report(reward_metrics=report().reward_metrics | FIDELITY)
    told = dict(results_table(data))
    assert told["held-out pairs that the score of helpfulness orders as its annotator"] == "0.820 of 400"
    assert (
        told["held-out pairs that the score of honesty orders as its annotator"]
        == "0.610 of 400, too few to be a reason"
    )
    samples = report_page(data).split("Samples, before and after")[1]
    # Prompt a: scores 2 against 1 at weight 0.7. Prompt b: the aligned answer has the weights (0.7, 0.3), 0 against 3.
    assert "helpfulness +0.70" in samples
    assert "helpfulness -0.60" in samples
    assert "honesty" not in samples.split("<h2")[0]
    # With the objective that is not verified, the tags add up to the margins 1 and -3.
    assert "what the model cannot tell apart +0.30" in samples
    assert "what the model cannot tell apart -2.40" in samples


CONTRIBUTIONS = {
    "reasons/helpfulness/contribution": 0.8,
    "reasons/helpfulness/contribution_by_annotations": 1.0,
    "reasons/honesty/contribution": -0.2,
    "reasons/honesty/contribution_by_annotations": 0.1,
}


def test_bars_of_reasons_stand_beside_the_annotators_for_verified_objectives_alone():
    data = report(reward_metrics=report().reward_metrics | FIDELITY | CONTRIBUTIONS)
    bar = ReasonBar(objective="helpfulness", pair_accuracy=0.82, by_score=0.8, by_annotations=1.0)
    assert reason_bars(data) == ([bar], ["honesty"])
    reasons = report_page(data).split(">Reasons</h2>")[1].split("<h2")[0]
    assert "helpfulness (82%)" in reasons
    assert 'class="bar by-score first" style="width: 80.0%"' in reasons
    assert 'class="bar by-annotations quiet" style="width: 100.0%"' in reasons
    assert "The model cannot tell what honesty adds: a reason needs annotated held-out pairs" in reasons
    both = report(
        reward_metrics=data.reward_metrics | {"reasons/honesty/pair_accuracy": 0.7},
    )
    assert 'class="bar by-score first negative" style="width: 20.0%"' in report_page(both)


def test_below_the_bound_there_are_no_bars():
    reasons = report_page(report()).split(">Reasons</h2>")[1].split("<h2")[0]
    assert "bar-row" not in reasons
    assert "The model cannot tell what helpfulness, honesty add:" in reasons


def test_without_verified_objectives_no_reason_is_shown():
    samples = report_page(report()).split("Samples, before and after")[1].split("<h2")[0]
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
    page = report_page(report(alignment_rows=rows))
    assert "accuracy of the implicit reward" in page
    assert "KL to the start" not in page


def test_without_a_reward_model_the_report_is_about_the_policy_alone():
    alone = report(reward_metrics={}, reward_model_fingerprint=None, reward_rows=[])
    page = report_page(alone)
    assert "Reward-model training" not in page
    assert ">Reasons</h2>" not in page
    assert "even by its own rewards it wins 75.0% [50.0, 90.0]" in page
    assert dict(results_table(alone))["win rate over base, by the alignment's rewards"] == "0.750  [0.500, 0.900]"
