"""Answer files round-trip through FastChat's layout."""

import json

import pytest

from pipeline.benchmark.mt_bench.answers import (
    MTBenchAnswer,
    read_mt_bench_answers,
    write_mt_bench_answers,
)
from pipeline.benchmark.mt_bench.grades import (
    category_of,
)
from tests.support.paths import SHARED_DATA

SHARED = SHARED_DATA / "mt_bench"

needs_public_data = pytest.mark.skipif(not SHARED.exists(), reason="needs the public data folder beside the checkout")


def test_answers_round_trip_through_fastchats_file(tmp_path):
    path = tmp_path / "model_answer" / "m.jsonl"
    answers = [MTBenchAnswer(question_id=81, model="m", turns=("Alöha", "again"))]
    write_mt_bench_answers(path, answers)
    assert read_mt_bench_answers([str(path)]) == answers
    row = json.loads(path.read_text())
    assert row["choices"] == [{"index": 0, "turns": ["Alöha", "again"]}]


@needs_public_data
def test_the_reference_answers_are_read():
    references = read_mt_bench_answers([str(SHARED / "reference_answer_gpt-4.jsonl")])
    assert len(references) == 30
    assert {category_of(r.question_id) for r in references} == {"math", "reasoning", "coding"}
    assert all(len(r.turns) == 2 for r in references)
