"""A hang is a fault: whoever waits for another process says for how long."""

import ast

import pytest

from tests.architecture.test_imports import ROOT, SOURCES


def waits(program):
    """The calls that wait for a remote answer: line, name, and whether without end."""
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in {"ray.get", "ray.wait"}:
            timeouts = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "timeout"]
            yield node.lineno, name, timeouts in ([], ["None"])


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith(("actors/", "cluster/", "jobs/"))])
def test_nobody_waits_for_a_remote_answer_without_a_deadline(source):
    program = (ROOT / source).read_text()
    assert [f"{source}:{line} {name}" for line, name, is_endless in waits(program) if is_endless] == []


def test_the_test_above_sees_the_calls_it_is_about():
    seen = {name for source in SOURCES for _, name, _ in waits((ROOT / source).read_text())}
    assert seen == {"ray.get", "ray.wait"}


@pytest.mark.parametrize(
    ("call", "is_endless"),
    [("ray.get(x)", True), ("ray.wait(x, timeout=None)", True), ("ray.get(x, timeout=left)", False)],
)
def test_no_deadline_is_no_deadline_however_it_is_written(call, is_endless):
    assert list(waits(call)) == [(1, call.partition("(")[0], is_endless)]
