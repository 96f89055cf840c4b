"""The generation job without engines: what it asks, what it keeps, what it refuses, what it writes."""

import importlib
import json
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import MagicMock

import pytest

from jobs.generate_answers import generate_answers, generate_answers_command
from jobs.generate_benchmark import command
from pipeline.benchmark.alpaca_eval.model_outputs import read_model_outputs
from pipeline.benchmark.arena_hard.answers import read_arena_answers
from pipeline.benchmark.generated_benchmark import GENERATED_BENCHMARKS, read_benchmark_questions
from pipeline.benchmark.mt_bench.answers import TEMPERATURES, read_mt_bench_answers
from pipeline.errors import ConfigError, DataError, WorkspaceLocked
from pipeline.models.backbone import create_tiny_causal_lm, save_causal_lm
from pipeline.stages.fingerprint import directory_fingerprint
from tests.conftest import SMALLEST
from tests.support.fakes import FakeRollouts
from tests.support.paths import SHARED_DATA, needs_public_data

parse = generate_answers_command.options


INSTRUCTIONS = [{"instruction": f"why the boat {n} ?", "dataset": "koala"} for n in range(5)]
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["the boat ?", "and the kite ?"]},
    {"question_id": 101, "category": "reasoning", "turns": ["the bread ?", "and the stove ?"]},
    {"question_id": 141, "category": "stem", "turns": ["the sea ?", "and the town ?"]},
]
ARENA = [{"uid": f"q{n}", "category": "c", "cluster": "x", "prompt": f"the lamp {n} ?"} for n in range(3)]


class Recording(FakeRollouts):
    """Remembers what it was asked, and dies when it has answered enough."""

    def __init__(self, tokenizer, dies_after):
        super().__init__(tokenizer)
        self.loaded = [0]
        self.requests = []
        self._left = dies_after

    def stream(self, waiting):
        while waiting:
            self.requests.append(waiting.popleft())
            if self._left == 0:
                raise KeyboardInterrupt
            self._left -= 1
            yield from self.generate([self.requests[-1][0]], self.requests[-1][1])


@pytest.fixture(scope="session")
def long_policy(tokenizer, tmp_path_factory):
    """A tiny policy with room for the official lengths."""
    directory = str(tmp_path_factory.mktemp("long-policy"))
    model = create_tiny_causal_lm(SMALLEST.model_copy(update={"max_positions": 16384}), tokenizer, seed=0)
    save_causal_lm(model.state_dict(), model.config, tokenizer, directory)
    return directory


@pytest.fixture
def answer(long_policy, tokenizer, tmp_path):
    """Runs the job; returns what was asked of the engines."""

    def answer(benchmark, prompts, *more, dies_after=-1, out="out"):
        if not isinstance(prompts, str):
            prompts = write(tmp_path / f"{benchmark}.jsonl", prompts)
        opened = []

        @contextmanager
        def open_rollouts(policy, questions, recipe, owner):
            opened.append(Recording(tokenizer, dies_after))
            yield opened[-1]

        options = ["--benchmark", benchmark, "--model", long_policy, "--prompts", prompts, "--name", "tiny"]
        try:
            answer.text = generate_answers(parse([*options, "--out", str(tmp_path / out), *more]), open_rollouts)
        except KeyboardInterrupt:
            assert dies_after >= 0
        return [request for rollouts in opened for request in rollouts.requests]

    return answer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def summary_of(out):
    [file] = out.glob("*.summary.json")
    return json.loads(file.read_text())


# ----------------------------------------------------------------------------- what is asked


