"""Requests are asked once, remembered, accounted for; a replay and a reward model judge through the same port."""

import json
import math

import pytest

from pipeline.benchmark.judges.judging import (
    Comparison,
    JudgeRequest,
    JudgeSampling,
    Judgment,
    Unanswered,
    collect,
    fill,
    request_key,
    require_fields,
)
from pipeline.benchmark.judges.judging_account import account, read_price
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from pipeline.benchmark.judges.replay import ReplayJudge
from pipeline.benchmark.judges.reward_model import RewardModelJudge
from pipeline.errors import ConfigError, DataError, WorkspaceLocked
from pipeline.records import RewardScore

SAMPLING = JudgeSampling(temperature=0.0, max_tokens=16, top_logprobs=0)


def ask(text, sampling=SAMPLING, comparison=None):
    return JudgeRequest(messages=({"role": "user", "content": text},), sampling=sampling, comparison=comparison)


def said(text, tokens=(100, 7)):
    return Judgment(
        text=text,
        first_token_logprobs={},
        finish_reason="stop",
        prompt_tokens=tokens[0],
        completion_tokens=tokens[1],
        time=1.5,
    )


class Echo:
    """Repeats the question in capitals; does not answer those it was told to leave."""

    def __init__(self, *, leaves=(), name="echo", model="e-1"):
        self.name, self.model, self.leaves = name, model, leaves
        self.heard = []

    def judge(self, requests, record):
        for i, request in reversed(list(enumerate(requests))):
            question = request.messages[-1]["content"]
            self.heard.append(question)
            record(i, Unanswered(reason="busy") if question in self.leaves else said(question.upper()))


def test_outcomes_come_in_the_order_of_the_requests_and_equal_requests_are_asked_once():
    judge = Echo()
    collected = collect(judge, [ask("a"), ask("b"), ask("a")], None)
    assert [outcome.text for outcome in collected.outcomes] == ["A", "B", "A"]
    assert sorted(judge.heard) == ["a", "b"]


def test_what_was_judged_is_not_asked_again_and_what_was_not_is(tmp_path):
    path = tmp_path / "judgments.cache"
    with JudgmentCache.open(path) as cache:
        collect(Echo(leaves={"b"}), [ask("a"), ask("b")], cache)
    judge = Echo()
    with JudgmentCache.open(path) as cache:
        collected = collect(judge, [ask("a"), ask("b"), ask("c")], cache)
    assert sorted(judge.heard) == ["b", "c"]
    assert [outcome.text for outcome in collected.outcomes] == ["A", "B", "C"]


def test_progress_counts_what_was_known_and_what_failed(tmp_path):
    with JudgmentCache.open(tmp_path / "c") as cache:
        collect(Echo(), [ask("a")], cache)
        steps = []
        collect(Echo(leaves={"b"}), [ask(t) for t in "abca"], cache, progress=lambda *step: steps.append(step))
    assert steps == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("judge", "request_"),
    [
        (Echo(name="another"), ask("a")),
        (Echo(model="e-2"), ask("a")),
        (Echo(), ask("a ")),
        (Echo(), ask("a", JudgeSampling(temperature=0.5, max_tokens=16, top_logprobs=0))),
        (Echo(), ask("a", JudgeSampling(temperature=0.0, max_tokens=17, top_logprobs=0))),
        (Echo(), ask("a", JudgeSampling(temperature=0.0, max_tokens=16, top_logprobs=5))),
    ],
)
def test_another_judge_question_or_setting_is_another_request(judge, request_):
    assert request_key(Echo(), ask("a")) == request_key(Echo(), ask("a"))
    assert request_key(judge, request_) != request_key(Echo(), ask("a"))


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
        cache.append("k", Echo(), ask("a"), judgment)
    with JudgmentCache.open(tmp_path / "c") as cache:
        assert cache.get("k") == judgment
        assert cache.get("l") is None


def test_a_line_that_a_kill_cut_short_is_dropped_and_the_next_one_starts_afresh(tmp_path):
    path = tmp_path / "c"
    with JudgmentCache.open(path) as cache:
        collect(Echo(), [ask("a"), ask("b")], cache)
    path.write_bytes(path.read_bytes()[:-10])
    judge = Echo()
    with JudgmentCache.open(path) as cache:
        collect(judge, [ask("a"), ask("b")], cache)
    assert len(judge.heard) == 1
    with JudgmentCache.open(path) as cache:
        collect(judge, [ask("a"), ask("b")], cache)
    assert len(judge.heard) == 1


def test_each_judgment_is_in_the_file_before_the_next_one_is_waited_for(tmp_path):
    path = tmp_path / "c"
    lines = []

    class Watching(Echo):
        def judge(self, requests, record):
            for i, _ in enumerate(requests):
                record(i, said(str(i)))
                lines.append(path.read_text().count("\n"))

    with JudgmentCache.open(path) as cache:
        collect(Watching(), [ask("a"), ask("b"), ask("c")], cache)
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


# ----------------------------------------------------------------------------- replay


def test_a_cache_can_be_replayed_by_its_messages(tmp_path):
    path = tmp_path / "c"
    with JudgmentCache.open(path) as cache:
        collect(Echo(), [ask("a"), ask("b")], cache)
    judge = ReplayJudge(path)
    assert judge.model == "e-1"
    collected = collect(judge, [ask("b"), ask("z")], None)
    assert collected.outcomes == (said("B"), Unanswered(reason="not in the replay file"))


