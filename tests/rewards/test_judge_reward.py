"""A language model that grades or compares, behind an endpoint that speaks chat completions."""

import json
from contextlib import ExitStack

import pytest

from pipeline.config.rewards import JudgeReward
from pipeline.errors import ConfigError, DataError
from pipeline.rewards.judge_reward import JudgeRewardSource, circle
from pipeline.rewards.rows import RewardRows
from tests.rewards.rows import means, rollout, rows_of
from tests.support.judge_server import completion, judge_server, refusal


def open_judge(exits, url, **settings):
    return JudgeRewardSource.open(JudgeReward.model_validate({"url": url, "model": "m"} | settings), exits)


def by_words(body, n):
    """Grades the number of words of the response; prefers the longer one."""
    text = body["messages"][-1]["content"]
    if "[Response A]" in text:
        a = text.partition("[Response A]\n")[2].partition("\n\n[Response B]")[0]
        b = text.partition("[Response B]\n")[2].partition("\n\n[Your task]")[0]
        return completion("[[C]]" if len(a) == len(b) else "[[A]]" if len(a) > len(b) else "[[B]]")
    response = text.partition("response]\n")[2].partition("\n\n[Your task]")[0]
    return completion(f"I think [[1]], no: [[{len(response.split())}]]")


def test_each_response_has_the_last_grade_of_its_judgment_and_no_request_is_sent_twice(tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"m": {"prompt": 10.0, "completion": 100.0}}))
    cache = str(tmp_path / "cache.jsonl")
    rows = rows_of("a b", "a b c", "a")
    with judge_server(by_words) as server:
        for sent in (3, 0):  # the second run finds the judgments of the first
            with ExitStack() as exits:
                judge = open_judge(exits, server.url, cache=cache, prices=str(prices))
                assert means(judge.score(rows)) == [2.0, 3.0, 1.0]
                # 100 and 7 tokens a request
                expected = {"requests": 3.0, "sent": sent, "prompt_tokens": 300.0, "completion_tokens": 21.0}
                assert judge.account == pytest.approx(expected | {"cost": sent * (1000 + 700) / 1e6})
    assert len(server.seen) == 3


def test_each_response_is_compared_with_its_neighbours_in_the_group_once_shown_first_and_once_second():
    assert circle([4, 7, 9]) == [(4, 7), (7, 9), (9, 4)]
    rollouts = [rollout("p", i, text) for i, text in enumerate(["aaa", "a", "aa"])]
    rollouts += [rollout("q", 0, "b"), rollout("q", 1, "b"), rollout("r", 0, "lonely")]
    with judge_server(by_words) as server, ExitStack() as exits:
        judge = open_judge(exits, server.url, form="pairwise")
        scores = judge.score(RewardRows.of(rollouts, {}))
    assert means(scores) == [1.0, 0.0, 0.5, 0.5, 0.5, "unanswered"]


def test_what_the_judge_does_not_answer_or_write_readably_is_a_failure_of_the_row():
    def answer(body, n):
        text = body["messages"][-1]["content"]
        if "refuse" in text.partition("response]\n")[2]:
            return refusal(400, "no")
        return completion("[[99]]" if "much" in text.partition("response]\n")[2] else "[[5]]")

    with judge_server(answer) as server, ExitStack() as exits:
        scores = open_judge(exits, server.url).score(rows_of("refuse", "much", "fine"))
    assert means(scores) == ["unanswered", "unreadable", 5.0]


def test_a_template_may_name_columns(tmp_path):
    template = tmp_path / "template.txt"
    template.write_text("{prompt} | {response} | expected {answer}")
    with judge_server(lambda body, n: completion("[[3]]")) as server, ExitStack() as exits:
        open_judge(exits, server.url, template=str(template)).score(rows_of("yes", answer=["no {prompt}"]))
    assert server.questions == ["user: p0 ? | yes | expected no {prompt}"]


def test_bad_settings_are_refused_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    template = tmp_path / "template.txt"
    template.write_text("{prompt}")
    with ExitStack() as exits:
        with pytest.raises(ConfigError, match="NO_SUCH_KEY, and this environment variable is not set"):
            open_judge(exits, "http://x/v1", api_key_env="NO_SUCH_KEY")
        with pytest.raises(DataError, match=r"has no \{response\}"):
            open_judge(exits, "http://x/v1", template=str(template))
        with pytest.raises(ConfigError, match=r"nowhere\.txt cannot be read"):
            open_judge(exits, "http://x/v1", template="nowhere.txt")
