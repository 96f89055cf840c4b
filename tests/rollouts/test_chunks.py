"""Exact accounting of a batch in chunks; times are given, so every case is worked by hand."""

from math import inf

from pipeline.records import Prompt, SamplingParams
from pipeline.rollouts.chunks import ChunkLedger
from pipeline.rollouts.requests import rollout_requests

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_response_tokens=8, samples_per_prompt=1, seed=0)
REQUESTS = rollout_requests([Prompt(id=str(n), messages=(), token_ids=(n,)) for n in range(7)], SAMPLING)


def ids(chunk):
    return "".join(request.prompt.id for request in chunk.requests)


def answer(chunk, by="first"):
    return [f"{request.prompt.id} {by}" for request in chunk.requests]


def test_chunks_are_handed_out_in_order_where_nothing_is_known_of_their_length():
    ledger = ChunkLedger(REQUESTS, 3)
    assert [ids(ledger.issue(0.0)) for _ in range(3)] == ["012", "345", "6"]
    assert ledger.issue(0.0) is None


def test_the_chunk_with_the_longest_expected_response_goes_first():
    tokens = {"0": 5, "1": 5, "2": 5, "3": 1, "4": 9, "5": 1, "6": 7}
    ledger = ChunkLedger(REQUESTS, 3, lambda request: tokens[request.prompt.id])
    assert [ids(ledger.issue(0.0)) for _ in range(3)] == ["345", "6", "012"]


def test_answers_come_back_in_any_order_and_leave_in_that_of_the_requests():
    ledger = ChunkLedger(REQUESTS, 3)
    chunks = [ledger.issue(0.0) for _ in range(3)]
    for chunk in reversed(chunks):
        assert not ledger.is_complete
        ledger.accept(chunk, answer(chunk), 1.0)
    assert ledger.is_complete
    assert not ledger.is_out
    assert ledger.rollouts() == [f"{n} first" for n in range(7)]


def test_a_late_chunk_is_issued_again_once_and_its_first_answer_wins():
    ledger = ChunkLedger(REQUESTS, 3)
    quick, slow, last = (ledger.issue(0.0) for _ in range(3))
    assert ledger.next_late_at() == inf  # nothing to compare with yet
    ledger.accept(quick, answer(quick), 10.0)
    assert ledger.next_late_at() == 20.0  # twice the median, 10
    assert ledger.issue_again(19.9) is None
    assert ledger.issue_again(20.0) is slow  # out since 0, as is the last; the first of the two
    assert ledger.issue_again(20.0) is last
    assert ledger.issue_again(99.0) is None

    ledger.accept(slow, answer(slow, "second worker"), 21.0)
    assert not ledger.wants(slow)
    ledger.accept(last, answer(last), 23.0)
    assert ledger.rollouts()[3:] == ["3 second worker", "4 second worker", "5 second worker", "6 first"]


def test_a_lost_chunk_is_the_next_to_be_issued_unless_it_has_an_answer():
    ledger = ChunkLedger(REQUESTS, 3)
    first, second = ledger.issue(0.0), ledger.issue(0.0)
    ledger.put_back(first)
    assert ledger.issue(1.0) is first
    ledger.accept(second, answer(second), 2.0)
    ledger.put_back(second)
    assert ids(ledger.issue(2.0)) == "6"
    assert ledger.issue(2.0) is None


def test_an_answer_to_a_chunk_that_was_put_back_is_not_wanted():
    ledger = ChunkLedger(REQUESTS, 7)
    chunk = ledger.issue(0.0)
    ledger.put_back(chunk)
    assert not ledger.wants(chunk)
    ledger.accept(ledger.issue(1.0), answer(chunk, "new policy"), 2.0)
    assert ledger.rollouts()[0] == "0 new policy"


def test_workers_reserve_a_chunk_each_and_the_shortest_goes_behind_the_longest():
    tokens = {"0": 9, "1": 8, "2": 7, "3": 6, "4": 5, "5": 4, "6": 3}
    ledger = ChunkLedger(REQUESTS, 1, lambda request: tokens[request.prompt.id])
    longest, next_longest = ledger.issue(0.0), ledger.issue(0.0)
    ahead = ledger.reserve(0.0, [longest, next_longest], 2)
    assert {ids(chunk): ids(reserved) for chunk, reserved in ahead.items()} == {"0": "3", "1": "2"}
    assert ids(ledger.issue_reserved(1.0, ahead[longest])) == "3"
    assert [ids(ledger.issue(1.0)) for _ in range(3)] == ["4", "5", "6"]


def test_a_worker_reserves_its_next_chunk_while_there_is_one_for_every_worker():
    ledger = ChunkLedger(REQUESTS, 2)  # 01, 23, 45, 6
    first, other = ledger.issue(0.0), ledger.issue(0.0)
    ahead = ledger.reserve(0.0, [first], 2)[first]
    assert ids(ahead) == "45"
    assert ledger.reserve(0.0, [other], 2) == {}  # the last one is for who is done first
    ledger.accept(first, answer(first), 1.0)
    ledger.accept(other, answer(other), 1.0)
    assert not ledger.is_out  # a reserved chunk may have been begun, but nobody is asked for it
    assert ledger.issue_reserved(1.0, ahead) is ahead
    assert ledger.is_out
    assert ids(ledger.issue(1.0)) == "6"