def test_a_replay_file_may_say_as_little_as_who_what_and_the_answer(tmp_path):
    row = {"model": "gpt-4", "messages": [{"role": "user", "content": "a"}], "judgment": {"text": "[[7]]"}}
    (tmp_path / "c").write_text(json.dumps(row) + "\n")
    [judgment] = collect(ReplayJudge(tmp_path / "c"), [ask("a")], None).outcomes
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


# ----------------------------------------------------------------------------- the reward model as judge


def score(mean, std=0.0):
    return RewardScore(mean=mean, std=std, objective_weights=(), objective_scores=())


class LengthScorer:
    """Reward = characters of the response."""

    def __init__(self):
        self.prompts = []

    def score(self, prompts, responses):
        self.prompts += prompts
        return [score(float(len(response))) for response in responses]


def compare(a, b):
    return Comparison(
        prompt=({"role": "user", "content": "q"},),
        answer_a=a,
        answer_b=b,
        verdict_a="[[A>B]]",
        verdict_b="[[B>A]]",
        verdict_tie="[[A=B]]",
    )


def test_the_reward_model_speaks_the_words_of_the_benchmark():
    scorer = LengthScorer()
    requests = [ask(str(i), comparison=compare(*pair)) for i, pair in enumerate([("xx", "x"), ("x", "xx"), ("x", "y")])]
    first, second, tie = collect(RewardModelJudge(scorer, model="vrm-0"), requests, None).outcomes
    assert [first.text, second.text, tie.text] == ["[[A>B]]", "[[B>A]]", "[[A=B]]"]
    p = 1 / (1 + math.exp(-1.0))
    assert first.first_token_logprobs == pytest.approx({"[[A>B]]": math.log(p), "[[B>A]]": math.log(1 - p)})
    assert tie.first_token_logprobs == pytest.approx({"[[A>B]]": math.log(0.5), "[[B>A]]": math.log(0.5)})
    assert scorer.prompts == [({"role": "user", "content": "q"},)] * 6


def test_every_pair_gets_its_own_verdict_across_scoring_batches():
    pairs = [("x" * (i % 7), "x" * (i % 5)) for i in range(150)]
    requests = [ask(str(i), comparison=compare(*pair)) for i, pair in enumerate(pairs)]
    outcomes = collect(RewardModelJudge(LengthScorer(), model="vrm-0"), requests, None).outcomes
    signs = {"[[A>B]]": -1, "[[B>A]]": 1, "[[A=B]]": 0}
    assert [signs[o.text] for o in outcomes] == [(len(b) > len(a)) - (len(b) < len(a)) for a, b in pairs]


def test_a_certain_verdict_has_finite_logprobs():
    [judgment] = collect(
        RewardModelJudge(LengthScorer(), model="v"), [ask("a", comparison=compare("", "x" * 5000))], None
    ).outcomes
    assert all(math.isfinite(value) for value in judgment.first_token_logprobs.values())


def test_a_reward_model_gives_no_grades():
    with pytest.raises(ConfigError, match="grades"):
        collect(RewardModelJudge(LengthScorer(), model="v"), [ask("a", comparison=compare("x", "y")), ask("b")], None)


# ----------------------------------------------------------------------------- templates


def test_text_that_looks_like_a_placeholder_is_left_alone():
    assert fill("{a}|{b}|{c}|{{", {"a": "{b}", "b": "\\1 {a}"}) == "{b}|\\1 {a}|{c}|{{"


def test_a_template_without_a_needed_field_is_refused():
    require_fields("{a} {b}", ("a", "b"), place="here")
    with pytest.raises(DataError, match=r"here: the template has no \{b\}"):
        require_fields("{a} b", ("a", "b"), place="here")


# ----------------------------------------------------------------------------- the account


def test_tokens_and_cost_count_every_judgment_once_and_tell_the_new_ones(tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"e-1": {"prompt": 2.5, "completion": 10}}))
    price = read_price(prices, "e-1")
    with JudgmentCache.open(tmp_path / "c") as cache:
        collect(Echo(), [ask("a")], cache)
        collected = collect(Echo(leaves={"d", "e"}), [ask(t) for t in "abcbde"], cache)
    costs = account(Echo(), collected, unparsed=1, price=price)
    assert (costs.requests, costs.asked, costs.unparsed) == (5, 4, 1)
    assert costs.unanswered == {"busy": 2}
    assert (costs.prompt_tokens, costs.completion_tokens, costs.uncounted) == (300, 21, 0)
    # 100 x 2.5 + 7 x 10 = 320 millionths a judgment.
    assert costs.cost == pytest.approx(3 * 320e-6)
    assert costs.cost_of_this_run == pytest.approx(2 * 320e-6)
    assert ("unanswered", "2") in costs.lines()


def test_judgments_without_token_counts_are_counted_as_such():
    class Mute(Echo):
        def judge(self, requests, record):
            for i, _ in enumerate(requests):
                record(i, said("x", tokens=(None, None)))

    costs = account(Mute(), collect(Mute(), [ask("a"), ask("b")], None), unparsed=0, price=None)
    assert (costs.prompt_tokens, costs.uncounted, costs.cost) == (0, 2, None)
    assert ("judgments without token counts", "2") in costs.lines()


@pytest.mark.parametrize("text", ["{}", '{"e-1": {"prompt": 1}}', "[", '{"e-1": {"prompt": "dear", "completion": 1}}'])
def test_a_price_list_without_the_judge_is_refused(tmp_path, text):
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(DataError, match="no price for 'e-1'"):
        read_price(tmp_path / "prices.json", "e-1")
