"""Rollouts on disk: what a file holds, which prompts are kept, how large the files may become, and pages of them."""

import numpy as np
import pytest
import torch
from pyarrow import parquet

from pipeline.columns import Rollouts, TokenEvaluations
from pipeline.errors import DataError
from pipeline.learning.response_evaluations import response_evaluations
from pipeline.ragged import Ragged
from pipeline.records import ExperienceSummary, Prompt, RewardScore, Rollout, ScoredRollouts, TokenEvaluation
from pipeline.repetition import NUMBERED, repeated_shares
from pipeline.rollouts.kept_rollouts import RolloutBatch, RolloutFiles
from pipeline.rollouts.rollout_queries import MAX_PAGE, RolloutFilter, RolloutQueries

SCRIPT = "<script>document.title = 'owned'</script>"


def rollout(prompt, sample, text, *, logprobs=(-1.0, -1.0), finish_reason="stop"):
    messages = ({"role": "user", "content": f"question {prompt}"},)
    return Rollout(
        prompt=Prompt(id=prompt, messages=messages, token_ids=(1, 2)),
        sample_index=sample,
        response_ids=tuple(range(len(logprobs))),
        response_text=text,
        logprobs=logprobs,
        policy_version=3,
        finish_reason=finish_reason,
    )


def batch(step=0, rollouts=None, rewards=None, *, rows=None):
    """The learner's log-probabilities are .1, .2, ... below the engine's, and the reference's 1 below the learner's."""
    rollouts = rollouts or [rollout("a", 0, "yes"), rollout("b", 0, f"no {SCRIPT}", finish_reason="length")]
    rewards = rewards or [float(i) for i in range(len(rollouts))]
    rows = tuple(range(len(rollouts))) if rows is None else rows
    evaluations = [
        TokenEvaluation(
            logprobs=tuple(p - 0.1 * (t + 1) for t, p in enumerate(r.logprobs)),
            reference_logprobs=tuple(p - 0.1 * (t + 1) - 1.0 for t, p in enumerate(r.logprobs)),
            values=(0.0,) * len(r.logprobs),
        )
        for r in rollouts
    ]
    lengths = [len(rollouts[row].logprobs) for row in rows]
    experience = ExperienceSummary(
        metrics={},
        rows=tuple(rows),
        mean_advantages=torch.tensor(
            [10.0 * row + (length - 1) / 2 for row, length in zip(rows, lengths, strict=True)]
        ),
    )
    columns = Rollouts.of(rollouts)
    scores = tuple(
        RewardScore(mean=reward, std=0.5, objective_weights=(0.25, 0.75), objective_scores=(4.0, 2.0))
        for reward in rewards
    )
    return RolloutBatch(
        step=step,
        seeds=range(100, 100 + len(rollouts)),
        rollouts=columns,
        scored=ScoredRollouts(scores=scores, by_source={"model": scores}, metrics={}),
        evaluations=response_evaluations(columns, TokenEvaluations.of(evaluations)),
        experience=experience,
    )


def files_in(path, **changes):
    settings = {"keep": "all", "token_ids": False, "max_mib": 10.0, "objectives": ("help", "safety"), "seed": 0}
    return RolloutFiles(str(path), **(settings | changes))


def test_a_file_holds_a_step_with_all_that_was_said_of_its_rollouts(tmp_path):
    assert files_in(tmp_path).keep(batch(7, rows=(1,)))["rollout/kept"] == 2.0
    first, second = parquet.read_table(tmp_path / "rollouts" / "step-000007.parquet").to_pylist()
    assert second == {
        "step": 7,
        "position": 1,
        "prompt_id": "b",
        "sample": 0,
        "prompt": "question b",
        "messages": [{"role": "user", "content": "question b"}],
        "response": f"no {SCRIPT}",
        "reward": 1.0,
        "reward_std": 0.5,
        "rewards": [("model", 1.0)],
        "contributions": [("help", 1.0), ("safety", 1.5)],
        "advantage": 10.5,
        "kl": pytest.approx(2.0),
        "logprob_gap": pytest.approx(0.2),
        "tokens": 2,
        "repetition": 0.0,
        "finish_reason": "length",
        "policy_version": 3,
        "seed": 101,
    }
    assert first["advantage"] is None  # the recipe left this response out of the update