@needs_public_data
def test_mt_bench_is_sampled_as_fastchat_samples_it(answer, tmp_path):
    requests = answer("mt_bench", str(SHARED_DATA / "mt_bench"))
    temperatures = Counter(sampling.temperature for _, sampling in requests)
    # Writing and roleplay; stem and humanities; the four others: two turns of ten questions each.
    assert temperatures == {0.7: 40, 0.1: 40, 0.0: 80}
    assert {sampling.max_response_tokens for _, sampling in requests} == {1024}
    lines = (SHARED_DATA / "mt_bench/question.jsonl").read_text().splitlines()
    questions = {row["question_id"]: row for row in map(json.loads, lines)}
    rows = [json.loads(line) for line in (tmp_path / "out/model_answer/tiny.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(81, 161))
    conversations = {prompt.id: [message["content"] for message in prompt.messages] for prompt, _ in requests}
    for row in rows:
        question_id, first = row["question_id"], row["choices"][0]["turns"][0]
        one, two = questions[question_id]["turns"]
        assert conversations[f"question {question_id}, turn 1"] == [one]
        assert conversations[f"question {question_id}, turn 2"] == [one, first, two]


@needs_public_data
@pytest.mark.parametrize(
    ("benchmark", "count", "temperature", "max_tokens"),
    [("alpaca_eval", 805, 0.7, 2048), ("arena_hard", 500, 0.0, 4096)],
)
def test_single_turn_benchmarks_are_asked_whole(answer, benchmark, count, temperature, max_tokens):
    # Two tokens an answer: the length of 805 answers is not what is tested.
    requests = answer(benchmark, str(SHARED_DATA / benchmark), "--max-response-tokens", "3")
    assert len(requests) == count
    assert {(len(prompt.messages), sampling.temperature) for prompt, sampling in requests} == {(1, temperature)}
    assert f"Answers had 3 tokens at most, the benchmark gives {max_tokens}" in answer.text
    assert "not comparable with published ones" not in answer.text


def test_the_seed_is_of_the_recipe_and_a_turn_has_its_own(answer, tmp_path):
    answer("alpaca_eval", INSTRUCTIONS)
    answer("alpaca_eval", INSTRUCTIONS, "seed=1", out="other")
    answer("alpaca_eval", INSTRUCTIONS, out="again")
    first, other, again = (
        [row.output for row in read_model_outputs(tmp_path / out / "model_outputs.json")]
        for out in ("out", "other", "again")
    )
    assert first == again != other
    assert len(set(first)) == len(first)


# ----------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("torn", [b"", b'{"question_id": 81, "turn": 2, "outp'])
def test_a_killed_run_goes_on_with_the_turns_it_has_not(answer, tmp_path, torn):
    answer("mt_bench", QUESTIONS, out="whole")
    assert len(answer("mt_bench", QUESTIONS, dies_after=3)) == 4
    assert not (tmp_path / "out/model_answer").exists()
    with (tmp_path / "out/mt_bench.answers").open("ab") as log:
        log.write(torn)

    requests = answer("mt_bench", QUESTIONS)

    assert len(requests) == 3
    assert answer("mt_bench", QUESTIONS) == []
    files = [str(tmp_path / out / "model_answer/tiny.jsonl") for out in ("out", "whole")]
    assert read_mt_bench_answers(files[:1]) == read_mt_bench_answers(files[1:])
    assert summary_of(tmp_path / "out")["turns"] == 6


def test_a_limit_answers_the_first_questions_and_the_rest_can_follow(answer, tmp_path):
    assert len(answer("alpaca_eval", INSTRUCTIONS, "--limit", "2")) == 2
    assert "2 questions" in answer.text
    assert "The benchmark has 805 questions" in answer.text
    assert len(read_model_outputs(tmp_path / "out/model_outputs.json")) == 2
    assert [prompt.id for prompt, _ in answer("alpaca_eval", INSTRUCTIONS)] == [
        f"question {n}, turn 1" for n in (2, 3, 4)
    ]
    rows = read_model_outputs(tmp_path / "out/model_outputs.json")
    assert [row.instruction for row in rows] == [row["instruction"] for row in INSTRUCTIONS]
    assert answer("alpaca_eval", INSTRUCTIONS, "--limit", "2") == []


# ----------------------------------------------------------------------------- what is refused

TWICE = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]]


@pytest.mark.parametrize(
    ("benchmark", "rows", "message"),
    [
        (
            "alpaca_eval",
            [INSTRUCTIONS[0], {"dataset": "koala"}],
            r"eval.jsonl, line 2, field 'instruction': None is no str",
        ),
        ("alpaca_eval", [{"instruction": " "}], r"eval.jsonl, line 1: question 0 has an empty turn"),
        ("alpaca_eval", [], r"eval.jsonl holds no questions"),
        (
            "alpaca_eval",
            [{"instruction": "?", "index": n} for n in (4, 4)],
            r"line 2: question 4 is already at .*line 1",
        ),
        (
            "alpaca_eval",
            [INSTRUCTIONS[0], INSTRUCTIONS[1], INSTRUCTIONS[0] | {"dataset": "other"}],
            r"eval.jsonl, line 3: 'why the boat 0 \?' is already at .*eval.jsonl, line 1. Answers are paired by this",
        ),
        ("mt_bench", TWICE, r"bench.jsonl, line 3: question 81 is already at .*bench.jsonl, line 1"),
        ("mt_bench", [{"question_id": 81, "category": "math"}], r"bench.jsonl, line 1, field 'turns': None is no list"),
        ("mt_bench", [{**QUESTIONS[0], "turns": []}], r"line 1, field 'turns': 0 turns"),
        (
            "arena_hard",
            [ARENA[0], {"uid": "q1", "category": "c"}],
            r"hard.jsonl, line 2, field 'prompt': None is no str",
        ),
        ("arena_hard", [ARENA[0], ARENA[0]], r"hard.jsonl, line 2: question q0 is already at"),
        (
            "alpaca_eval",
            [INSTRUCTIONS[0], {"instruction": "boat " * 16000}],
            r"line 2: with 2048 tokens for each answer this conversation can take 18\d+, and the model's",
        ),
    ],
)
def test_questions_that_cannot_be_used_are_named_before_any_engine_starts(answer, benchmark, rows, message):
    with pytest.raises(DataError, match=message):
        answer(benchmark, rows)


