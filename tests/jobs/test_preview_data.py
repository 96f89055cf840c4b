"""The preview of a recipe's data: what the models will see, without Ray."""

import json
import re

import pytest

from jobs.preview_data import preview_command, preview_data
from pipeline.config.load import load_recipe
from pipeline.errors import ConfigError, DataError


@pytest.fixture
def mixture(tmp_path):
    """Overrides for a mixture of two sources that share prompts, and an evaluation file."""

    def jsonl(name, rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / f"{name}.jsonl")

    long = "guide me through the needle " * 40
    rated = [
        {
            "id": str(i),
            "prompt": f"guide me {'at work ' * i}",
            "chosen": "i am not certain of this .",
            "rejected": "no",
            "scores_chosen": {"helpfulness": 3 + i % 2, "honesty": 5},
            "scores_rejected": {"helpfulness": 1},
        }
        for i in range(20)
    ]
    bare = [{"prompt": row["prompt"], "chosen": "this always works perfectly .", "rejected": "no"} for row in rated[:5]]
    bare += [{"prompt": f"{long} {i}", "chosen": "yes .", "rejected": "no", "id": f"long {i}"} for i in range(15)]
    bare.append({"prompt": "x", "chosen": "same", "rejected": "same"})
    reported = jsonl("reported", [{"prompt": row["prompt"]} for row in rated[:2]])
    sources = f"[{{path: {jsonl('rated', rated)}}},{{path: {jsonl('bare', bare)}, objectives: none}}]"
    return [
        *(f"data.sources={sources}", f"data.evaluation_prompts=[{reported}]", "data.heldout_fraction=0.2"),
        *("objectives=[helpfulness,honesty]", "reward.max_length=100", "alignment.max_prompt_tokens=100"),
    ]


def test_it_shows_counts_lengths_overlap_and_rows(mixture):
    text = preview_data(load_recipe("tiny", mixture), rows=1)
    assert "source rated: 20 of 20 pairs" in text
    assert "source bare: 20 of 20 pairs, without scores; left out: 1 with identical responses" in text
    scores = [line.split() for line in text.splitlines() if line.startswith("rated   helpfulness")]
    assert len(scores) == 1
    assert "the scale that is shown to people" in " ".join(scores[0])
    assert re.search(r"^rated   honesty +\d+ +5 +0 ", text, re.MULTILINE)  # every honesty is 5: mean 5, deviation 0
    # Two of the five shared prompts stand in the evaluation file, so that training leaves them out.
    assert "rated and bare: 3 of 18 and 18" in text
    [share] = [line.split()[5] for line in text.splitlines() if line.startswith("bare ") and "%" in line]
    assert share == "83.3%"  # 15 of the 18 prompts are long
    assert "above max_prompt_tokens = 100" in text
    [reported] = [line.split() for line in text.splitlines() if line.startswith("file ")]
    assert reported[2] == "2"
    assert text.count("--- chosen (helpfulness") == 1
    assert text.count("--- chosen (no scores)") == 1
    assert "<|im_start|> user guide me" in text
    assert "--- target weights: none; margin: unknown" in text


def test_no_row_is_shown_where_none_is_asked_for(mixture, capsys):
    preview_command(["tiny", "--rows", "0", *mixture])
    assert "--- chosen" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--rows -1: give 0 or more"):
        preview_command.options(["tiny", "--rows", "-1"])


def test_it_refuses_what_a_run_would_refuse(mixture):
    with pytest.raises(DataError, match="unknown objective 'kindness': no source annotates it"):
        preview_data(load_recipe("tiny", [*mixture, "objectives=[helpfulness,honesty,kindness]"]), rows=0)


def test_the_planted_world_has_a_preview_too():
    overrides = ["data.planted.num_train_pairs=40", "data.planted.num_heldout_pairs=10"]
    text = preview_data(load_recipe("tiny", overrides), rows=1)
    assert "planted              40              10" in text
    assert "the recipe names no evaluation files" in text
