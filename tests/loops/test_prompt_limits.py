"""Prompts that exceed a token limit are found before anything is trained, not by the stage that needs them."""

import pytest

from pipeline.config.load import load_recipe
from pipeline.data.run_data import load_data
from pipeline.errors import DataError
from pipeline.learning.starting_policy import write_starting_policy
from pipeline.loops.benchmark import require_prompts_fit

SMALL = ("data.planted.num_train_pairs=20", "data.planted.num_heldout_pairs=16", "data.planted.num_train_prompts=100")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("policy"))
    write_starting_policy(load_recipe("tiny", SMALL).policy, directory, seed=0)
    return directory


def check(policy, *overrides):
    recipe = load_recipe("tiny", (*SMALL, *overrides))
    require_prompts_fit(recipe, load_data(recipe), policy)


def test_prompts_within_the_limits_pass(policy):
    check(policy)


@pytest.mark.parametrize("section", ["alignment", "benchmark"])
def test_a_limit_that_most_prompts_exceed_is_refused_with_its_section(policy, section):
    with pytest.raises(DataError, match=rf"none of \d+ prompts fits in {section}\.max_prompt_tokens = 3 tokens"):
        check(policy, f"{section}.max_prompt_tokens=3")


def test_a_method_that_samples_nothing_may_have_any_limit_of_alignment_prompts(policy):
    check(policy, "alignment.max_prompt_tokens=3", "alignment.algorithm=dpo")
