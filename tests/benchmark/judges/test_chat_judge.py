"""The chat-completions judge against a real HTTP server that misbehaves."""

import json
import math
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from pipeline.benchmark.alpaca_eval.judging import parse_identifier, shown_preference
from pipeline.benchmark.judges.chat_judge import FAILURES_IN_A_ROW, ChatJudge, ChatLimits
from pipeline.benchmark.judges.judge import JudgeRequest, JudgeSampling, Judgment, Unanswered
from pipeline.errors import ConfigError, WorkerError
from tests.support.judge_server import completion, judge_server, refusal

QUICK = ChatLimits(first_wait_s=0.01, deadline_s=20.0)
SAMPLING = JudgeSampling(temperature=0.0, max_tokens=16, top_logprobs=0)
LABELS = JudgeSampling(temperature=1.0, max_tokens=1, top_logprobs=5)


def ask(text, sampling=SAMPLING):
    return JudgeRequest(messages=({"role": "user", "content": text},), sampling=sampling, pair=None)


def outcomes_of(server, requests, *, api_key=None, limits=QUICK, model="a-judge"):
    outcomes = {}
    ChatJudge(server.url, model, api_key=api_key, limits=limits).judge(requests, outcomes.__setitem__)
    assert sorted(outcomes) == list(range(len(requests)))
    return [outcomes[i] for i in range(len(requests))]


def test_a_request_says_what_the_benchmark_asks_and_who_pays():
    with judge_server(lambda body, n: completion("M", logprobs={"M": -0.25, "m": -1.5, "Both": -9.0})) as server:
        [judgment] = outcomes_of(server, [ask("which ?", LABELS)], api_key="sk-of-this-test")
    [seen] = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.authorization == "Bearer sk-of-this-test"
    assert seen.body == {
        "model": "a-judge",
        "messages": [{"role": "user", "content": "which ?"}],
        "temperature": 1.0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 5,
    }
    assert (judgment.text, judgment.finish_reason) == ("M", "stop")
    assert judgment.first_token_logprobs == {"M": -0.25, "m": -1.5, "Both": -9.0}
    assert (judgment.prompt_tokens, judgment.completion_tokens) == (100, 7)


def test_without_a_key_none_is_sent_and_logprobs_are_asked_for_only_when_wanted():
    with judge_server(lambda body, n: completion("fine")) as server:
        [judgment] = outcomes_of(server, [ask("well ?")])
    assert server.seen[0].authorization is None
    assert "logprobs" not in server.seen[0].body
    assert judgment.first_token_logprobs == {}


def test_an_overloaded_endpoint_is_asked_again_when_it_wants_to_be():
    with judge_server(lambda body, n: refusal(429, headers={"retry-after": "1"}) if n == 0 else completion("ok")) as s:
        [judgment] = outcomes_of(s, [ask("a")])
    assert judgment.text == "ok"
    assert s.seen[1].time - s.seen[0].time >= 1.0


def test_a_pause_may_be_asked_for_as_a_date():
    # HTTP dates have whole seconds: 2 to 3 s from now.
    def answer(body, n):
        if n == 0:
            later = datetime.now(UTC) + timedelta(seconds=3)
            return refusal(503, headers={"retry-after": format_datetime(later, usegmt=True)})
        return completion("ok")

    limits = ChatLimits(first_wait_s=0.01, concurrency=1)
    with judge_server(answer) as server:
        outcomes = outcomes_of(server, [ask("a"), ask("b")], limits=limits)
    assert [outcome.text for outcome in outcomes] == ["ok", "ok"]
    assert server.seen[1].time - server.seen[0].time >= 1.9


