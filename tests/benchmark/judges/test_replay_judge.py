"""A file of judgments answers the same messages again."""

import json

import pytest

from pipeline.benchmark.judges.collect_outcomes import collect_outcomes
from pipeline.benchmark.judges.judge import Unanswered
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from pipeline.benchmark.judges.replay_judge import ReplayJudge
from pipeline.errors import DataError
from tests.benchmark.judges.echo_judge import EchoJudge, ask, judgment_of


def test_a_cache_can_be_replayed_by_its_messages(tmp_path):
    path = tmp_path / "c"
    with JudgmentCache.open(path) as cache:
        collect_outcomes(EchoJudge(), [ask("a"), ask("b")], cache)
    judge = ReplayJudge(path)
    assert judge.model == "e-1"
    collected = collect_outcomes(judge, [ask("b"), ask("z")], None)
    assert collected.outcomes == (judgment_of("B"), Unanswered(reason="not in the replay file"))


def test_a_replay_file_may_say_as_little_as_who_what_and_the_answer(tmp_path):
    row = {"model": "gpt-4", "messages": [{"role": "user", "content": "a"}], "judgment": {"text": "[[7]]"}}
    (tmp_path / "c").write_text(json.dumps(row) + "\n")
    [judgment] = collect_outcomes(ReplayJudge(tmp_path / "c"), [ask("a")], None).outcomes
    assert (judgment.text, judgment.prompt_tokens) == ("[[7]]", None)


@pytest.mark.parametrize(
    ("rows", "letter"),
    [
        ([("e-1", "a", "A"), ("e-2", "b", "B")], "2 models"),
        ([("e-1", "a", "A"), ("e-1", "a", "B")], "line 2: a second, different judgment"),
        ([], "0 models"),
    ],
)
def test_a_replay_that_means_two_things_is_refused(tmp_path, rows, letter):
    path = tmp_path / "c"
    lines = [
        {"model": model, "messages": [{"role": "user", "content": text}], "judgment": {"text": answer}}
        for model, text, answer in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=letter):
        ReplayJudge(path)


def test_a_missing_replay_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        ReplayJudge(tmp_path / "nowhere")
