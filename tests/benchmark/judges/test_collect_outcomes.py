"""Each request is sent once, and its judgment is stored."""

import pytest

from pipeline.benchmark.judges.collect_outcomes import collect_outcomes, request_key
from pipeline.benchmark.judges.judge import JudgeSampling
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from tests.benchmark.judges.echo_judge import EchoJudge, ask


def test_outcomes_come_in_the_order_of_the_requests_and_equal_requests_are_asked_once():
    judge = EchoJudge()
    collected = collect_outcomes(judge, [ask("a"), ask("b"), ask("a")], None)
    assert [outcome.text for outcome in collected.outcomes] == ["A", "B", "A"]
    assert sorted(judge.received) == ["a", "b"]


def test_what_was_judged_is_not_asked_again_and_what_was_not_is(tmp_path):
    path = tmp_path / "judgments.cache"
    with JudgmentCache.open(path) as cache:
        collect_outcomes(EchoJudge(refuses={"b"}), [ask("a"), ask("b")], cache)
    judge = EchoJudge()
    with JudgmentCache.open(path) as cache:
        collected = collect_outcomes(judge, [ask("a"), ask("b"), ask("c")], cache)
    assert sorted(judge.received) == ["b", "c"]
    assert [outcome.text for outcome in collected.outcomes] == ["A", "B", "C"]


def test_progress_counts_what_was_known_and_what_failed(tmp_path):
    with JudgmentCache.open(tmp_path / "c") as cache:
        collect_outcomes(EchoJudge(), [ask("a")], cache)
        steps = []
        collect_outcomes(
            EchoJudge(refuses={"b"}), [ask(t) for t in "abca"], cache, progress=lambda *step: steps.append(step)
        )
    assert steps == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("judge", "request_"),
    [
        (EchoJudge(name="another"), ask("a")),
        (EchoJudge(model="e-2"), ask("a")),
        (EchoJudge(), ask("a ")),
        (EchoJudge(), ask("a", JudgeSampling(temperature=0.5, max_tokens=16, top_logprobs=0))),
        (EchoJudge(), ask("a", JudgeSampling(temperature=0.0, max_tokens=17, top_logprobs=0))),
        (EchoJudge(), ask("a", JudgeSampling(temperature=0.0, max_tokens=16, top_logprobs=5))),
    ],
)
def test_another_judge_question_or_setting_is_another_request(judge, request_):
    assert request_key(EchoJudge(), ask("a")) == request_key(EchoJudge(), ask("a"))
    assert request_key(judge, request_) != request_key(EchoJudge(), ask("a"))