def test_questions_with_ids_may_have_the_same_text(tmp_path):
    """Arena-Hard and MT-Bench find a question by its id."""
    rows = [{**QUESTIONS[0], "question_id": number} for number in (81, 82)]
    questions = read_benchmark_questions(GENERATED_BENCHMARKS["mt_bench"], str(write(tmp_path / "q.jsonl", rows)))
    assert [question.id for question in questions] == [81, 82]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--name", "other"], r"mt_bench.answers, line 1: .* sampled with model = 'tiny', this run has 'other'"),
        (["--max-response-tokens", "5"], r"line 1: .* with max_response_tokens = 1024, this run has 5"),
        (["seed=3"], r"line 1: .* with seed = 0, this run has 3"),
        (["--keep-thoughts"], r"line 1: .* with keep_thoughts = False, this run has True"),
    ],
)
def test_answers_of_another_model_or_other_settings_are_not_mixed(answer, more, message):
    answer("mt_bench", QUESTIONS)
    with pytest.raises(DataError, match=message):
        answer("mt_bench", QUESTIONS, *more)


def test_answers_of_other_weights_are_not_mixed(answer, tmp_path, tiny_policy):
    answer("mt_bench", QUESTIONS)
    other = directory_fingerprint(tiny_policy)
    with pytest.raises(
        DataError,
        match=rf"mt_bench.answers, line 1: .* sampled with checkpoint = '[0-9a-f]{{64}}', this run has '{other}'",
    ):
        answer("mt_bench", QUESTIONS, "--model", tiny_policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": 99}, r"answers, line 5: answers question 99, which is not among the prompts"),
        ({"asked": "x"}, r"answers, line 5: question 101 has changed since then \(.*bench.jsonl, line 2\)"),
        ({"turn": 1}, r"answers, line 5: answers turn 1 of question 101, after 1 of 2 turns"),
        ({"output": ...}, r"answers, line 5: no answer, field 'output' is missing"),
        (None, r"answers, line 5: no JSON object: half a line"),
    ],
)
def test_a_kept_answer_that_belongs_nowhere_is_named(answer, tmp_path, change, message):
    answer("mt_bench", QUESTIONS)
    log = tmp_path / "out/mt_bench.answers"
    lines = log.read_text().splitlines()
    row = json.loads(lines[4]) | (change or {})
    assert (json.loads(lines[4])["question_id"], json.loads(lines[4])["turn"]) == (101, 2)
    lines[4] = "half a line" if change is None else json.dumps({k: v for k, v in row.items() if v is not ...})
    log.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        answer("mt_bench", QUESTIONS)


def test_two_runs_do_not_write_one_directory(answer, tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out/mt_bench.answers").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(WorkspaceLocked, match=r"another run appends to .*mt_bench.answers"):
            answer("mt_bench", QUESTIONS)


def test_a_model_that_is_not_there_is_named(answer, tmp_path):
    with pytest.raises(ConfigError, match=r"--model /nowhere is no directory with a config.json"):
        answer("mt_bench", QUESTIONS, "--model", "/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no instructions.jsonl or alpaca_eval.json"):
        answer("alpaca_eval", str(tmp_path / "empty"))


def test_the_stages_job_takes_a_benchmark_and_a_letter_is_all_it_prints(monkeypatch, tmp_path, capsys):
    prompts = write(tmp_path / "q.jsonl", TWICE)
    options = ["--benchmark=mt_bench", "--model", "/nowhere", "--prompts", prompts, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["generate_benchmark.py", *options])
    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        f"DataError: {prompts}, line 3: question 81 is already at {prompts}, line 1. Keep one of them.\n"
    )
    monkeypatch.setattr("sys.argv", ["generate_benchmark.py", "--dry-run"])
    command()
    assert "num_prompts: 256" in capsys.readouterr().out


def test_progress_counts_the_turns_of_earlier_runs(answer, monkeypatch, capsys):
    monkeypatch.setattr("pipeline.loops.benchmark_answers.PROGRESS_S", 0.0)
    answer("mt_bench", QUESTIONS, dies_after=4)
    answer("mt_bench", QUESTIONS)
    shown = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == [f"answered {n} of 6 turns" for n in range(1, 7)]


