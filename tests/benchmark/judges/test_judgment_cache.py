"""Judgments on disk survive a killed run unchanged."""

import pytest

from pipeline.benchmark.judges.collect_outcomes import collect_outcomes
from pipeline.benchmark.judges.judge import Judgment
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from pipeline.errors import DataError, WorkspaceLocked
from tests.benchmark.judges.echo_judge import EchoJudge, ask, judgment_of


def test_a_judgment_comes_back_from_the_cache_as_it_went_in(tmp_path):
    judgment = Judgment(
        text="M\u2028 \r\n ünï",
        first_token_logprobs={"M": -0.1, "m": -2.5},
        finish_reason="length",
        prompt_tokens=None,
        completion_tokens=1,
        time=12.25,
    )
    with JudgmentCache.open(tmp_path / "c") as cache:
        cache.append("k", EchoJudge(), ask("a"), judgment)
    with JudgmentCache.open(tmp_path / "c") as cache:
        assert cache.get("k") == judgment
        assert cache.get("l") is None


def test_a_line_that_a_kill_cut_short_is_dropped_and_the_next_one_starts_afresh(tmp_path):
    path = tmp_path / "c"
    with JudgmentCache.open(path) as cache:
        collect_outcomes(EchoJudge(), [ask("a"), ask("b")], cache)
    path.write_bytes(path.read_bytes()[:-10])
    judge = EchoJudge()
    with JudgmentCache.open(path) as cache:
        collect_outcomes(judge, [ask("a"), ask("b")], cache)
    assert len(judge.received) == 1
    with JudgmentCache.open(path) as cache:
        collect_outcomes(judge, [ask("a"), ask("b")], cache)
    assert len(judge.received) == 1


def test_each_judgment_is_in_the_file_before_the_next_one_is_waited_for(tmp_path):
    path = tmp_path / "c"
    lines = []

    class Watching(EchoJudge):
        def judge(self, requests, record):
            for i, _ in enumerate(requests):
                record(i, judgment_of(str(i)))
                lines.append(path.read_text().count("\n"))

    with JudgmentCache.open(path) as cache:
        collect_outcomes(Watching(), [ask("a"), ask("b"), ask("c")], cache)
    assert lines == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "c"
    path.write_text('{"key": "k", "judgment": {"text": "fine"}}\n{"key": 3}\n')
    with pytest.raises(DataError, match=r"c, line 2: no judgment"), JudgmentCache.open(path):
        pass


def test_two_runs_do_not_share_a_cache(tmp_path):
    with (
        JudgmentCache.open(tmp_path / "c"),
        pytest.raises(WorkspaceLocked, match="another run"),
        JudgmentCache.open(tmp_path / "c"),
    ):
        pass


@pytest.mark.parametrize("value", ["NaN", "Infinity", "true", '"-1"', "3"])
def test_what_is_no_log_probability_is_named_by_its_line(value, tmp_path):
    path = tmp_path / "c"
    path.write_text(f'{{"judgment": {{"text": "m", "first_token_logprobs": {{"m": {value}}}}}}}\n')
    with (
        pytest.raises(DataError, match=r"c, line 1: no judgment .* is no log-probability of 'm'"),
        JudgmentCache.open(path),
    ):
        pass
