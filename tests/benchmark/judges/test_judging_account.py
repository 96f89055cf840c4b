"""Tokens and cost count every judgment once."""

import json

import pytest

from pipeline.benchmark.judges.collect_outcomes import collect_outcomes
from pipeline.benchmark.judges.judging_account import judging_account, read_price
from pipeline.benchmark.judges.judgment_cache import JudgmentCache
from pipeline.errors import DataError
from tests.benchmark.judges.echo_judge import EchoJudge, ask, judgment_of


def test_tokens_and_cost_count_every_judgment_once_and_tell_the_new_ones(tmp_path):
    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"e-1": {"prompt": 2.5, "completion": 10}}))
    price = read_price(prices, "e-1")
    with JudgmentCache.open(tmp_path / "c") as cache:
        collect_outcomes(EchoJudge(), [ask("a")], cache)
        collected = collect_outcomes(EchoJudge(refuses={"d", "e"}), [ask(t) for t in "abcbde"], cache)
    costs = judging_account(EchoJudge(), collected, unparsed=1, price=price)
    assert (costs.requests, costs.sent, costs.unparsed) == (5, 4, 1)
    assert costs.unanswered == {"busy": 2}
    assert (costs.prompt_tokens, costs.completion_tokens, costs.uncounted) == (300, 21, 0)
    # 100 x 2.5 + 7 x 10 = 320 millionths a judgment.
    assert costs.cost == pytest.approx(3 * 320e-6)
    assert costs.cost_of_this_run == pytest.approx(2 * 320e-6)
    assert ("unanswered", "2") in costs.lines()


def test_judgments_without_token_counts_are_counted_as_such():
    class Mute(EchoJudge):
        def judge(self, requests, record):
            for i, _ in enumerate(requests):
                record(i, judgment_of("x", tokens=(None, None)))

    costs = judging_account(Mute(), collect_outcomes(Mute(), [ask("a"), ask("b")], None), unparsed=0, price=None)
    assert (costs.prompt_tokens, costs.uncounted, costs.cost) == (0, 2, None)
    assert ("judgments without token counts", "2") in costs.lines()


@pytest.mark.parametrize("text", ["{}", '{"e-1": {"prompt": 1}}', "[", '{"e-1": {"prompt": "dear", "completion": 1}}'])
def test_a_price_list_without_the_judge_is_refused(tmp_path, text):
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(DataError, match="no price for 'e-1'"):
        read_price(tmp_path / "prices.json", "e-1")
