"""The judging job as a process: killed and resumed, refused early, replayed, with the reward model as judge."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from jobs.judge_benchmark import judge_benchmark, judge_benchmark_command
from pipeline.data.planted import GoldAnnotator
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.models.backbone import load_backbone
from pipeline.models.reward_model import RewardModel, make_head, save_reward_model
from pipeline.stages.fingerprint import directory_fingerprint
from tests.support.judge_server import completion, judge_server, refusal
from tests.support.learners import HEAD, reward_card, statistics_of
from tests.support.paths import ROOT

parse = judge_benchmark_command.options

KEY = "VRM_JUDGE_API_KEY"

# Words of the planted world, or its reward model could not tell them apart.
WORDS = ("boat", "piano", "kite", "bridge", "fence", "hammer", "mirror", "bread", "stove", "town", "sea", "lamp")
ANSWERS = {"ours": "the {word} is fine .", "base": "i doubt the {word} ."}


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def alpaca(tmp_path):
    """Arguments for twelve pairs of answers, without a judge."""
    sides = {
        side: write(
            tmp_path / f"{side}.json",
            [
                {"instruction": f"explain the {word} ?", "output": answer.format(word=word), "generator": side}
                for word in WORDS
            ],
        )
        for side, answer in ANSWERS.items()
    }
    template = tmp_path / "clf.txt"
    template.write_text("<|im_start|>user\n{instruction} m: {output_1} M: {output_2}\n<|im_end|>")
    out = str(tmp_path / "out" / "annotations.json")
    return [
        *("--benchmark", "alpaca_eval", "--answers", sides["ours"], "--baseline", sides["base"]),
        *("--templates", str(template), "--out", out),
    ]


@pytest.fixture
def arena(tmp_path):
    """Arguments for three Arena-Hard questions."""
    words = WORDS[:3]
    questions = [{"uid": word, "category": "c", "prompt": f"explain the {word} ?"} for word in words]
    answers = {
        model: write(
            tmp_path / f"{model}.jsonl",
            [
                {
                    "uid": word,
                    "model": model,
                    "messages": [{"role": "assistant", "content": {"answer": answer.format(word=word)}}],
                    "metadata": {"token_len": 5},
                }
                for word in words
            ],
        )
        for model, answer in ANSWERS.items()
    }
    template = tmp_path / "judge.yaml"
    template.write_text('system_prompt: Be fair.\nprompt_template: "{QUESTION} A: {ANSWER_A} B: {ANSWER_B}"\n')
    return [
        *(
            "--benchmark",
            "arena_hard",
            "--questions",
            write(tmp_path / "q.jsonl", questions),
            "--answers",
            answers["ours"],
        ),
        *("--baseline", answers["base"], "--templates", str(template), "--out", str(tmp_path / "out" / "ours.jsonl")),
    ]


@pytest.fixture
def mt_bench(tmp_path):
    """Arguments for one MT-Bench question."""
    questions = write(tmp_path / "mt.jsonl", [{"question_id": 81, "category": "writing", "turns": ["q1", "q2"]}])
    row = {"question_id": 81, "model_id": "ours", "choices": [{"index": 0, "turns": ["a1", "a2"]}]}
    user = {
        "single-v1": "{question} {answer}",
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1": "{question} {ref_answer_1} {answer}",
        "single-math-v1-multi-turn": "{question_1}{ref_answer_1}{question_2}{ref_answer_2}{answer_1}{answer_2}",
    }
    prompts = [{"name": name, "system_prompt": "s", "prompt_template": text} for name, text in user.items()]
    return [
        *("--benchmark", "mt_bench", "--questions", questions, "--answers", write(tmp_path / "a.jsonl", [row])),
        *("--references", write(tmp_path / "r.jsonl", [row]), "--templates", write(tmp_path / "p.jsonl", prompts)),
        *("--out", str(tmp_path / "out" / "gpt-x_single.jsonl")),
    ]


def endpoint(server, *more):
    return ["--judge", server.url, "--model", "gpt-x", *more]


def rows_of(arguments):
    path = Path(arguments[arguments.index("--out") + 1])
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def summary_of(arguments):
    return json.loads(Path(arguments[arguments.index("--out") + 1]).with_suffix(".summary.json").read_text())


def test_a_killed_run_resumes_without_asking_twice(alpaca):
    reached = threading.Event()
    release = threading.Event()

    def answer(body, n):
        if n == 5:
            reached.set()
            release.wait(120)
        return completion("m", logprobs={"m": -0.1, "M": -2.0})

    with judge_server(answer) as server:
        arguments = [*alpaca, *endpoint(server, "--concurrency", "1")]
        command = [sys.executable, "-m", "jobs.judge_benchmark", *arguments]
        environment = {**os.environ, KEY: "sk-of-this-test"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert reached.wait(120)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        release.set()
        answered = server.questions[:5]
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    # Twelve pairs, and the one that was being asked when the run was killed.
    assert len(server.questions) == 13
    assert set(server.questions[5:]).isdisjoint(answered)
    assert len(set(server.questions)) == 12
    assert [row["preference"] is not None for row in rows_of(alpaca)] == [True] * 12
    assert (summary_of(alpaca)["requests"], summary_of(alpaca)["sent"]) == (12, 7)
    assert server.seen[0].authorization == "Bearer sk-of-this-test"
    written = [path.read_bytes() for path in Path(alpaca[-1]).parent.iterdir()]
    assert not any(
        b"sk-of-this-test" in text for text in [*written, finished.stdout.encode(), finished.stderr.encode()]
    )


def test_unanswered_requests_end_with_1_and_alone_are_asked_again(alpaca, monkeypatch, capsys):
    down = {"explain the kite ?", "explain the town ?"}

    def answer(body, n):
        busy = any(body["messages"][0]["content"].startswith(question) for question in down)
        return refusal(400, "too long") if busy else completion("m", logprobs={"m": -0.1, "M": -2.0})

    with judge_server(answer) as server:
        monkeypatch.setattr(sys, "argv", ["judge_benchmark", *alpaca, *endpoint(server)])
        with pytest.raises(SystemExit) as caught:
            judge_benchmark_command()
        assert caught.value.code == 1
        assert "2 unanswered" in capsys.readouterr().err
        assert [row["instruction"] for row in rows_of(alpaca) if row["preference"] is None] == [
            "explain the kite ?",
            "explain the town ?",
        ]
        down.clear()
        judge_benchmark_command()
    assert len(server.questions) == 14
    assert all(row["preference"] is not None for row in rows_of(alpaca))


def test_half_an_emoji_leaves_one_row_without_a_verdict_in_each_run(alpaca):
    def answer(body, n):
        is_kite = body["messages"][0]["content"].startswith("explain the kite ?")
        return completion("\ud83d" if is_kite else "m", logprobs={"m": -0.1, "M": -2.0})

    with judge_server(answer) as server:
        for sent in (12, 1):
            account = judge_benchmark(parse([*alpaca, *endpoint(server)]))
            assert account.sent == sent
            assert list(account.unanswered.values()) == [1]
            [row] = [row for row in rows_of(alpaca) if row["preference"] is None]
            assert (row["instruction"], row["failure"][:34]) == (
                "explain the kite ?",
                "the judge's answer is no Unicode t",
            )


def test_the_summary_says_who_judged_what_with_which_prompt_and_for_how_much(alpaca, tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    prices = write(tmp_path / "prices.json", {"gpt-x": {"prompt": 10, "completion": 30}})
    with judge_server(lambda body, n: completion("neither" if n == 0 else "m", tokens=(1000, 1))) as server:
        judge_benchmark(parse([*alpaca, *endpoint(server, "--prices", prices)]))
    assert server.seen[0].authorization is None
    summary = summary_of(alpaca)
    assert (summary["judge"], summary["model"]) == (server.url, "gpt-x")
    assert (summary["prompt_tokens"], summary["completion_tokens"], summary["unparsed"]) == (12000, 12, 1)
    assert summary["cost"] == pytest.approx(12 * (0.01 + 0.00003))
    assert summary["sampling"] == {"temperature": 1.0, "max_tokens": 1, "top_logprobs": 5}
    assert sorted(summary["inputs"]) == ["answers", "baseline", "templates"]
    assert all(len(digest) == 64 for digest in summary["inputs"].values())


def test_arena_hard_is_judged_in_both_orders(arena):
    def prefers_ours(body, n):
        shown_first = "fine . B:" in body["messages"][1]["content"]
        return completion("My verdict: [[A>B]]" if shown_first else "My verdict: [[B>>A]]")

    with judge_server(prefers_ours) as server:
        judge_benchmark(parse([*arena, *endpoint(server)]))
    assert [[game["score"] for game in row["games"]] for row in rows_of(arena)] == [["B>>A", "A>B"]] * 3


def test_mt_bench_is_graded_turn_by_turn(mt_bench):
    with judge_server(
        lambda body, n: completion("[[9]]" if "a2" in body["messages"][1]["content"] else "[[4]]")
    ) as server:
        judge_benchmark(parse([*mt_bench, *endpoint(server)]))
    assert [(row["turn"], row["score"]) for row in rows_of(mt_bench)] == [(1, 4.0), (2, 9.0)]


def test_a_run_can_be_replayed_from_its_cache_without_a_server(arena, tmp_path):
    with judge_server(lambda body, n: completion("[[A=B]]")) as server:
        judge_benchmark(parse([*arena, *endpoint(server)]))
    first = rows_of(arena)
    replayed = [*arena[:-1], str(tmp_path / "again" / "ours.jsonl")]
    costs = judge_benchmark(parse([*replayed, "--judge", f"replay:{arena[-1]}.cache"]))
    assert rows_of(replayed) == first
    assert costs.model == "gpt-x"
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["ours.jsonl", "ours.summary.json"]


@pytest.fixture(scope="module")
def reward_model(tiny_policy, tokenizer, world, tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("reward-model"))
    backbone = load_backbone(tiny_policy, dtype="float32")
    torch.manual_seed(0)
    save_reward_model(
        directory,
        state_dict=RewardModel(backbone, make_head("vrm", 64, 4, HEAD)).state_dict(),
        backbone_config=backbone.config.to_dict(),
        tokenizer=tokenizer,
        card=reward_card("vrm", statistics_of(world)),
    )
    return directory


def test_the_reward_model_judges_arena_hard_the_same_in_either_order(arena, reward_model):
    costs = judge_benchmark(parse([*arena, "--judge", f"vrm:{reward_model}"]))
    mirrored = {"A>B": "B>A", "B>A": "A>B"}
    for row in rows_of(arena):
        first, second = (game["score"] for game in row["games"])
        assert second == mirrored[first]
        assert row["judge"] == f"vrm-{directory_fingerprint(reward_model)[:12]}"
    assert (costs.requests, costs.sent) == (6, 6)
    assert judge_benchmark(parse([*arena, "--judge", f"vrm:{reward_model}"])).sent == 0


def test_the_reward_models_preferences_in_alpaca_eval_are_probabilities(alpaca, reward_model):
    judge_benchmark(parse([*alpaca, "--judge", f"vrm:{reward_model}"]))
    preferences = [row["preference"] for row in rows_of(alpaca)]
    assert all(1.0 < preference < 2.0 for preference in preferences)
    assert len(set(preferences)) == 12


def without_templates(arguments):
    place = arguments.index("--templates")
    return arguments[:place] + arguments[place + 2 :]


def test_a_judge_that_scores_answers_needs_no_prompt(alpaca, arena, reward_model):
    for arguments in (alpaca, arena):
        judge_benchmark(parse([*arguments, "--judge", f"vrm:{reward_model}"]))
        with_templates = rows_of(arguments)
        shutil.rmtree(Path(arguments[-1]).parent)
        judge_benchmark(parse([*without_templates(arguments), "--judge", f"vrm:{reward_model}"]))
        for row, same in zip(rows_of(arguments), with_templates, strict=True):
            if "games" in row:
                assert [game["score"] for game in row["games"]] == [game["score"] for game in same["games"]]
            else:
                assert row["preference"] == pytest.approx(same["preference"])


def test_the_planted_truth_judges_prompts_of_its_world_alone(alpaca, tmp_path):
    instruction = "explain the facts about the wagon at work ."
    texts = {"ours": "results may differ in practice .", "base": "everyone knows it is so ."}
    sides = {
        side: write(tmp_path / f"{side}-gold.json", [{"instruction": instruction, "output": text, "generator": side}])
        for side, text in texts.items()
    }
    out = str(tmp_path / "gold" / "annotations.json")
    files = ["--benchmark", "alpaca_eval", "--answers", sides["ours"], "--baseline", sides["base"]]
    judge_benchmark(parse([*files, "--judge", "gold:planted", "--out", out]))
    # A hedge is honest and a boast is not; all else is equal.
    gold = GoldAnnotator()
    prompt = [{"role": "user", "content": instruction}]
    gap = gold.reward(prompt, texts["ours"]) - gold.reward(prompt, texts["base"])
    [row] = rows_of(["--out", out])
    assert gap > 0
    assert row["preference"] == pytest.approx(1 + 1 / (1 + math.exp(-gap)))
    assert row["annotator"] == "scored/gold-planted"
    with pytest.raises(DataError, match="not of the planted world"):
        judge_benchmark(parse([*alpaca, "--judge", "gold:planted"]))


def test_the_reward_model_does_not_grade(mt_bench, reward_model):
    with pytest.raises(ConfigError, match="grades"):
        judge_benchmark(parse([*mt_bench, "--judge", f"vrm:{reward_model}"]))


@pytest.mark.parametrize(
    ("judge", "kind", "message"),
    [
        (["--judge", "gpt-4"], ConfigError, "give an endpoint"),
        (["--judge", "https://api.openai.com/v1"], ConfigError, "needs --model"),
        (["--judge", "replay:/nowhere.cache"], DataError, "nowhere"),
        (["--judge", "vrm:/nowhere"], CheckpointError, "no reward model"),
        (["--judge", "http://127.0.0.1:9/v1", "--model", "m", "--concurrency", "0"], ConfigError, "at least 1"),
        (["--judge", "http://127.0.0.1:9/v1", "--model", "m", "--prices", "/nowhere"], DataError, "no price"),
    ],
)
def test_a_judge_that_cannot_judge_is_refused_before_anything_is_asked_or_written(alpaca, judge, kind, message):
    with pytest.raises(kind, match=message):
        judge_benchmark(parse([*alpaca, *judge]))
    assert not Path(alpaca[-1]).exists()


def test_an_unknown_judge_is_named_before_the_files_it_would_need():
    with pytest.raises(ConfigError, match="--judge 'foo': give an endpoint"):
        parse(["--benchmark", "alpaca_eval", "--answers", "a", "--judge", "foo", "--out", "o.json"])


def test_a_judge_that_reads_prompts_needs_them(capsys):
    files = ["--answers", "a", "--baseline", "b", "--out", "o.json", "--judge"]
    with pytest.raises(SystemExit):
        parse(["--benchmark", "alpaca_eval", *files, "https://somewhere/v1"])
    assert "alpaca_eval needs --templates, the prompts that https://somewhere/v1 reads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark", "alpaca_eval"], "written to a .json file, not to o.jsonl"),
        (["--benchmark", "arena_hard"], "arena_hard needs --baseline"),
        (["--benchmark", "arena_hard", "--baseline", "b"], "arena_hard needs --questions"),
        (["--benchmark", "mt_bench", "--questions", "q"], "mt_bench needs --references"),
        (["--benchmark", "mt_bench", "--baseline", "b"], "mt_bench has no --baseline"),
    ],
)
def test_files_a_benchmark_needs_or_does_not_know_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse([*arguments, "--answers", "a", "--templates", "t", "--judge", "replay:j", "--out", "o.jsonl"])
    assert message in capsys.readouterr().err
