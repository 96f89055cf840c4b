"""The evaluation job on what a policy implies: from two checkpoints to the table of a benchmark."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.evaluate_reward_model import evaluate_reward_model, evaluate_reward_model_command
from pipeline.data.chat import encode_prompt, encode_response
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.evaluation.implicit_reward_scorer import ImplicitRewardScorer
from pipeline.objectives.implicit_rewards import IMPLICIT_FORMS

parse = evaluate_reward_model_command.options


@pytest.fixture(scope="module")
def aligned(tiny_policy, tmp_path_factory):
    """A directory with the tiny policy, moved some tenths of a nat away from itself."""
    directory = str(tmp_path_factory.mktemp("aligned") / "policy")
    shutil.copytree(tiny_policy, directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pairs(world):
    subsets = ("alpacaeval-easy", "hep-python")
    return [
        {"id": p.id, "prompt": list(p.prompt), "chosen": p.chosen, "rejected": p.rejected, "subset": subsets[n % 2]}
        for n, p in enumerate(world.heldout_pairs())
    ]


@pytest.fixture
def file(pairs, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return str(path)


def run(*arguments):
    return evaluate_reward_model(parse([*map(str, arguments), "--device", "cpu"]))


def rewards(directory):
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    return [(row["chosen"][0]["mean"], row["rejected"][0]["mean"]) for row in rows]


def log_probability(directory, tokenizer, prompt, response):
    """Sum over the response and its end token, one sequence at a time, without packing."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt_ids, response_ids = encode_prompt(tokenizer, prompt), encode_response(tokenizer, response)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(response_ids).unsqueeze(-1))
    return float(chosen.sum()), len(response_ids)


def test_rewardbench_scores_a_policy_with_reference_by_the_summed_log_ratio(
    aligned, tiny_policy, tokenizer, pairs, file, tmp_path
):
    """RewardBench's convention for DPO models: the sum of log pi - log pi_ref, without beta, end token included."""
    arguments = ("--policy", aligned, "--reference", tiny_policy, "--form", "dpo", "--benchmark", "rewardbench")
    table = run(*arguments, "--pairs", file, "--out", tmp_path / "out")
    found = rewards(tmp_path / "out")
    for row, scored in zip(pairs[:3], found, strict=False):
        for side, reward in zip(("chosen", "rejected"), scored, strict=True):
            pi, _ = log_probability(aligned, tokenizer, row["prompt"], row[side])
            ref, _ = log_probability(tiny_policy, tokenizer, row["prompt"], row[side])
            assert reward == pytest.approx(pi - ref, abs=1e-4)
            assert abs(reward) > 1e-3
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    right = [chosen > rejected for chosen, rejected in found]
    assert metrics["accuracies"]["Chat"]["value"] == pytest.approx(sum(right[0::2]) / 8)
    assert metrics["accuracies"]["Reasoning"]["value"] == pytest.approx(sum(right[1::2]) / 8)
    assert (metrics["form"], metrics["beta"]) == ("dpo", 1.0)
    assert "Chat" in table


def test_rewardbench_scores_a_policy_without_reference_by_the_mean_log_probability(
    aligned, tokenizer, pairs, file, tmp_path
):
    run("--policy", aligned, "--form", "simpo", "--pairs", file, "--out", tmp_path / "out")
    pi, length = log_probability(aligned, tokenizer, pairs[0]["prompt"], pairs[0]["chosen"])
    assert rewards(tmp_path / "out")[0][0] == pytest.approx(pi / length, abs=1e-5)


def test_beta_scales_margins_and_moves_no_accuracy(aligned, tiny_policy, file, tmp_path):
    arguments = ("--policy", aligned, "--reference", tiny_policy, "--form", "dpo", "--pairs", file)
    run(*arguments, "--out", tmp_path / "one")
    table = run(*arguments, "--beta", 0.1, "--out", tmp_path / "tenth", "--compare", tmp_path / "one" / "rows.jsonl")
    one, tenth = rewards(tmp_path / "one"), rewards(tmp_path / "tenth")
    assert [c / 10 for c, _ in one] == pytest.approx([c for c, _ in tenth], abs=1e-6)
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("tenth", "one"))
    assert ours["accuracies"]["accuracy"] == theirs["accuracies"]["accuracy"]
    assert ours["scored_by"] != theirs["scored_by"]
    assert "this minus the other" in table


