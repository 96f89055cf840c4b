"""A user's function in Ray processes: it raises, hangs, dies and returns nonsense, and the step goes on."""

from contextlib import suppress

import psutil
import pytest

from actors.reward_functions import FunctionProcesses
from pipeline.config.cluster import RewardFunctionsConfig
from pipeline.config.rewards import PythonReward
from pipeline.errors import ConfigError
from pipeline.rewards.function_spec import python_spec
from tests.rewards.rows import means, rows_of

pytestmark = pytest.mark.components

UNRULY = """
import os, pathlib, re

def score(prompts, responses, columns):
    [response] = responses
    if response == "hang":
        pathlib.Path(__file__).with_name("pid").write_text(str(os.getpid()))
        re.match("(a+)+$", "a" * 64 + "b")  # takes years, and lets no other thread of the process run
    if response == "die":
        os._exit(7)
    if response == "leave":
        raise SystemExit
    if response == "raise":
        raise ValueError("no")
    return [float("nan") if response == "nan" else columns["answer"][0] + 0.5]
"""


def spec(tmp_path, text, **settings):
    (tmp_path / "reward.py").write_text(text)
    return python_spec("mine", PythonReward(function=f"{tmp_path / 'reward.py'}:score", **settings))


def test_a_function_that_raises_hangs_dies_or_returns_nan_fails_for_its_batch_alone(local_ray, tmp_path):
    # Long enough for every good batch on a busy machine. The other process goes on meanwhile.
    unruly = spec(tmp_path, UNRULY, batch_size=1, deadline_s=10.0)
    processes = FunctionProcesses(unruly, RewardFunctionsConfig(processes=2), start_s=240)
    responses = ["fine", "hang", "raise", "die", "nan", "leave", "fine"]
    rows = rows_of(*responses, answer=[1, 0, 0, 0, 0, 0, 7])
    try:
        scores = processes.score(rows)
        assert means(scores) == [1.5, "timed_out", "exception", "died", "not_a_number", "died", 7.5]
        assert processes.restarts == 3
        assert "deadline_s = 10" in scores[1].reason
        assert means(processes.score(rows_of("fine", "fine", answer=[2, 3]))) == [2.5, 3.5]
        assert processes.restarts == 3
        hung = int((tmp_path / "pid").read_text())
        with suppress(psutil.NoSuchProcess):
            psutil.Process(hung).wait(timeout=60)
    finally:
        processes.close()


def test_a_function_that_cannot_be_imported_there_ends_the_start(local_ray, tmp_path):
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"):
        FunctionProcesses(spec(tmp_path, "import no_such_module"), RewardFunctionsConfig(), start_s=240)
