"""Each request is sent once, and its judgment is stored."""

from dataclasses import replace

import pytest

from pipeline.benchmark.judges.collect_outcomes import collect_outcomes, request_key
from pipeline.benchmark.judges.judge import JudgeSampling, Unanswered
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from tests.benchmark.judges.echo_judge import EchoJudge, ask, judgment_of


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


class HalfEmojiJudge(EchoJudge):
    """Answers "b" with half an emoji, in its text, its alternatives or its reason."""

    def __init__(self, outcome):
        super().__init__()
        self.outcome = outcome

    def judge(self, requests, record):
        def recorded(i, outcome):
            record(i, self.outcome if requests[i].messages[-1]["content"] == "b" else outcome)

        super().judge(requests, recorded)


HALF = "fine \ud83d"


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (judgment_of(HALF), "the judge's answer is no Unicode text: it holds half a surrogate pair"),
        (Unanswered(reason=HALF), "fine ?"),
    ],
)
def test_half_an_emoji_costs_one_verdict_and_no_rerun_trips_over_it(outcome, reason, tmp_path):
    for run in range(2):
        judge = HalfEmojiJudge(outcome)
        with JudgmentCache.open(tmp_path / "c") as cache:
            a, b, c = collect_outcomes(judge, [ask("a"), ask("b"), ask("c")], cache).outcomes
        assert (a.text, b, c.text) == ("A", Unanswered(reason=reason), "C")
        assert sorted(judge.received) == (["a", "b", "c"] if run == 0 else ["b"])


def test_an_alternative_token_with_half_an_emoji_is_left_out(tmp_path):
    outcome = replace(judgment_of("m"), first_token_logprobs={"m": -0.5, "\udc4d": -2.0}, finish_reason=HALF)
    with JudgmentCache.open(tmp_path / "c") as cache:
        [judgment] = collect_outcomes(HalfEmojiJudge(outcome), [ask("b")], cache).outcomes
        assert cache.get(request_key(EchoJudge(), ask("b"))) == judgment
    assert (judgment.first_token_logprobs, judgment.finish_reason) == ({"m": -0.5}, "fine ?")


def test_half_an_emoji_in_a_file_of_judgments_is_asked_for_again(tmp_path):
    path = tmp_path / "c"
    with JudgmentCache.open(path) as cache:
        collect_outcomes(EchoJudge(), [ask("a"), ask("b")], cache)
    path.write_text(path.read_text().replace('"B"', '"\\ud83d"'))
    judge = EchoJudge()
    with JudgmentCache.open(path) as cache:
        collected = collect_outcomes(judge, [ask("a"), ask("b")], cache)
    assert (judge.received, [outcome.text for outcome in collected.outcomes]) == (["b"], ["A", "B"])
    assert len(collected.sent) == 1