def test_one_workers_pause_is_everybodys():
    # The first request is told to pause; the others, begun at once, must not slip in new ones meanwhile.
    def answer(body, n):
        if body["messages"][0]["content"] == "0" and n < 4:
            return refusal(429, headers={"retry-after": "2"})
        time.sleep(1.0)
        return completion("ok")

    with judge_server(answer) as server:
        outcomes_of(server, [ask(str(i)) for i in range(8)], limits=ChatLimits(concurrency=4, first_wait_s=0.01))
    arrivals = [seen.time - server.seen[0].time for seen in server.seen]
    assert sum(arrival < 1.9 for arrival in arrivals) <= 4
    assert len(arrivals) == 9


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(lambda: None, id="dropped connection"),
        pytest.param(lambda: (200, {}, b"<html>gateway</html>"), id="no JSON"),
        pytest.param(lambda: (200, {}, b'{"choices": []}'), id="no choice"),
        pytest.param(lambda: (200, {}, b'{"choices": [{"message": {"content": 7}}]}'), id="content that is no text"),
        pytest.param(lambda: (200, {"content-length": "50"}, b'{"choices": [{"mess'), id="cut in the middle"),
        pytest.param(lambda: refusal(500), id="server error"),
    ],
)
def test_an_answer_that_cannot_be_used_is_asked_for_again(bad):
    limits = ChatLimits(first_wait_s=0.01, deadline_s=20.0)

    def answer(body, n):
        return bad() if n < 2 else completion("ok")

    with judge_server(answer) as server:
        [judgment] = outcomes_of(server, [ask("a")], limits=limits)
    assert judgment.text == "ok"
    assert len(server.seen) == 3


def test_a_request_is_given_up_after_its_attempts_and_says_why():
    with judge_server(lambda body, n: refusal(502)) as server:
        limits = ChatLimits(attempts=3, first_wait_s=0.01)
        assert outcomes_of(server, [ask("a")], limits=limits) == [Unanswered(reason="HTTP 502")]
    assert len(server.seen) == 3


def test_a_silent_endpoint_costs_no_more_than_the_deadline():
    with judge_server(lambda body, n: time.sleep(6) or completion("late")) as server:
        begun = time.monotonic()
        [outcome] = outcomes_of(server, [ask("a")], limits=ChatLimits(deadline_s=0.3))
        assert time.monotonic() - begun < 4.0
    assert outcome.reason.startswith("deadline of 0.3 s")


def test_a_pause_longer_than_the_deadline_is_not_waited_for():
    with judge_server(lambda body, n: refusal(429, headers={"retry-after": "86400"})) as server:
        begun = time.monotonic()
        [outcome] = outcomes_of(server, [ask("a")])
        assert time.monotonic() - begun < 5.0
    assert outcome.reason == "deadline of 20 s; last: HTTP 429"


def test_a_request_the_endpoint_refuses_is_not_repeated_and_harms_no_other():
    def answer(body, n):
        return refusal(400, "context too long") if body["messages"][0]["content"] == "b" else completion("ok")

    with judge_server(answer) as server:
        a, b, c = outcomes_of(server, [ask("a"), ask("b"), ask("c")])
    assert isinstance(a, Judgment)
    assert isinstance(c, Judgment)
    assert b.reason.startswith("HTTP 400")
    assert "context too long" in b.reason
    assert len(server.seen) == 3


def test_a_judge_that_says_nothing_has_answered():
    with judge_server(lambda body, n: completion(None, finish_reason="content_filter")) as server:
        [judgment] = outcomes_of(server, [ask("a")])
    assert (judgment.text, judgment.finish_reason) == ("", "content_filter")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_and_is_not_repeated_in_the_letter(status):
    with (
        judge_server(lambda body, n: refusal(status, "Incorrect API key provided: sk-secret")) as server,
        pytest.raises(ConfigError, match="the key was refused") as caught,
    ):
        outcomes_of(server, [ask(str(i)) for i in range(20)], api_key="sk-secret", limits=ChatLimits(concurrency=1))
    assert len(server.seen) == 1
    assert "sk-secret" not in str(caught.value)
    assert "***" in str(caught.value)