def test_a_reserved_chunk_is_released_for_others_unless_one_was_asked_for_it_already():
    ledger = ChunkLedger(REQUESTS, 3)
    first = ledger.issue(0.0)
    ahead = ledger.reserve(0.0, [first], 1)[first]
    ledger.release(ahead)
    assert ledger.issue(1.0) is ahead
    ledger.release(ahead)
    assert ids(ledger.issue(1.0)) == "6"
    assert ledger.wants(first)
    assert ledger.wants(ahead)


def test_a_chunk_behind_a_late_one_goes_to_another_worker_too_and_stands_once():
    ledger = ChunkLedger(REQUESTS, 2)
    slow, quick = ledger.issue(0.0), ledger.issue(0.0)
    ahead = ledger.reserve(0.0, [slow], 2)[slow]
    ledger.accept(quick, answer(quick), 1.0)
    last = ledger.issue(1.0)
    ledger.accept(last, answer(last), 2.0)
    assert ledger.next_late_at() == 2.0  # twice the median, 1
    assert ledger.issue_again(1.9) is None
    assert ledger.issue_again(2.0) is slow
    assert ledger.issue_again(2.0) is ahead
    assert ledger.issue_again(2.0) is None
    ledger.accept(slow, answer(slow, "second"), 3.0)
    # Who had reserved it is asked, too; the first answer counts.
    assert ledger.issue_reserved(3.0, ahead) is ahead
    ledger.accept(ahead, answer(ahead, "second"), 4.0)
    assert not ledger.wants(ahead)
    assert ledger.is_complete
    assert ledger.issue_reserved(5.0, ahead) is None
    assert ledger.rollouts()[4:] == ["4 second", "5 second", "6 first"]


def test_a_chunk_that_had_to_wait_behind_another_is_not_late_for_it():
    ledger = ChunkLedger(REQUESTS, 2)
    first, other = ledger.issue(0.0), ledger.issue(0.0)
    ahead = ledger.reserve(0.0, [first], 2)[first]
    ledger.accept(first, answer(first), 10.0)
    ledger.accept(other, answer(other), 10.0)
    assert ledger.issue_reserved(10.0, ahead) is ahead
    last = ledger.issue(10.0)
    ledger.accept(last, answer(last), 20.0)
    assert ledger.issue_again(29.9) is None  # with its worker for 30, asked for since 20; the median took 10
    assert ledger.issue_again(30.0) is ahead


def test_a_chunk_whose_responses_two_policies_share_is_never_sampled_twice():
    ledger = ChunkLedger(REQUESTS, 2)  # 01, 23, 45, 6
    slow, quick = ledger.issue(0.0), ledger.issue(0.0)
    ahead = ledger.reserve(0.0, [slow], 2)[slow]
    ledger.accept(quick, answer(quick), 1.0)
    ledger.interrupt()
    assert ledger.next_late_at() == inf
    assert ledger.issue_again(99.0) is None
    last = ledger.issue(99.0)
    assert ids(last) == "6"
    assert ledger.next_late_at() == 101.0  # begun with the new weights, twice the median of 1 s
    ledger.accept(slow, answer(slow), 100.0)
    assert ledger.issue_reserved(100.0, ahead) is ahead
    assert ledger.issue_again(200.0) is last

    ledger.put_back(ahead)  # its worker died, and who begins anew may be late
    assert ledger.issue(200.0) is ahead
    assert ledger.issue_again(400.0) is ahead


def test_a_chunk_begun_by_two_workers_stays_with_the_one_that_was_asked_for_it_when_weights_come_between():
    ledger = ChunkLedger(REQUESTS, 3)  # 012, 345, 6
    slow = ledger.issue(0.0)
    ahead = ledger.reserve(0.0, [slow], 1)[slow]
    last = ledger.issue(0.0)
    ledger.accept(last, answer(last), 1.0)
    assert [ledger.issue_again(5.0), ledger.issue_again(5.0)] == [slow, ahead]
    ledger.interrupt()
    ledger.accept(slow, answer(slow), 6.0)
    assert ledger.issue_reserved(6.0, ahead) is None  # the other has it


def test_a_worker_may_reserve_several_chunks_of_which_each_follows_the_one_before():
    ledger = ChunkLedger(REQUESTS, 1)
    slow, quick = ledger.issue(0.0), ledger.issue(0.0)
    second = ledger.reserve(0.0, [slow], 2)[slow]
    third = ledger.reserve(0.0, [second], 2)[second]
    assert [ids(chunk) for chunk in (second, third)] == ["2", "3"]
    ledger.accept(quick, answer(quick), 1.0)
    # Where the first is late, so are those that wait behind it, one behind the other.
    assert [ledger.issue_again(2.0) for _ in range(4)] == [slow, second, third, None]
    ledger.accept(second, answer(second, "another"), 3.0)
    assert ledger.issue_reserved(3.0, second) is None
    assert ledger.issue_reserved(3.0, third) is third
