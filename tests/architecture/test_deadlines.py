"""A hang is a fault: whoever waits for another process says for how long."""

import ast

import pytest

from tests.architecture.test_imports import ROOT, SOURCES


def calls(source):
    for node in ast.walk(ast.parse((ROOT / source).read_text())):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func), {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith(("actors/", "cluster/", "jobs/"))])
def test_nobody_waits_for_a_remote_answer_without_a_deadline(source):
    endless = [
        f"{source}:{node.lineno} {name}"
        for node, name, keywords in calls(source)
        if name in {"ray.get", "ray.wait"} and "timeout" not in keywords
    ]
    assert endless == []


def test_the_test_above_sees_the_calls_it_is_about():
    seen = {name for source in SOURCES for _, name, _ in calls(source)}
    assert {"ray.get", "ray.wait"} <= seen
