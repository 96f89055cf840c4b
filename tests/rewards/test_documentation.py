"""What docs/rewards.md shows is what runs."""

import re

import yaml

from pipeline.config.load import load_recipe
from pipeline.config.rewards import KINDS, PythonReward
from pipeline.rewards.function_calls import LoadedFunction
from pipeline.rewards.function_spec import python_spec
from tests.rewards.rows import rows_of
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "rewards.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_functions_of_the_page_score(tmp_path):
    batch, single = blocks("python")
    (tmp_path / "my_reward.py").write_text(batch + "\n\n" + single)

    def scores(name, rows):
        return LoadedFunction(python_spec(name, PythonReward(function=f"{tmp_path / 'my_reward.py'}:{name}"))).score(
            rows
        )

    assert [s.mean for s in scores("polite", rows_of("Please do", "do"))] == [1.0, 0.0]
    [score] = scores("graded", rows_of("abcd", wanted_length=[14]))
    assert (score.mean, score.std) == (-10.0, 1.0)


def test_the_recipe_of_the_page_is_a_recipe(tmp_path):
    [text] = blocks("yaml")
    path = tmp_path / "mine.yaml"
    written = {"extends": "tiny", **yaml.safe_load(text)}
    written["alignment"] |= {"prompts_per_step": 32, "samples_per_prompt": 4}
    path.write_text(yaml.safe_dump(written))
    rewards = load_recipe(str(path)).alignment.rewards
    assert [(source.name, source.weight) for source in rewards] == [("model", 1.0), ("python", 0.5), ("length", 0.1)]


def test_every_kind_of_reward_is_on_the_page():
    assert {re.match(r"`(\w+)", row)[1] for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)} == {*KINDS}
