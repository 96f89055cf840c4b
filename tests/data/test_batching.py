from pipeline.data.batching import plan_micro_batches, stable_seed, step_indices


def test_every_row_is_used_once_per_epoch():
    rows = [i for step in range(5) for i in step_indices(10, 4, step, seed=0)]
    assert sorted(rows[:10]) == list(range(10))
    assert sorted(rows[10:]) == list(range(10))


def test_a_step_does_not_depend_on_the_steps_before():
    assert step_indices(100, 8, 7, seed=1) == step_indices(100, 8, 7, seed=1)
    assert step_indices(100, 8, 7, seed=1) != step_indices(100, 8, 7, seed=2)


def test_micro_batches_respect_the_budget_and_lose_no_row():
    lengths = [3, 9, 4, 4, 8, 2, 1]
    for world_size in (1, 2, 4):
        plan = plan_micro_batches(lengths, world_size=world_size, max_tokens=10)
        assert sorted(row for rank in plan for rows in rank for row in rows) == list(range(7))
        assert len({len(rank) for rank in plan}) == 1
        for rank in plan:
            for rows in rank:
                assert sum(lengths[r] for r in rows) <= 10


def test_a_row_longer_than_the_budget_stands_alone():
    assert plan_micro_batches([50, 1], world_size=1, max_tokens=10) == [[[0], [1]]]


def test_ranks_without_rows_get_empty_micro_batches():
    assert plan_micro_batches([5], world_size=2, max_tokens=10) == [[[0]], [[]]]


def test_seeds_are_the_same_everywhere():
    # A literal: a seed that moved with the process or the machine would make every resume another run.
    assert stable_seed("sample", 1, "prompt", 0) == 1614575640315641196
    assert stable_seed("a", 1) != stable_seed("a", 2)
    assert 0 <= stable_seed("a") < 2**62
