"""Judgment files of every benchmark."""

import pytest

from pipeline.benchmark.policy_comparison.judgment_files import read_judgments
from pipeline.errors import DataError
from tests.benchmark.policy_comparison.policies import lines


def test_a_file_of_no_benchmarks_judgments_is_named(tmp_path):
    with pytest.raises(DataError, match=r"j\.jsonl, line 1: not a judgment of AlpacaEval"):
        read_judgments([lines(tmp_path / "j.jsonl", {"verdict": "A"})])
