"""A user's function: how it is found, called and read."""

import pytest

from pipeline.config.rewards import PythonReward
from pipeline.errors import ConfigError
from pipeline.rewards.function_calls import LoadedFunction
from pipeline.rewards.function_spec import python_spec
from pipeline.rewards.in_process import FunctionInProcess
from pipeline.rewards.rows import RewardScore
from tests.rewards.rows import means, rows_of

BATCH = "def score(prompts, responses, columns):\n    "
SINGLE = "def score(prompt, response, columns):\n    "
ROWS = rows_of("a", "b b", "c c c", answer=[1, 2, 3])


def spec(tmp_path, text, **settings):
    path = tmp_path / "reward.py"
    path.write_text(text)
    return python_spec("mine", PythonReward(function=f"{path}:score", **settings))


def scores(tmp_path, text, rows=ROWS):
    return LoadedFunction(spec(tmp_path, text)).score(rows)


@pytest.mark.parametrize(
    "text",
    [
        f"{BATCH}return [a + len(r.split()) for a, r in zip(columns['answer'], responses)]",
        f"import numpy as np\n{BATCH}return np.array(columns['answer']) + [len(r.split()) for r in responses]",
        f"async {BATCH}return tuple(a + len(r.split()) for a, r in zip(columns['answer'], responses))",
        f"{SINGLE}return columns['answer'] + len(response.split())",
        f"import asyncio\nasync {SINGLE}await asyncio.sleep(0); return columns['answer'] + len(response.split())",
    ],
    ids=["batch", "array", "async batch", "single", "async single"],
)
def test_batch_and_single_functions_sync_and_async_score_alike(tmp_path, text):
    assert means(scores(tmp_path, text)) == [2.0, 4.0, 6.0]


def test_prompts_are_conversations(tmp_path):
    text = f"{BATCH}return [len(p[-1]['content']) for p in prompts]"
    assert means(scores(tmp_path, text)) == [4.0, 4.0, 4.0]  # "p0 ?"


@pytest.mark.parametrize(
    "text",
    [f"{BATCH}return [1, 2, 3], [0.5, 0, 0.25]", f"{SINGLE}return columns['answer'], [.5, 0, .25][len(response) // 2]"],
)
def test_a_score_may_have_a_standard_deviation(tmp_path, text):
    assert [(s.mean, s.std) for s in scores(tmp_path, text)] == [(1.0, 0.5), (2.0, 0.0), (3.0, 0.25)]


def test_a_batch_of_two_scores_is_no_pair_of_score_and_deviation(tmp_path):
    assert means(scores(tmp_path, f"{BATCH}return (7.0, 8.0)", rows_of("a", "b"))) == [7.0, 8.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{BATCH}raise ValueError('no')", ["exception"] * 3),
        (f"{SINGLE}return 1 / (len(response) - 3)", [-0.5, "exception", 0.5]),
        (f"{BATCH}return [1, float('nan'), float('inf')]", [1.0, "not_a_number", "not_a_number"]),
        (f"{BATCH}return [1, None, 'x']", [1.0, "not_a_number", "not_a_number"]),
        (f"{BATCH}return [1, 2]", ["wrong_length"] * 3),
        (f"{BATCH}return [1, 2, 3], [1]", ["wrong_length"] * 3),
        (f"{BATCH}return 'abc'", ["not_a_number"] * 3),
        (f"{BATCH}return None", ["not_a_number"] * 3),
    ],
)
def test_what_a_function_gets_wrong_is_a_failure_of_its_rows(tmp_path, text, expected):
    assert means(scores(tmp_path, text)) == expected


def test_a_failure_names_the_error_and_the_line_that_raised_it(tmp_path):
    [failure, *_] = scores(tmp_path, f"{BATCH}x = 1\n    raise ValueError('no such unit')")
    assert failure.reason == "ValueError: no such unit (reward.py, line 3)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def score(:", r"cannot be imported: SyntaxError"),
        ("def other(prompts, responses, columns): pass", r"there is no such function; the file has other"),
        ("def score(prompts, answers): pass", r"takes \(prompts, answers\); write function\(prompts, responses, col"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        LoadedFunction(spec(tmp_path, text))


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"nowhere\.py cannot be read .*starts at the working directory"):
        python_spec("mine", PythonReward(function="nowhere.py:score"))


def test_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "units_of_the_reward.py").write_text("FACTOR = 10")
    assert means(scores(tmp_path, f"from units_of_the_reward import FACTOR\n{SINGLE}return FACTOR")) == [10.0] * 3


def test_in_one_process_batches_have_their_size_and_a_deadline(tmp_path):
    slow = "time.sleep(9 if 'b b' in responses else 0)"
    text = f"import time\n{BATCH}{slow}\n    return [float(len(responses))] * len(responses)"
    function = FunctionInProcess(spec(tmp_path, text, batch_size=1, deadline_s=0.3))
    assert means(function.score(ROWS)) == [1.0, "timed_out", 1.0]
    assert isinstance(function.score(rows_of("a"))[0], RewardScore)