def test_token_ids_are_kept_where_they_are_asked_for(tmp_path):
    files_in(tmp_path, token_ids=True).keep(batch())
    rows = parquet.read_table(tmp_path / "rollouts" / "step-000000.parquet").to_pylist()
    assert (rows[0]["prompt_ids"], rows[0]["response_ids"]) == ([1, 2], [0, 1])


def test_a_share_keeps_whole_groups_of_the_same_prompts_at_every_step(tmp_path):
    names = [f"prompt {i}" for i in range(200)]
    rollouts = [rollout(name, sample, "text") for name in names for sample in range(2)]
    files = files_in(tmp_path, keep=0.25)
    metrics = [files.keep(batch(step, rollouts)) for step in (0, 1)]
    kept = [parquet.read_table(tmp_path / "rollouts" / f"step-00000{step}.parquet")["prompt_id"] for step in (0, 1)]
    assert kept[0] == kept[1]
    counts = kept[0].value_counts().to_pylist()
    assert {each["counts"] for each in counts} == {2}
    assert 30 <= len(counts) <= 70  # of 200, with a standard deviation of 6
    assert metrics[0]["rollout/kept"] == 2 * len(counts)
    assert metrics[0]["rollout/left_out"] == 400 - 2 * len(counts)
    other = files_in(tmp_path / "other", keep=0.25, seed=1)
    other.keep(batch(0, rollouts))
    assert parquet.read_table(tmp_path / "other" / "rollouts" / "step-000000.parquet")["prompt_id"] != kept[0]


def test_what_exceeds_the_size_is_left_out_and_counted(tmp_path):
    noise = "".join(map(chr, np.random.default_rng(0).integers(33, 3000, 30_000)))
    large = [rollout("a", 0, noise)]
    files = files_in(tmp_path, max_mib=0.15)
    counts = [files.keep(batch(step, large)) for step in range(4)]
    size = sum(path.stat().st_size for path in (tmp_path / "rollouts").iterdir())
    assert size <= 0.15 * 2**20
    assert [each["rollout/kept"] for each in counts] == [1.0, 1.0, 0.0, 0.0]
    assert [each["rollout/left_out"] for each in counts] == [0.0, 0.0, 1.0, 1.0]
    assert counts[-1]["rollout/kept_mib"] == pytest.approx(size / 2**20)
    assert files.is_full


def test_a_step_that_is_repeated_replaces_its_file_and_later_ones_are_forgotten(tmp_path):
    files = files_in(tmp_path)
    for step in range(4):
        files.keep(batch(step))
    again = files_in(tmp_path)
    again.resume(2)
    assert RolloutQueries(str(tmp_path / "rollouts")).summary()["steps"] == [0, 1]
    total = again.keep(batch(2, [rollout("c", 0, "anew")]))["rollout/kept_mib"]
    queries = RolloutQueries(str(tmp_path / "rollouts"))
    assert [(row["step"], row["prompt_id"]) for row in queries.all_rows()] == [
        (0, "a"),
        (0, "b"),
        (1, "a"),
        (1, "b"),
        (2, "c"),
    ]
    assert total == pytest.approx(queries.summary()["mib"])


def test_repetition_counts_n_grams_that_came_before():
    responses = [[1, 2, 3, 4], [7] * 8, [], [1, 2, 3, 4, 5, 1, 2, 3, 4], [1, 2, 1]]
    shares = repeated_shares(Ragged.of(responses, np.int32)).tolist()
    assert shares == pytest.approx([0.0, 4 / 5, 0.0, 1 / 6, 0.0])