# ----------------------------------------------------------------------------- what is written


def test_arena_hard_is_written_for_both_editions_with_the_lengths_of_each(answer, tmp_path, monkeypatch):
    import tiktoken

    class Encoding:
        def __init__(self, name):
            self.width = {"cl100k_base": 1, "o200k_base": 2}[name]

        def encode(self, text, disallowed_special):
            return [0] * (self.width * len(text.split()))

    monkeypatch.setattr(tiktoken, "get_encoding", Encoding)
    answer("arena_hard", ARENA, "--max-response-tokens", "6")
    old, new = (read_arena_answers([str(tmp_path / "out" / e / "model_answer/tiny.jsonl")]) for e in ("v0.1", "v2"))
    assert [answer.question_id for answer in new] == ["q0", "q1", "q2"]
    assert [answer.num_tokens for answer in old] == [len(answer.output.split()) for answer in old]
    assert new == [replace(answer, num_tokens=2 * answer.num_tokens) for answer in old]
    assert "token_len" not in answer.text

    def unreachable(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    assert answer("arena_hard", ARENA, "--max-response-tokens", "6") == []
    assert summary_of(tmp_path / "out")["token_len"] == {"v0.1": "the model's own", "v2": "the model's own"}
    assert "token_len counts the model's own tokens" in answer.text


@pytest.mark.parametrize(
    ("options", "first"), [([], "The Elbe"), (["--keep-thoughts"], "I weigh it.\n</think>\n\nThe Elbe")]
)
def test_thoughts_are_in_the_files_only_if_asked_for_and_never_in_the_next_turn(
    answer, tmp_path, monkeypatch, options, first
):
    def generate(self, prompts, sampling):
        thought = "I weigh it.\n</think>\n\nThe Elbe"  # of a template that opens the block in the prompt
        return [replace(rollout, response_text=thought) for rollout in FakeRollouts.generate(self, prompts, sampling)]

    monkeypatch.setattr(Recording, "generate", generate)
    requests = answer("mt_bench", QUESTIONS[:1], *options)
    assert [[message["content"] for message in prompt.messages] for prompt, _ in requests] == [
        ["the boat ?"],
        ["the boat ?", "The Elbe", "and the kite ?"],
    ]
    [answered] = read_mt_bench_answers([str(tmp_path / "out/model_answer/tiny.jsonl")])
    assert answered.turns == (first, first)
    assert summary_of(tmp_path / "out")["keep_thoughts"] == bool(options)


def test_the_official_json_list_is_read_and_cut_or_empty_answers_are_counted(answer, tmp_path):
    path = tmp_path / "alpaca_eval.json"
    path.write_text(json.dumps([{**row, "output": "of the baseline", "generator": "b"} for row in INSTRUCTIONS]))
    answer("alpaca_eval", str(path))
    rows = json.loads((tmp_path / "out/model_outputs.json").read_text())
    assert [sorted(row) for row in rows] == [["dataset", "generator", "instruction", "output"]] * 5
    assert {(row["generator"], row["dataset"]) for row in rows} == {("tiny", "koala")}
    summary = summary_of(tmp_path / "out")
    assert (summary["cut_at_max_response_tokens"], summary["empty"]) == (0, 0)


@pytest.mark.filterwarnings("ignore")
def test_fastchat_reads_the_answers(answer, tmp_path, monkeypatch):
    pytest.importorskip("fastchat", reason="needs FastChat: pip install --no-deps fschat==0.2.36")
    # Reading answers uses neither its clients nor its models, which take long to import.
    for unused in ("openai", "anthropic", "fastchat.model.model_adapter"):
        monkeypatch.setitem(sys.modules, unused, MagicMock())
    common = importlib.import_module("fastchat.llm_judge.common")
    answer("mt_bench", QUESTIONS)
    theirs = common.load_model_answers(str(tmp_path / "out/model_answer"))
    ours = read_mt_bench_answers([str(tmp_path / "out/model_answer/tiny.jsonl")])
    assert list(theirs) == ["tiny"]
    assert {name: common.temperature_config[name] for name in TEMPERATURES} == TEMPERATURES
    assert {q: tuple(row["choices"][0]["turns"]) for q, row in theirs["tiny"].items()} == {
        answer.question_id: answer.turns for answer in ours
    }


def test_prompts_come_from_the_hub_by_name(answer, monkeypatch):
    import datasets

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("some/bench", "eval", True)
        return iter(INSTRUCTIONS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(answer("alpaca_eval", "hub:some/bench:eval")) == 5

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'some/bench' cannot be opened: no network\. .* give --prompts its file"):
        answer("alpaca_eval", "hub:some/bench")