def test_an_unknown_model_ends_the_run_by_its_name():
    with (
        judge_server(lambda body, n: refusal(404, "no such model")) as server,
        pytest.raises(ConfigError, match="model 'a-judge'"),
    ):
        outcomes_of(server, [ask("a"), ask("b")])


def test_an_empty_account_ends_the_run():
    def answer(body, n):
        return 429, {}, json.dumps({"error": {"code": "insufficient_quota"}}).encode()

    with judge_server(answer) as server, pytest.raises(WorkerError, match="no credit"):
        outcomes_of(server, [ask("a"), ask("b")])


def test_an_endpoint_that_is_down_is_left_alone():
    with judge_server(lambda body, n: refusal(503)) as server:
        limits = ChatLimits(attempts=1, concurrency=1)
        outcomes = outcomes_of(server, [ask(str(i)) for i in range(FAILURES_IN_A_ROW + 30)], limits=limits)
    assert len(server.seen) == FAILURES_IN_A_ROW
    assert [outcome.reason for outcome in outcomes[:FAILURES_IN_A_ROW]] == ["HTTP 503"] * FAILURES_IN_A_ROW
    assert {outcome.reason for outcome in outcomes[FAILURES_IN_A_ROW:]} == {
        "not asked: 10 requests in a row had failed"
    }


def test_no_more_requests_are_open_than_allowed():
    with judge_server(lambda body, n: time.sleep(0.2) or completion("ok")) as server:
        outcomes_of(server, [ask(str(i)) for i in range(9)], limits=ChatLimits(concurrency=3))
    assert 1 < server.at_once <= 3


def test_requests_start_no_faster_than_the_rate():
    # 600 a minute: 0.1 s apart, so the sixth no earlier than 0.5 s after the beginning. A busy machine only delays it.
    with judge_server(lambda body, n: completion("ok")) as server:
        begun = time.monotonic()
        outcomes_of(server, [ask(str(i)) for i in range(6)], limits=ChatLimits(requests_per_minute=600.0))
    assert max(seen.time for seen in server.seen) - begun >= 0.5


@pytest.mark.parametrize(
    "url",
    [
        "api.openai.com/v1",
        "ftp://host/v1",
        "https://",
        "https://host:port/v1",
        "https://me:secret@host/v1",
        "https://host/v1?key=secret",
    ],
)
def test_a_url_that_is_none_or_carries_a_secret_is_refused(url):
    with pytest.raises(ConfigError) as caught:
        ChatJudge(url, "m", api_key=None, limits=QUICK)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"concurrency": 0}, {"attempts": 0}, {"deadline_s": 0.0}, {"requests_per_minute": 0}]
)
def test_limits_that_allow_nothing_are_refused(change):
    with pytest.raises(ConfigError):
        ChatLimits(**change)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-sécret secret"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_unseen(key):
    with pytest.raises(ConfigError, match="API key") as caught:
        ChatJudge("http://host/v1", "m", api_key=key, limits=QUICK)
    assert "secret" not in str(caught.value)


def test_a_redirect_is_not_followed_with_the_key():
    with (
        judge_server(lambda body, n: refusal(307, headers={"location": "http://127.0.0.1:9/elsewhere"})) as server,
        pytest.raises(ConfigError, match="HTTP 307"),
    ):
        outcomes_of(server, [ask("a")], api_key="sk-secret")
    assert len(server.seen) == 1


def test_the_probabilities_of_tokens_that_read_the_same_are_added():
    tops = [{"token": "m", "logprob": -0.1}, {"token": "M", "logprob": -3.0}, {"token": "m", "logprob": -9.0}]
    choice = {"message": {"content": "m"}, "logprobs": {"content": [{"token": "m", "top_logprobs": tops}]}}
    with judge_server(lambda body, n: (200, {}, json.dumps({"choices": [choice]}).encode())) as server:
        [judgment] = outcomes_of(server, [ask("which ?", LABELS)])
    # p(m) = e^-0.1 + e^-9 = 0.904837 + 0.000123 = 0.904961, p(M) = e^-3 = 0.049787, p(m) / (p(m) + p(M)) = 0.947853.
    # The last entry alone would be p(m) = 0.000123, and 0.002473 for the share: the other verdict.
    assert judgment.first_token_logprobs == pytest.approx({"m": math.log(0.904961), "M": -3.0}, abs=1e-6)
    shown = shown_preference(judgment, parse_identifier)
    assert shown == pytest.approx(2 - 0.947853, abs=1e-6)
    assert 3 - shown == pytest.approx(1.948, abs=5e-4)  # the model's answer was shown first