def test_a_policy_that_is_its_reference_ties_everywhere_and_ties_are_wrong(tiny_policy, file, tmp_path):
    run("--policy", tiny_policy, "--reference", tiny_policy, "--form", "kto", "--pairs", file, "--out", tmp_path / "o")
    accuracies = json.loads((tmp_path / "o" / "metrics.json").read_text())["accuracies"]
    assert accuracies["accuracy"]["value"] == 0.0
    assert accuracies["accuracy_tie_half"]["value"] == 0.5


def test_scores_do_not_depend_on_what_shared_a_batch(aligned, tiny_policy, file, tmp_path):
    arguments = ("--policy", aligned, "--reference", tiny_policy, "--form", "dpo", "--pairs", file)
    run(*arguments, "--out", tmp_path / "one", "--max-tokens-per-batch", 1)
    run(*arguments, "--out", tmp_path / "all", "--max-tokens-per-batch", 100_000)
    torch.testing.assert_close(
        torch.tensor(rewards(tmp_path / "one")), torch.tensor(rewards(tmp_path / "all")), atol=1e-4, rtol=0
    )


def test_a_response_longer_than_the_context_is_cut_and_counted(tiny_policy, aligned, world):
    prompt = world.heldout_pairs()[0].prompt
    scorer = ImplicitRewardScorer.load(aligned, tiny_policy, IMPLICIT_FORMS["dpo"], beta=1.0, max_tokens_per_batch=512)
    long = "a " * 300
    assert not scorer.fits(prompt, long)
    assert scorer.fits(prompt, "a")
    first, second = scorer.score([prompt, prompt], [long, "a " * 400])
    assert first.mean == pytest.approx(second.mean, abs=1e-4)


@pytest.fixture
def other_vocabulary(tiny_policy, tmp_path):
    """The tiny policy with two tokens of its vocabulary exchanged."""
    directory = tmp_path / "other"
    shutil.copytree(tiny_policy, directory)
    place = directory / "tokenizer.json"
    content = json.loads(place.read_text())
    vocabulary = content["model"]["vocab"]
    special = {token["content"] for token in content["added_tokens"]}
    first, second = [token for token in vocabulary if token not in special][-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    place.write_text(json.dumps(content))
    return str(directory)


def test_what_is_wrong_with_the_input_is_said_before_anything_is_scored(
    aligned, tiny_policy, other_vocabulary, file, tmp_path
):
    out = tmp_path / "out"
    scored = ("--pairs", file, "--out", out)
    policy = ("--policy", aligned)
    with pytest.raises(ConfigError, match=r"give --model .*, or --policy"):
        run(*scored)
    with pytest.raises(ConfigError, match="and not both"):
        run("--model", aligned, *policy, *scored)
    with pytest.raises(ConfigError, match="--policy needs --form, the method it was aligned with: dpo, ipo"):
        run(*policy, *scored)
    with pytest.raises(ConfigError, match=r"--form dpo is beta \(lp - lr\).* Give --reference"):
        run(*policy, "--form", "dpo", *scored)
    with pytest.raises(ConfigError, match=r"reads no reference\. Leave --reference out"):
        run(*policy, "--reference", tiny_policy, "--form", "simpo", *scored)
    with pytest.raises(ConfigError, match="--beta 0: beta is > 0"):
        run(*policy, "--reference", tiny_policy, "--form", "dpo", "--beta", 0, *scored)
    with pytest.raises(ConfigError, match=r"has another vocabulary: 2 of the policy's \d+ tokens"):
        run(*policy, "--reference", other_vocabulary, "--form", "dpo", *scored)
    with pytest.raises(ConfigError, match="--form belongs to --policy"):
        run("--model", aligned, "--form", "dpo", *scored)
    with pytest.raises(CheckpointError, match=r"nothing' does not exist .*Give a directory"):
        run("--policy", tmp_path / "nothing", "--form", "simpo", *scored)
    assert not out.exists()


def test_rows_of_two_references_never_mix(aligned, tiny_policy, file, tmp_path):
    arguments = ("--policy", aligned, "--form", "dpo", "--pairs", file, "--out", tmp_path / "out")
    run(*arguments, "--reference", tiny_policy)
    with pytest.raises(DataError, match="scored by another model"):
        run(*arguments, "--reference", aligned)
