"""docs/troubleshooting.md has every error class and every exit code."""

import ast
import inspect
import re

from jobs import exit_codes, judge_benchmark
from pipeline import errors
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
NOT_OURS = {137}
"""A kill by the system, which the page explains too."""


def first_column(heading: str) -> list[str]:
    """The first cells of the table below a heading, without the head."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def test_every_error_class_has_a_row_and_every_row_is_a_class():
    classes = [name for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert sorted(first_column("Errors by class")) == sorted(f"`{name}`" for name in classes)


def test_every_exit_code_has_a_row():
    ours = {0, 1, exit_codes.BAD_INPUT, exit_codes.PREEMPTED, judge_benchmark.UNANSWERED}
    assert {*map(int, first_column("Exit codes"))} == ours | NOT_OURS


def test_no_job_leaves_with_another_exit_code():
    """What a job passes to `exit` is a name, and one that the page knows."""
    known = {"BAD_INPUT", "PREEMPTED", "UNANSWERED"}
    for path in sorted((ROOT / "jobs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.fullmatch(r"sys\.exit|os\._exit", ast.unparse(node.func)):
                assert ast.unparse(node.args[0]) in known, path