@pytest.mark.parametrize("value", [float("nan"), 3.0])
def test_an_answer_without_real_log_probabilities_is_asked_for_again(value):
    def answer(body, n):
        return completion("m", logprobs={"m": value if n == 0 else -0.5})

    with judge_server(answer) as server:
        [judgment] = outcomes_of(server, [ask("which ?", LABELS)])
    assert (judgment.first_token_logprobs, len(server.seen)) == ({"m": -0.5}, 2)


def ok_with(**body):
    return 200, {}, json.dumps(body).encode()


def error_of_a_choice(error):
    return ok_with(choices=[{"message": {"role": "assistant", "content": ""}, "error": error}])


@pytest.mark.parametrize("answer", [lambda error: ok_with(error=error), error_of_a_choice])
@pytest.mark.parametrize(
    ("error", "reason", "times"),
    [
        ({"code": 502, "message": "upstream is\n overloaded"}, "HTTP 200 with an error: upstream is overloaded", 3),
        ({"message": "try later"}, "HTTP 200 with an error: try later", 3),
        ("plain words", "HTTP 200 with an error: plain words", 3),
        ({"code": 400, "message": "context too long"}, 'HTTP 400: {"code": 400, "message": "context too long"}', 1),
    ],
)
def test_an_error_inside_an_http_200_keeps_the_providers_words(answer, error, reason, times):
    with judge_server(lambda body, n: answer(error)) as server:
        limits = ChatLimits(attempts=3, first_wait_s=0.01)
        assert outcomes_of(server, [ask("a")], limits=limits) == [Unanswered(reason=reason)]
    assert len(server.seen) == times


def test_an_error_inside_an_http_200_ends_the_run_as_its_code_does():
    with (
        judge_server(lambda body, n: ok_with(error={"code": 401, "message": "bad key sk-secret"})) as server,
        pytest.raises(ConfigError, match=r"the key was refused .*bad key \*\*\*"),
    ):
        outcomes_of(server, [ask("a")], api_key="sk-secret")
    assert len(server.seen) == 1
    with (
        judge_server(lambda body, n: ok_with(error={"code": "insufficient_quota"})) as server,
        pytest.raises(WorkerError, match="no credit"),
    ):
        outcomes_of(server, [ask("a")])


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "[[A"}, {"type": "text", "text": ">B]]"}]}, "[[A>B]]"),
        ({"content": [{"type": "thinking", "thinking": "[[B>A]] ?"}, {"type": "text", "text": "[[A>B]]"}]}, "[[A>B]]"),
        ({"content": [{"type": "refusal", "refusal": "I will not."}]}, "I will not."),
        ({"content": None, "refusal": "I will not."}, "I will not."),
    ],
)
def test_the_words_of_an_answer_are_read_from_its_parts(message, text):
    with judge_server(lambda body, n: ok_with(choices=[{"message": message}])) as server:
        [judgment] = outcomes_of(server, [ask("a")])
    assert (judgment.text, len(server.seen)) == (text, 1)


def test_parts_without_words_are_asked_for_again():
    def answer(body, n):
        return ok_with(choices=[{"message": {"content": [{"type": "image"}]}}]) if n == 0 else completion("ok")

    with judge_server(answer) as server:
        [judgment] = outcomes_of(server, [ask("a")])
    assert (judgment.text, len(server.seen)) == ("ok", 2)
