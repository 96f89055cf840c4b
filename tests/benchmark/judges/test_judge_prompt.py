"""Templates are filled in one pass."""

import pytest

from pipeline.benchmark.judges.judge_prompt import fill_template, require_fields
from pipeline.errors import DataError


def test_text_that_looks_like_a_placeholder_is_left_alone():
    assert fill_template("{a}|{b}|{c}|{{", {"a": "{b}", "b": "\\1 {a}"}) == "{b}|\\1 {a}|{c}|{{"


def test_a_template_without_a_needed_field_is_refused():
    require_fields("{a} {b}", ("a", "b"), place="here")
    with pytest.raises(DataError, match=r"here: the template has no \{b\}"):
        require_fields("{a} b", ("a", "b"), place="here")