def test_repetition_of_responses_that_are_longer_than_there_are_numbers_of_16_bits():
    """Tokens count from 0 to the end, and once more to the half: 4-grams of the second half have all occurred."""
    for length in (NUMBERED - 2, NUMBERED, NUMBERED + 2):
        tokens = [*range(2 * length // 3), *range(length // 3)]
        [share] = repeated_shares(Ragged.of([tokens], np.int32)).tolist()
        assert share == pytest.approx((length // 3 - 3) / (len(tokens) - 3))


# ----------------------------------------------------------------------------- pages


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """Three steps of 150 rollouts; rewards fall from 449 to 0."""
    path = tmp_path_factory.mktemp("kept")
    files = files_in(path)
    for step in range(3):
        rollouts = [
            rollout(f"p{i}", 0, f"Answer {i} of step {step}", logprobs=(-1.0,) * (1 + i % 7)) for i in range(150)
        ]
        files.keep(batch(step, rollouts, [float(449 - 150 * step - i) for i in range(150)], rows=tuple(range(149))))
    return RolloutQueries(str(path / "rollouts"))


def page(queries, sort="step", *, descending=False, offset=0, limit=3, **asked):
    total, rows = queries.page(RolloutFilter(**asked), sort=sort, descending=descending, offset=offset, limit=limit)
    return total, [(row["step"], row["position"]) for row in rows]


def test_pages_are_sorted_over_all_files(queries):
    assert page(queries) == (450, [(0, 0), (0, 1), (0, 2)])
    assert page(queries, offset=149) == (450, [(0, 149), (1, 0), (1, 1)])
    assert page(queries, "reward", descending=True) == (450, [(0, 0), (0, 1), (0, 2)])
    assert page(queries, "reward", limit=2) == (450, [(2, 149), (2, 148)])
    # The longest first; equals in the order of training.
    assert page(queries, "tokens", descending=True) == (450, [(0, 6), (0, 13), (0, 20)])
    assert page(queries, offset=450) == (450, [])


@pytest.mark.parametrize("descending", [False, True])
def test_a_rollout_without_an_advantage_comes_last(descending, queries):
    _, places = page(queries, "advantage", descending=descending, offset=447)
    assert places == [(0, 149), (1, 149), (2, 149)]


def test_filters_narrow_each_other(queries):
    assert page(queries, text="ANSWER 14 of") == (3, [(0, 14), (1, 14), (2, 14)])
    assert page(queries, text="question p14", step_from=1, step_to=1, limit=2) == (11, [(1, 14), (1, 140)])
    assert page(queries, prompt_id="p9") == (3, [(0, 9), (1, 9), (2, 9)])
    assert page(queries, reward_from=148.0, reward_to=150.0) == (3, [(1, 149), (2, 0), (2, 1)])
    assert page(queries, finish_reason="length") == (0, [])
    assert page(queries, text="(no pattern[") == (0, [])


def test_a_page_is_bounded_and_its_texts_are_cut(queries, tmp_path):
    _, rows = queries.page(RolloutFilter(), sort="step", descending=False, offset=0, limit=10_000)
    assert len(rows) == MAX_PAGE
    files_in(tmp_path).keep(batch(0, [rollout("a", 0, "x" * 1000)]))
    long = RolloutQueries(str(tmp_path / "rollouts"))
    _, [row] = long.page(RolloutFilter(), sort="step", descending=False, offset=0, limit=1)
    assert row["response"] == "x" * 280 + " …"
    assert "messages" not in row
    assert long.rollout(0, 0)["response"] == "x" * 1000
    assert long.rollout(0, 0)["messages"] == [{"role": "user", "content": "question a"}]


def test_a_rollout_that_was_not_kept_is_said(queries, tmp_path):
    for place in ((0, 150), (9, 0)):
        with pytest.raises(DataError, match=rf"rollout {place[1]} of step {place[0]} was not kept"):
            queries.rollout(*place)
    assert page(RolloutQueries(str(tmp_path / "nowhere"))) == (0, [])


def test_files_of_a_running_training_are_seen_as_they_come(tmp_path):
    files, running = files_in(tmp_path), RolloutQueries(str(tmp_path / "rollouts"))
    files.keep(batch(0))
    assert page(running)[0] == 2
    files.keep(batch(1))
    assert page(running)[0] == 4
    (tmp_path / "rollouts" / "step-000002.parquet.partial").write_bytes(b"half")
    assert page(running)[0] == 4
    assert running.summary() == {
        "rollouts": 4,
        "steps": [0, 1],
        "mib": pytest.approx(2 * (tmp_path / "rollouts" / "step-000000.parquet").stat().st_size / 2**20, rel=0.01),
        "sources": ["model"],
        "objectives": ["help", "safety"],
    }


def test_pyarrow_maps_are_plain_objects(queries):
    assert queries.rollout(0, 0)["contributions"] == {"help": 1.0, "safety": 1.5}
