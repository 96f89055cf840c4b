"""The evaluation job on tiny random reward models, from file to table."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from jobs.evaluate_reward_model import evaluate_reward_model, evaluate_reward_model_command
from pipeline.config.load import load_recipe
from pipeline.config.reward import VRMHeadConfig
from pipeline.data.collate import objective_truth
from pipeline.data.planted import OBJECTIVES, PlantedWorld
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.backbone import load_backbone
from pipeline.models.reward_model import RewardModel, RewardModelCard, make_head, save_reward_model
from pipeline.stages.fingerprint import directory_fingerprint
from tests.support.learners import collator, reward_trainer, tokenised
from tests.support.paths import ROOT

parse = evaluate_reward_model_command.options

HEAD = VRMHeadConfig(semantic_dims=6, hidden_size=32)


@pytest.fixture(scope="module")
def models(tiny_policy, tokenizer, tmp_path_factory):
    """Directories of a VRM and a Bradley-Terry model with random heads on a random two-layer Qwen3."""
    directories = {}
    for kind in ("vrm", "bt"):
        directories[kind] = str(tmp_path_factory.mktemp(kind))
        torch.manual_seed(0)
        backbone = load_backbone(tiny_policy, dtype="float32")
        head = make_head(kind, backbone.config.hidden_size, len(OBJECTIVES), HEAD)
        for parameter in head.parameters():  # a fresh head scores everything alike
            torch.nn.init.normal_(parameter, std=0.3)
        save_reward_model(
            directories[kind],
            state_dict=RewardModel(backbone, head).state_dict(),
            backbone_config=backbone.config.to_dict(),
            tokenizer=tokenizer,
            card=RewardModelCard(
                head=kind,
                vrm=HEAD,
                objectives=OBJECTIVES,
                max_length=128,
                score_mean=(),
                score_std=(),
                reward_mean=0.0,
                reward_std=1.0,
                metrics={},
            ),
        )
    return directories


@pytest.fixture(scope="module")
def pairs(world):
    return [
        {"id": p.id, "prompt": list(p.prompt), "chosen": p.chosen, "rejected": p.rejected, "subset": f"s{n % 2}"}
        for n, p in enumerate(world.heldout_pairs())
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(*arguments):
    return evaluate_reward_model(parse([*map(str, arguments), "--device", "cpu"]))


def rewards(directory):
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    return {row["id"]: [(r["mean"], r["std"]) for r in row["chosen"] + row["rejected"]] for row in rows}


def test_pairs_from_file_to_metrics(models, pairs, tmp_path):
    file, out = write(tmp_path / "pairs.jsonl", pairs), tmp_path / "out"
    table = run("--model", models["vrm"], "--pairs", file, "--out", out)

    scorer = RewardModelScorer.load(models["vrm"], max_tokens_per_batch=4096)
    right = 0
    for row in pairs:
        chosen, rejected = scorer.score([tuple(row["prompt"])] * 2, [row["chosen"], row["rejected"]])
        right += chosen.mean > rejected.mean
        assert rewards(out)[row["id"]][0] == pytest.approx((chosen.mean, chosen.std), abs=1e-4)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["accuracies"]["accuracy"]["value"] == pytest.approx(right / len(pairs))
    assert metrics["scored_by"] == f"{directory_fingerprint(models['vrm'])[:16]}/cpu"
    assert metrics["rows"] == len(pairs) == 16
    assert metrics["cut"] == 0
    assert metrics["subsets"]["s0"]["rows"] == 8
    assert {"aurc/log_odds", "calibrated/nll", "ece", "length_correlation"} <= metrics["diagnostics"].keys()
    assert f"accuracy{right / 16:>29.3f}" in table


def test_the_numbers_are_those_of_training(tiny_policy, world, tokenizer, pairs, tmp_path):
    """The trainer's held-out metrics and the job's, from one model by two ways."""
    trainer = reward_trainer(tiny_policy, world, tokenizer)
    collate = collator(world, tokenizer)
    for step in range(4):
        trainer.update(collate(tokenised(world, tokenizer)[:16], step), step)
    trained = trainer.evaluate(collate(tokenised(world, tokenizer, "heldout"), 0))
    trainer.export(str(tmp_path / "model"))
    run("--model", tmp_path / "model", "--pairs", write(tmp_path / "pairs.jsonl", pairs), "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    diagnostics = {name: estimate["value"] for name, estimate in metrics["diagnostics"].items()}
    assert metrics["accuracies"]["accuracy_tie_half"]["value"] == pytest.approx(trained["eval/accuracy"])
    assert diagnostics["nll"] == pytest.approx(trained["eval/nll"], abs=1e-5)
    assert diagnostics["mean_abs_margin"] == pytest.approx(trained["eval/margin"], abs=1e-5)
    assert diagnostics["ece_uncalibrated"] == pytest.approx(trained["eval/calibration_error"], abs=1e-5)


def annotated(world):
    return [
        {
            "prompt": list(p.prompt),
            "chosen": p.chosen,
            "rejected": p.rejected,
            "scores_chosen": dict(p.scores_chosen) | {"wit": 3},  # of no objective of the model
            "scores_rejected": dict(p.scores_rejected) | {"wit": "N/A"},
        }
        for p in world.heldout_pairs()
    ]


def test_reasons_of_annotated_pairs_are_those_of_training(tiny_policy, world, tokenizer, tmp_path):
    trainer = reward_trainer(tiny_policy, world, tokenizer)
    collate, heldout = collator(world, tokenizer), tokenised(world, tokenizer, "heldout")
    for step in range(4):
        trainer.update(collate(tokenised(world, tokenizer)[:16], step), step)
    truth = objective_truth(world.gold, [pair.pair for pair in heldout], OBJECTIVES)
    trained = trainer.evaluate(replace(collate(heldout, 0), truth=truth))
    trainer.export(str(tmp_path / "model"))
    file = write(tmp_path / "pairs.jsonl", annotated(world))
    table = run("--model", tmp_path / "model", "--pairs", file, "--out", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(trained["eval/accuracy"])
    assert metrics["nll"] == pytest.approx(trained["eval/nll"], abs=1e-5)
    assert metrics["ece_uncalibrated"] == pytest.approx(trained["eval/calibration_error"], abs=1e-5)
    for name in OBJECTIVES:
        for measure in ("correlation", "pair_accuracy", "pairs"):
            key = f"reasons/{name}/{measure}"
            assert metrics[key] == pytest.approx(trained[key], abs=1e-5), key
    assert metrics["reasons/collinearity"] == pytest.approx(trained["reasons/collinearity"], abs=1e-5)
    assert "reasons/honesty/pair_accuracy" in table
    assert not [name for name in metrics if "/wit/" in name or "weight_correlation" in name]


def test_held_out_pairs_of_a_recipe_are_held_against_the_truth_too(models, tmp_path):
    small = ["data.planted.num_train_pairs=8", "data.planted.num_heldout_pairs=40", "data.planted.num_sft_texts=1"]
    run("--model", models["vrm"], "--out", tmp_path / "out", "--recipe", "experiments_tiny", "seed=3", *small)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["rows"], metrics["recipe"], metrics["files"]) == (40, "experiments_tiny", {})
    assert metrics["subsets"]["planted"]["rows"] == 40
    world = PlantedWorld(load_recipe("experiments_tiny", ["seed=3", *small]).data.planted, OBJECTIVES, 3)
    scorer = RewardModelScorer.load(models["vrm"], max_tokens_per_batch=4096)
    pairs = world.heldout_pairs()
    weights = [score.objective_weights for score in scorer.score([p.prompt for p in pairs], [p.chosen for p in pairs])]
    planted = [[world.gold.objective_weights(p.prompt)[name] for name in OBJECTIVES] for p in pairs]
    expected = float(np.corrcoef(np.ravel(weights), np.ravel(planted))[0, 1])
    assert metrics["reasons/weight_correlation"] == pytest.approx(expected, abs=1e-5)
    assert metrics["reasons/helpfulness/pairs"] > 30
    assert "reasons/decisive_pairs" in metrics


def test_rows_without_annotations_and_heads_without_scores_have_no_reasons(models, pairs, world, tmp_path):
    for name, model, rows in (("plain", "vrm", pairs), ("bt", "bt", annotated(world))):
        out = tmp_path / name
        run("--model", models[model], "--pairs", write(tmp_path / f"{name}.jsonl", rows), "--out", out)
        metrics = json.loads((out / "metrics.json").read_text())
        assert {"accuracy", "nll", "ece"} <= metrics.keys()
        assert not [key for key in metrics if key.startswith("reasons/")]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"honesty": "good"}, r"line 1, field 'scores_chosen.honesty': 'good' is no finite number"),
        ([4.0], r"line 1, field 'scores_chosen': \[4.0\] is no mapping from objective to score"),
    ],
)
def test_an_annotation_that_is_no_number_is_named(scores, message, models, pairs, tmp_path):
    file = write(tmp_path / "pairs.jsonl", [pairs[0] | {"scores_chosen": scores}])
    with pytest.raises(DataError, match=message):
        run("--model", models["vrm"], "--pairs", file, "--out", tmp_path / "out")


def test_scores_do_not_depend_on_what_shared_a_batch(models, pairs, tmp_path):
    forward, backward = write(tmp_path / "a.jsonl", pairs), write(tmp_path / "b.jsonl", reversed(pairs))
    run("--model", models["vrm"], "--pairs", forward, "--out", tmp_path / "one", "--max-tokens-per-batch", 1)
    run("--model", models["vrm"], "--pairs", backward, "--out", tmp_path / "all", "--max-tokens-per-batch", 100_000)
    alone, together = rewards(tmp_path / "one"), rewards(tmp_path / "all")
    assert alone.keys() == together.keys()
    for name, scores in alone.items():
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(together[name]), atol=1e-4, rtol=0)
    # And the tolerance means something: rewards of different responses differ by more.
    assert min(abs(chosen[0] - rejected[0]) for chosen, rejected in alone.values()) > 1e-4


def test_two_models_are_compared_on_the_same_rows(models, pairs, tmp_path):
    file = write(tmp_path / "pairs.jsonl", pairs)
    run("--model", models["vrm"], "--pairs", file, "--out", tmp_path / "vrm")
    table = run(
        "--model", models["bt"], "--pairs", file, "--out", tmp_path / "bt", "--compare", tmp_path / "vrm/rows.jsonl"
    )
    assert "this minus the other" in table
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("bt", "vrm"))
    accuracy = [record["accuracies"]["accuracy"]["value"] for record in (ours, theirs)]
    assert ours["differences"]["accuracy"]["value"] == pytest.approx(accuracy[0] - accuracy[1])
    assert ours["compared_with"] == theirs["scored_by"] != ours["scored_by"]
    assert "aurc/std" not in ours["diagnostics"]  # a model that was never calibrated has no error bar


def test_the_same_command_again_scores_nothing_and_says_the_same(models, pairs, tmp_path, capsys):
    arguments = ("--model", models["bt"], "--pairs", write(tmp_path / "p.jsonl", pairs), "--out", tmp_path / "out")
    first = run(*arguments)
    assert "16/16 rows" in capsys.readouterr().out
    assert run(*arguments) == first
    assert "rows" not in capsys.readouterr().out


def test_rm_bench_and_rewardbench_2_rows_are_aggregated_their_way(models, pairs, tmp_path):
    def aggregated(benchmark, rows):
        file, out = write(tmp_path / f"{benchmark}.jsonl", rows), tmp_path / benchmark
        run("--model", models["vrm"], "--benchmark", benchmark, "--pairs", file, "--out", out)
        return json.loads((out / "metrics.json").read_text())

    styles = [
        {"prompt": p["prompt"], "chosen": [p["chosen"]] * 3, "rejected": [p["rejected"]] * 3, "domain": "chat"}
        for p in pairs
    ]
    run(
        "--model",
        models["vrm"],
        "--benchmark",
        "rm_bench",
        "--pairs",
        write(tmp_path / "s.jsonl", styles),
        "--out",
        tmp_path / "s",
    )
    metrics = json.loads((tmp_path / "s" / "metrics.json").read_text())
    accuracy = metrics["accuracies"]
    assert accuracy["easy"]["value"] == accuracy["hard"]["value"] == accuracy["chat"]["value"]  # all styles are one
    assert metrics["notes"] == ["not there, so left out: code, math, safety-refuse, safety-response"]

    lists = [{**p, "chosen": [p["chosen"]], "rejected": [p["rejected"]] * 3, "subset": "Math"} for p in pairs[:8]]
    lists += [
        {
            **pairs[8],
            "id": "ref:1",
            "chosen": [pairs[8]["chosen"]],
            "rejected": [pairs[8]["rejected"]],
            "subset": "Ties",
        },
        {**pairs[8], "id": "tied:1", "chosen": [pairs[8]["chosen"]] * 2, "rejected": ["no"], "subset": "Ties"},
    ]
    run(
        "--model",
        models["vrm"],
        "--benchmark",
        "rewardbench2",
        "--pairs",
        write(tmp_path / "l.jsonl", lists),
        "--out",
        tmp_path / "l",
    )
    scores = json.loads((tmp_path / "l" / "metrics.json").read_text())["accuracies"]
    assert scores["score"]["value"] == pytest.approx((scores["Math"]["value"] + scores["Ties"]["value"]) / 2)


def test_prompts_that_were_trained_on_are_counted(models, pairs, tmp_path):
    trained = write(
        tmp_path / "train.jsonl", [{"prompt": pairs[0]["prompt"][-1]["content"].upper()}, {"prompt": "else"}]
    )
    file = write(tmp_path / "pairs.jsonl", [{**p, "prompt": p["prompt"][-1]["content"]} for p in pairs])
    table = run("--model", models["bt"], "--pairs", file, "--out", tmp_path / "out", "--trained-on", trained)
    prompts = {p["prompt"][-1]["content"] for p in pairs}
    assert f"1 of {len(prompts)} prompts also stand in the training files" in table


def test_what_is_wrong_with_the_input_is_said_before_anything_is_scored(models, pairs, tmp_path):
    out = tmp_path / "out"
    bad = write(tmp_path / "bad.jsonl", [*pairs, {"prompt": "why ?", "chosen": "because"}])
    with pytest.raises(DataError, match=r"bad\.jsonl, line 17, field 'rejected': None is no response; give a text"):
        run("--model", models["vrm"], "--pairs", bad, "--out", out)
    with pytest.raises(CheckpointError, match="it is no reward model"):
        run("--model", tmp_path, "--pairs", bad, "--out", out)
    good = write(tmp_path / "good.jsonl", pairs)
    with pytest.raises(DataError, match="not a scored row"):
        run("--model", models["vrm"], "--pairs", good, "--out", out, "--compare", good)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test wants to miss")
def test_a_gpu_that_is_not_there_is_named(models, pairs, tmp_path):
    file = write(tmp_path / "pairs.jsonl", pairs)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        evaluate_reward_model(
            parse(["--model", models["vrm"], "--pairs", file, "--out", str(tmp_path / "o"), "--device", "cuda"])
        )


def test_rows_without_a_comparison_are_counted_in_the_result_and_refused_above_a_share(models, pairs, tmp_path):
    same = {**pairs[0], "id": "same", "rejected": pairs[0]["chosen"]}
    file = write(tmp_path / "pairs.jsonl", [*pairs[:9], same])
    options = ["--model", models["bt"], "--pairs", file, "--out", str(tmp_path / "out")]
    with pytest.raises(
        DataError,
        match=r"pairs\.jsonl: 1 of 10 comparisons cannot be used \(1 with identical responses\), more than "
        r"--max-left-out = 0\.05 allows",
    ):
        evaluate_reward_model(parse(options))
    printed = evaluate_reward_model(parse([*options, "--max-left-out", "0.1"]))
    assert "left out of the comparisons: 1 with identical responses" in printed
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (record["rows"], record["left_out"]) == (9, {"identical responses": 1})


def test_help_answers_without_torch():
    code = (
        "import sys; sys.argv = ['job', '--help']\n"
        "import jobs.evaluate_reward_model as job\n"
        "try: job.evaluate_reward_model_command()\n"
        "except SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules, 'ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert "--compare ROWS" in done.stdout
    assert done.stdout.strip().endswith("False False False")


def test_an_error_is_an_error_message_and_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate_reward_model_command(
            ["--model", str(tmp_path), "--pairs", "nothing.jsonl", "--out", str(tmp_path / "out")]
        )
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"CheckpointError: {tmp_path} holds no reward_model.json")
