"""docs/metrics.md explains every metric of the code, and no other. `test_one_definition` holds it against real rows."""

import ast
import re
from collections.abc import Iterator

from pipeline.evaluation.alarms import DIFFICULTY_ALARMS, DIRECT_ALARMS, POLICY_ALARMS, REWARD_ALARMS
from pipeline.stages.metrics_log import EVALUATION_NUMBERS, TRAINING_NUMBERS
from tests.support.metrics_page import PLACEHOLDER, documented_keys, undocumented
from tests.support.paths import ROOT

SOURCES = [path for room in ("pipeline", "actors", "jobs") for path in sorted((ROOT / room).rglob("*.py"))]
KEY = re.compile("[a-z_0-9]+(/[a-z_0-9{}]+)+")
NO_METRICS = {
    "1/2",  # of the PAC-Bayes bound's text
    "application/json",
    "text/html",
    "cells/{}",  # a directory of an experiment
}


def written_keys() -> Iterator[str]:
    """The literals of the code that look like a metric; "{}" is what an f-string fills in."""
    for path in SOURCES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        f_strings = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for f_string in f_strings for part in f_string.values}
        plain = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in parts]
        filled = ["".join(p.value if isinstance(p, ast.Constant) else "{}" for p in f.values) for f in f_strings]
        yield from (text for text in [*plain, *filled] if isinstance(text, str) and KEY.fullmatch(text))


def test_every_metric_of_the_code_stands_on_the_page():
    keys = {*written_keys()} - NO_METRICS
    assert len(keys) > 150
    assert undocumented(keys) == []


def test_every_signal_of_an_alarm_and_every_number_of_the_console_stands_on_the_page():
    alarms = (*REWARD_ALARMS, *POLICY_ALARMS, *DIRECT_ALARMS, *DIFFICULTY_ALARMS)
    assert undocumented({signal for alarm in alarms for signal in alarm.signals}) == []
    assert undocumented({*TRAINING_NUMBERS, *EVALUATION_NUMBERS}) == []


def test_the_page_explains_no_metric_that_the_code_does_not_write():
    """Each key of the page has its last part, or all of it, somewhere in the code."""
    code = "\n".join(path.read_text() for path in SOURCES)
    words = {*re.findall("[a-z_0-9]+", code)}
    stale = []
    for key in documented_keys():
        last = PLACEHOLDER.sub("", key.rpartition("/")[2]).strip("_")
        # `alarm/NAME` ends with a placeholder; its family is then what the code must have.
        found = last or key.partition("/")[0]
        name = re.sub("^calibrated_|^aurc_gain_|_low$|_high$|_p[0-9]{2}$|^accuracy_", "", found)
        if name not in words and found not in words:
            stale.append(key)
    assert stale == []


def test_an_unknown_key_and_an_unknown_pattern_are_found():
    assert undocumented({"eval/accuracy", "eval/accuracy_low", "eval/source/my set/nll"}) == []
    assert undocumented({"eval/unheard_of", "step"}) == ["eval/unheard_of"]
    assert undocumented({"eval/objective/{}"}) == []
    assert undocumented({"nowhere/{}"}) == ["nowhere/{}"]
