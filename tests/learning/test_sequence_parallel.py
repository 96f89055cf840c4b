"""Ranks that share every row: the gradients, metrics and evaluations of one process."""

import pytest

from pipeline.config.models import LoRAConfig
from pipeline.learning.builders import reference_in_process
from pipeline.learning.engine import TorchEngine
from tests.support.lockstep import run_ranks
from tests.support.one_step import first_moments, four_headed_policy, largest_gap, step_of, take

REFERENCE = reference_in_process("float32", "cpu")


@pytest.fixture(scope="module")
def policy(tokenizer, tmp_path_factory):
    return four_headed_policy(tokenizer, str(tmp_path_factory.mktemp("four heads")))


@pytest.mark.parametrize(
    ("name", "options", "ranks", "n"),
    [
        ("sft", {}, 2, 2),
        ("sft", {"max_tokens": 10_000}, 4, 2),
        ("reward", {"recompute": True}, 4, 2),
        ("reward", {"pooling": "mean"}, 2, 2),
        ("reward", {"lora": LoRAConfig(rank=4)}, 4, 4),
        ("ppo", {"recompute": True}, 4, 2),
        ("ppo", {"lora": LoRAConfig(rank=4)}, 4, 4),
        ("direct", {}, 2, 2),
    ],
)
def test_gradients_equal_those_of_one_process(name, options, ranks, n, policy, world, tokenizer, tmp_path):
    step = step_of(name, policy, world, tokenizer, str(tmp_path), **options)
    alone = step.learner(TorchEngine, REFERENCE)
    evaluated, metrics = take(step, alone, str(tmp_path / "alone"))
    expected = first_moments(str(tmp_path / "alone"), alone.engine.module)
    results = run_ranks(
        ranks,
        lambda make_engine: step.learner(make_engine, REFERENCE),
        lambda learner: take(step, learner, str(tmp_path / "ranks")),
        sequence_parallel=n,
    )
    assert largest_gap(first_moments(str(tmp_path / "ranks"), alone.engine.module), expected) < 1e-5
    for ours, measured in results:
        assert ours == pytest.approx(evaluated, rel=1e-4, abs=1e-5)
        assert measured == pytest.approx(metrics, rel=1e-4, abs=1e-5)
