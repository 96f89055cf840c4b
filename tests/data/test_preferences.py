import json
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.config.recipe import ExperimentConfig
from pipeline.data.preferences import (
    LeftOut,
    require_annotations,
    shared_prompts,
    take_pairs,
)
from pipeline.data.prompts import read_prompts, tokenise_prompts
from pipeline.data.run_data import load_data
from pipeline.data.score_statistics import MixtureStatistics, ScoreStatistics
from pipeline.data.sources import HeldoutRule, read_source
from pipeline.errors import DataError
from pipeline.loops.reward import RewardTraining
from tests.support.paths import SHARED_DATA, needs_public_data
from tests.support.sources import read_pairs, source_of

OBJECTIVES = ("helpfulness", "honesty")

USER = {"role": "user", "content": "why ?"}


def pairs_file(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def split_by_prompt(pairs, fraction, seed):
    return HeldoutRule.of([], fraction, seed).split(pairs)


def row(**changes):
    return {"prompt": "why ?", "chosen": "because", "rejected": "no", **changes}


def read(path, data_format="pairs", objectives=OBJECTIVES):
    return read_pairs(path, data_format, objectives)


def read_all(path, data_format="pairs", objectives=OBJECTIVES, max_left_out=1.0):
    return source_of(path, data_format, objectives, max_left_out)


def test_a_pair_is_read_with_its_scores(tmp_path):
    scores = {"helpfulness": 4, "honesty": "N/A"}
    [pair] = read(pairs_file(tmp_path, row(scores_chosen=scores, id="a")))
    assert (pair.id, pair.chosen, pair.prompt) == ("a", "because", ({"role": "user", "content": "why ?"},))
    assert pair.scores_chosen == {"helpfulness": 4.0}
    assert pair.scores_rejected is None


@pytest.mark.parametrize(
    ("bad", "letter"),
    [
        ('{"prompt": ', r"pairs\.jsonl, line 2: no JSON"),
        ("[1, 2]", r"line 2: \[1, 2\] is JSON but no object"),
        (row(chosen=None), r"line 2, field 'chosen': None is no text; the fields with a value are prompt, rejected"),
        (row(prompt=""), r"line 2, field 'prompt': '' is no prompt"),
        (row(scores_chosen={"helpfulnes": 1}), r"unknown objective 'helpfulnes'.*Did you mean 'helpfulness'\?"),
        (row(scores_chosen={"honesty": 11}), r"'scores_chosen.honesty': 11.0 is outside \[0.0, 10.0\]"),
        (row(scores_chosen={"honesty": "good"}), r"'good' is no number and not \"N/A\""),
        (row(scores_chosen={"honesty": float("nan")}), r"'scores_chosen.honesty': nan is no finite number"),
        (row(scores_chosen={"honesty": True}), r"'scores_chosen.honesty': True is no finite number"),
        (row(scores_chosen={"honesty": [4]}), r"\[4\] is no number"),
        (row(margin=float("inf")), r"field 'margin': inf is no finite number"),
        (row(prompt=[{"role": "user", "content": None}]), r"line 2, field 'prompt': .* is no prompt"),
        (row(prompt=[{"role": "user", "content": " "}]), r"line 2, field 'prompt': .* is no prompt"),
        (row(prompt=[{"role": "tool", "content": "4"}]), r"field 'prompt': a turn of the role 'tool'; known are"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, bad, letter):
    with pytest.raises(DataError, match=letter):
        read(pairs_file(tmp_path, row(), bad))


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n" + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 2: no UTF-8 \(invalid start byte at byte 13\)"):
        read(str(path))


def test_a_missing_file_and_a_foreign_kind_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(str(tmp_path / "none.jsonl"))
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"'\.csv' are not read"):
        read(str(tmp_path / "pairs.csv"))
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="no Parquet file"):
        read(str(tmp_path / "broken.parquet"))


def test_all_pairs_of_a_prompt_stand_on_one_side(tmp_path):
    rows = [row(prompt=f"Question  {i % 20}?", id=str(i)) for i in range(100)]
    training, heldout = split_by_prompt(read(pairs_file(tmp_path, *rows)), 0.3, seed=0)
    assert len(training) + len(heldout) == 100
    assert shared_prompts((p.prompt for p in training), (p.prompt for p in heldout)) == 0
    assert shared_prompts((p.prompt for p in training), (p.prompt for p in training)) > 5


def spellings(number):
    """One prompt as two keyboards and a web page write it: composed, decomposed, with characters that show nothing."""
    text = f"Où est le café numéro {number} ?"
    return [
        unicodedata.normalize("NFC", text),
        unicodedata.normalize("NFD", text),
        text.replace(" ", " \u200b").replace("fé", "f\u200d\u00ade\u0301") + "\ufeff",
    ]


def test_unicode_forms_are_one_prompt_for_the_split_and_stay_as_they_are_for_training(tmp_path):
    texts = [text for number in range(60) for text in spellings(number)]
    pairs = read(pairs_file(tmp_path, *(row(prompt=text) for text in texts)))
    training, heldout = split_by_prompt(pairs, 0.2, seed=0)
    assert len(training) % 3 == len(heldout) % 3 == 0
    assert shared_prompts((p.prompt for p in training), (p.prompt for p in heldout)) == 0
    assert [pair.prompt[0]["content"] for pair in pairs] == texts
    composed, *others = ([pair.prompt for pair in pairs[start::3]] for start in range(3))
    assert [shared_prompts(composed, other) for other in others] == [60, 60]
    assert shared_prompts([({"role": "user", "content": "cafe"},)], [({"role": "user", "content": "café"},)]) == 0


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"heldout_fraction = 0\.03 leaves"):
        split_by_prompt(read(pairs_file(tmp_path, row())), 0.03, seed=0)


def published(data_format, chosen, rejected):
    """A comparison as each publisher writes it."""
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        "pairs": row(**sides),
        "helpsteer2": rated(responses=[rejected, chosen], labels=[{"helpfulness": 1}, {"helpfulness": 4}]),
        "ultrafeedback": row(**sides, score_chosen=8.0, score_rejected=2.0),
        "raw ultrafeedback": {
            "instruction": "why ?",
            "completions": [
                {"response": text, "annotations": {"helpfulness": {"Rating": rating}}}
                for text, rating in ((chosen, "5"), (rejected, "1"))
            ],
        },
        "conversations": {side: [USER, {"role": "assistant", "content": text}] for side, text in sides.items()},
        "hh_rlhf": {side: dialogue("why ?", text) for side, text in sides.items()},
        "webgpt": row(**sides, score=[1.0, -1.0]),
        "pku_saferlhf": row(**sides),
    }[data_format]


@pytest.mark.parametrize(
    "layout",
    [
        *("pairs", "helpsteer2", "ultrafeedback", "raw ultrafeedback"),
        *("conversations", "hh_rlhf", "webgpt", "pku_saferlhf"),
    ],
)
def test_identical_and_empty_responses_are_left_out_and_counted(tmp_path, layout):
    texts = [
        ("because", "no"),
        ("same", "same"),
        ("", "no"),
        ("because", "  \n"),
        ("<think>only a thought</think>", "no"),
        ("same", "<think>not said</think> same"),
    ]
    data_format = {"raw ultrafeedback": "ultrafeedback", "conversations": "ultrafeedback"}.get(layout, layout)
    path = pairs_file(tmp_path, *(published(layout, *pair) for pair in texts))
    found = read_all(path, data_format, ("helpfulness",))
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == texts[:1]
    assert found.left_out == {LeftOut.IDENTICAL: 2, LeftOut.EMPTY: 3}
    letter = (
        r"pairs\.jsonl: 5 of 6 comparisons cannot be used \(3 with an empty response, 2 with identical responses\), "
        r"more than data\.max_left_out = 0\.8 allows"
    )
    with pytest.raises(DataError, match=letter):
        read_all(path, data_format, ("helpfulness",), max_left_out=0.8)
    with pytest.raises(DataError, match=r"no preference pair in .*; left out: 1 with identical responses"):
        read_all(pairs_file(tmp_path, published(layout, "a", "a")), data_format, ("helpfulness",))


def test_every_comparison_is_a_pair_or_counted_and_ties_are_no_fault(tmp_path):
    tie, unrated = rated(labels=[{"helpfulness": 3}] * 2), rated(labels=[{"helpfulness": None}, {"helpfulness": 3}])
    alone = {"prompt": "how ?", "response": "so", "helpfulness": 4}
    ratings = rated(labels=[{"helpfulness": 3}, {"helpfulness": 1}])
    path = pairs_file(tmp_path, ratings, tie, unrated, alone, {**alone, "prompt": "when ?"})
    found = read_all(path, "helpsteer2", ("helpfulness",))
    assert len(found.pairs) == 1
    assert found.left_out == {LeftOut.TIE: 1, LeftOut.UNRATED: 1, LeftOut.ALONE: 2}
    path = pairs_file(tmp_path, *8 * [tie], ratings)
    assert read_all(path, "helpsteer2", ("helpfulness",), max_left_out=0.0).left_out == {LeftOut.TIE: 8}
    truthful = row(source="truthful_qa")
    assert read_all(pairs_file(tmp_path, row(), truthful), "ultrafeedback").left_out == {LeftOut.TRUTHFUL_QA: 1}


def test_a_run_says_what_it_left_out(tmp_path, tiny_policy):
    rows = [row(prompt=f"is the bread number {i} ?") for i in range(58)]
    path = pairs_file(tmp_path, *rows, row(rejected="because"), row(chosen=""))
    experiment = ExperimentConfig(
        name="own", objectives=OBJECTIVES, data=DataConfig(sources=(SourceConfig(path=path),), heldout_fraction=0.2)
    )
    training = RewardTraining.prepare(experiment, load_data(experiment), str(tiny_policy))
    about = training.about_the_data()
    prefix = "data/left_out/pairs"
    assert about[f"{prefix}/an_empty_response"] == about[f"{prefix}/identical_responses"] == 1.0
    note = "without scores; left out: 1 with an empty response, 1 with identical responses"
    assert f"source pairs: 58 of 58 pairs, {note}" in training.notes(about)


def completion(text, helpfulness, honesty):
    return {"response": text, "annotations": {"helpfulness": {"Rating": helpfulness}, "honesty": {"Rating": honesty}}}


def test_ultrafeedback_takes_the_best_and_a_lower_completion(tmp_path):
    record = {
        "instruction": "why ?",
        "source": "sharegpt",
        "completions": [completion("best", "5", "4"), completion("worse", "2", "N/A"), completion("even", "5", "4")],
    }
    path = pairs_file(tmp_path, record, {**record, "source": "truthful_qa"})
    [pair] = read(path, "ultrafeedback")
    assert pair.chosen in ("best", "even")
    assert pair.rejected == "worse"
    assert pair.scores_rejected == {"helpfulness": 2.0}
    assert pair.margin == 2.5


@pytest.mark.parametrize(
    ("completions", "letter"),
    [
        (None, r"line 1, field 'completions': None is no list of rated completions"),
        (["best"], r"is no list of rated completions"),
        ([{**completion("best", "5", "4"), "response": None}], r"field 'completions.response': None is no text"),
        ([completion("best", "6", "4")], r"'annotations.helpfulness': 6.0 is outside \[1.0, 5.0\]"),
        ([{"response": "best", "annotations": {"helpfulness": "5"}}], r"'annotations.helpfulness': '5' has no field"),
        ([{"response": "best", "annotations": {"honest": {}, "helpfulness": {}}}], r"Did you mean 'honest'\?"),
    ],
)
def test_a_bad_completion_is_named(tmp_path, completions, letter):
    with pytest.raises(DataError, match=letter):
        read(pairs_file(tmp_path, {"instruction": "why ?", "completions": completions}), "ultrafeedback")


def test_binarized_ultrafeedback_has_a_margin_and_no_objective_scores(tmp_path):
    scored = row(score_chosen=8.0, score_rejected=3.5)
    tie, copy = row(score_chosen=7.0, score_rejected=7.0), row(rejected="because")
    path = pairs_file(tmp_path, scored, tie, copy, row(id="unscored"))
    first, second = read(path, "ultrafeedback")
    assert (first.chosen, first.rejected, first.margin) == ("because", "no", 4.5)
    assert first.scores_chosen is None
    assert (second.id, second.margin) == ("unscored", None)
    with pytest.raises(DataError, match=r"line 1: score_chosen = 2.0 is below score_rejected = 3.0"):
        read(pairs_file(tmp_path, row(score_chosen=2.0, score_rejected=3.0)), "ultrafeedback")


def test_binarized_ultrafeedback_as_conversations(tmp_path):
    asked = {"role": "user", "content": "why ?"}
    record = {
        "chosen": [asked, {"role": "assistant", "content": "because"}],
        "rejected": [asked, {"role": "assistant", "content": "no"}],
    }
    [pair] = read(pairs_file(tmp_path, record), "ultrafeedback")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((asked,), "because", "no")


def says(text):
    return {"role": "assistant", "content": text}


def both_sides(*history, chosen="because", rejected="no", **changes):
    return {"chosen": [*history, says(chosen)], "rejected": [*history, says(rejected)], **changes}


SYSTEM = {"role": "system", "content": "Answer in German"}
LONG = (SYSTEM, USER, says("so"), {"role": "user", "content": "really ?"})


@pytest.mark.parametrize("data_format", ["ultrafeedback", "pairs"])
@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        (both_sides(*LONG, prompt="why ?"), LONG),
        (both_sides(*LONG[1:], prompt="why ?"), LONG[1:]),
        (both_sides(*LONG), LONG),
        (both_sides(*LONG[1:], prompt=list(LONG)), LONG),
        (both_sides(*LONG[:2], prompt="why ?"), LONG[:2]),
        (both_sides(prompt=list(LONG)), LONG),
        (both_sides(prompt="why ?"), (USER,)),
    ],
)
def test_a_prompt_keeps_its_history_and_its_system_turn(tmp_path, data_format, record, prompt):
    [pair] = read(pairs_file(tmp_path, record), data_format)
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, "because", "no")


@pytest.mark.parametrize("data_format", ["ultrafeedback", "pairs"])
def test_conversations_that_differ_before_the_responses_are_left_out_and_counted(tmp_path, data_format):
    good, empty = both_sides(*LONG), both_sides(USER, chosen="", prompt="why ?")
    other = {**good, "rejected": [SYSTEM, *LONG[2:], says("no")]}
    text = {**good, "rejected": "no"}
    found = read_all(pairs_file(tmp_path, good, other, text, empty), data_format)
    assert len(found.pairs) == 1
    assert found.left_out == {LeftOut.OTHER_PROMPT: 2, LeftOut.EMPTY: 1}
    with pytest.raises(
        DataError, match="field 'chosen': the conversation must end with a turn of the role 'assistant'"
    ):
        read(pairs_file(tmp_path, {**good, "chosen": list(LONG)}), data_format)


@needs_public_data
def test_binarized_ultrafeedback_real_rows():
    found = read_all(
        str(SHARED_DATA / "ultrafeedback_binarized" / "ultrafeedback_binarized.parquet"), "ultrafeedback", (), 0.05
    )
    assert found.left_out == {LeftOut.TIE: 83, LeftOut.IDENTICAL: 2, LeftOut.EMPTY: 2}
    assert len(found.pairs) == 812 - 83 - 2 - 2
    assert all(pair.margin > 0 for pair in found.pairs)


def dialogue(*turns):
    return "".join(f"\n\n{who}: {text}" for who, text in zip(("Human", "Assistant") * 3, turns, strict=False))


def test_hh_dialogues_become_turns_and_those_that_part_early_are_left_out(tmp_path):
    path = pairs_file(
        tmp_path,
        {"chosen": dialogue("hi", "hello", "why ?", "because"), "rejected": dialogue("hi", "hello", "why ?", "no")},
        {"chosen": dialogue("hi", "hello", "why ?", "because"), "rejected": dialogue("hi", "what", "why ?", "no")},
        {"chosen": dialogue("hi", "same"), "rejected": dialogue("hi", "same")},
        {"prompt": dialogue("why ?", ""), "chosen": " because", "rejected": " no"},
    )
    whole, parted = read(path, "hh_rlhf")
    assert [turn["role"] for turn in whole.prompt] == ["user", "assistant", "user"]
    assert (whole.prompt[1]["content"], whole.chosen, whole.rejected) == ("hello", "because", "no")
    assert (parted.prompt, parted.chosen, parted.rejected) == (({"role": "user", "content": "why ?"},), "because", "no")
    with pytest.raises(DataError, match=r"line 1, field 'chosen'.*no dialogue"):
        read(pairs_file(tmp_path, row()), "hh_rlhf")


def test_webgpt_prefers_the_higher_score_and_leaves_ties_out(tmp_path):
    published = {"question": {"full_text": "why ?"}, "answer_0": "no", "answer_1": "because"}
    path = pairs_file(
        tmp_path,
        {**published, "score_0": -0.5, "score_1": 0.5},
        {**published, "score_0": 0.0, "score_1": 0.0},
        row(score=[1.0, -1.0]),
        row(score=[1.0, 1.0]),
    )
    first, second = read(path, "webgpt")
    assert (first.chosen, first.rejected, first.margin) == ("because", "no", 1.0)
    assert (second.chosen, second.rejected, second.margin) == ("because", "no", 2.0)
    with pytest.raises(DataError, match="field 'score': None is no list of two scores"):
        read(pairs_file(tmp_path, row()), "webgpt")


def test_pku_chooses_the_safer_response_and_scores_it_by_its_severity(tmp_path):
    published = {"prompt": "why ?", "response_0": "harm", "response_1": "care", "better_response_id": 0}
    severities = {"response_0_severity_level": 2, "response_1_severity_level": 0}
    path = pairs_file(tmp_path, {**published, **severities, "safer_response_id": 1}, row())
    first, second = read_all(path, "pku_saferlhf", ("helpfulness", "safety")).pairs
    assert (first.chosen, first.rejected) == ("care", "harm")
    assert (first.scores_chosen, first.scores_rejected) == ({"safety": 3.0}, {"safety": 1.0})
    assert (second.chosen, second.scores_chosen) == ("because", None)
    assert read_all(path, "pku_saferlhf").pairs[0].scores_chosen is None
    with pytest.raises(DataError, match=r"safer_response_id.*2.0 is outside"):
        read(pairs_file(tmp_path, {**published, "safer_response_id": 2}), "pku_saferlhf")


@needs_public_data
@pytest.mark.parametrize(
    ("data_format", "file", "count"),
    [
        ("hh_rlhf", "hh_rlhf/hh_rlhf_test.parquet", 3262 - 20),  # an empty or an equal answer
        ("webgpt", "webgpt_comparisons/webgpt_test.parquet", 625 - 172),  # ties
        ("pku_saferlhf", "pku_saferlhf/pku_saferlhf_5k.parquet", 3685),
    ],
)
def test_real_rows_of_other_publishers(data_format, file, count):
    pairs = read(str(SHARED_DATA / file), data_format)
    assert len(pairs) == count
    assert all(pair.prompt[-1]["role"] == "user" and pair.chosen != pair.rejected for pair in pairs)
    assert not any("\n\nHuman:" in turn["content"] for pair in pairs for turn in pair.prompt)


def test_helpsteer2_as_nvidia_publishes_it(tmp_path):
    base = {"prompt": "why ?", "honesty": 1}
    rows = [{**base, "response": "good", "helpfulness": 4}, {**base, "response": "bad", "helpfulness": 1}]
    [pair] = read(pairs_file(tmp_path, *rows), "helpsteer2")
    assert (pair.chosen, pair.rejected, pair.margin) == ("good", "bad", 3.0)


def rated(**changes):
    ratings = [{"helpfulness": 3, "honesty": 2}, {"helpfulness": 1, "honesty": 4}]
    return {"prompt": "why ?", "responses": ["good", "bad"], "labels": ratings, **changes}


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        (
            "a\n<extra_id_1>Assistant\nb\n\nb\n<extra_id_1>User\nc",
            [("user", "a"), ("assistant", "b\n\nb"), ("user", "c")],
        ),
        ("<extra_id_0>System\ns\n<extra_id_1>User\na\n<extra_id_1>Assistant\n", [("system", "s"), ("user", "a")]),
        ("what does <extra_id_5> mean ?", [("user", "what does <extra_id_5> mean ?")]),
    ],
)
def test_helpsteer2_markup_becomes_turns(tmp_path, prompt, turns):
    base = {"prompt": prompt, "honesty": 1}
    rows = [{**base, "response": "good", "helpfulness": 4}, {**base, "response": "bad", "helpfulness": 1}]
    for path in (pairs_file(tmp_path, *rows), pairs_file(tmp_path, rated(prompt=prompt))):
        [pair] = read(path, "helpsteer2")
        assert [(turn["role"], turn["content"]) for turn in pair.prompt] == turns


@pytest.mark.parametrize(
    ("prompt", "letter"),
    [
        ("a\n<extra_id_1>Robot\nb", r"line 1, field 'prompt': a turn of 'Robot'; known are System, User, Assistant"),
        ("a\n<extra_id_1>Assistant\nb", r"line 1, field 'prompt': the last turn is not the user's"),
        ("<extra_id_1>Assistant", r"line 1, field 'prompt': the last turn is not the user's"),
    ],
)
def test_bad_helpsteer2_markup_is_named(tmp_path, prompt, letter):
    with pytest.raises(DataError, match=letter):
        read(pairs_file(tmp_path, rated(prompt=prompt)), "helpsteer2")


def test_helpfulness_orders_the_pair_even_when_it_is_no_objective(tmp_path):
    [pair] = read(pairs_file(tmp_path, rated()), "helpsteer2", ("honesty", "helpfulness"))
    assert (pair.chosen, pair.margin) == ("good", 2.0)
    [pair] = read(pairs_file(tmp_path, rated()), "helpsteer2", ("honesty",))
    assert (pair.chosen, pair.scores_chosen, pair.scores_rejected) == ("good", {"honesty": 2.0}, {"honesty": 4.0})


def test_a_missing_rating_is_masked_and_a_missing_helpfulness_leaves_the_pair_out(tmp_path):
    masked = rated(labels=[{"helpfulness": 3, "honesty": "N/A"}, {"helpfulness": 1, "honesty": None}])
    [pair] = read(pairs_file(tmp_path, masked, rated(labels=[{"helpfulness": None, "honesty": 1}] * 2)), "helpsteer2")
    assert (pair.scores_chosen, pair.scores_rejected) == ({"helpfulness": 3.0}, {"helpfulness": 1.0})


@pytest.mark.parametrize(
    ("changes", "letter"),
    [
        ({"responses": None}, r"line 1: 'responses' must be a list of two texts"),
        ({"responses": ["good", None]}, r"'responses' must be a list of two texts"),
        ({"labels": [1, 2]}, r"'labels' of their two ratings"),
        ({"labels": [{"helpfulness": 5, "honesty": 2}] * 2}, r"'labels.helpfulness': 5.0 is outside \[0.0, 4.0\]"),
        ({"labels": [{"helpfulness": 3, "honest": 2}] * 2}, r"annotation column 'honesty'.*Did you mean 'honest'\?"),
    ],
)
def test_a_bad_helpsteer2_row_is_named(tmp_path, changes, letter):
    with pytest.raises(DataError, match=letter):
        read(pairs_file(tmp_path, rated(**changes)), "helpsteer2")


def test_a_hub_that_cannot_be_reached_is_a_letter(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'some/set' cannot be opened: no network\. .*data\.source"):
        read_source(SourceConfig(hub="some/set"), "some/set", OBJECTIVES, seed=0, max_left_out=0.05)


@needs_public_data
def test_helpsteer2_real_rows():
    path = str(SHARED_DATA / "helpsteer2" / "helpsteer2.parquet")
    objectives = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    pairs = read(path, "helpsteer2", objectives)
    assert len(pairs) == 496
    assert sum(len(pair.prompt) > 1 for pair in pairs) == 59
    assert not any("<extra_id_" in turn["content"] for pair in pairs for turn in pair.prompt)
    assert all(p.scores_chosen["helpfulness"] > p.scores_rejected["helpfulness"] for p in pairs)
    with pytest.raises(DataError, match="unknown objective 'kindness'"):
        read(path, "helpsteer2", ("helpfulness", "kindness"))


def test_score_statistics_by_hand(tmp_path):
    pairs = read(
        pairs_file(
            tmp_path,
            row(scores_chosen={"helpfulness": 1, "honesty": 2}, scores_rejected={"helpfulness": 3}),
            row(scores_chosen={"helpfulness": 5}),
        )
    )
    statistics = ScoreStatistics.of(pairs, OBJECTIVES)
    assert statistics.mean == pytest.approx((3.0, 2.0))
    assert statistics.std == pytest.approx(((8 / 3) ** 0.5, 1.0))  # a constant objective keeps its scale
    assert statistics.count == (3, 1)
    mixture = MixtureStatistics(sources={"pairs": statistics})
    values, mask = mixture.standardise([{"helpfulness": 3 + (8 / 3) ** 0.5}, None], ["pairs", "pairs"])
    assert values[0].tolist() == pytest.approx([1.0, 0.0])
    assert mask.tolist() == [[True, False], [False, False]]


def test_taking_fewer_pairs_keeps_their_order(tmp_path):
    pairs = read(pairs_file(tmp_path, *(row(id=str(i)) for i in range(20))))
    ids = [int(p.id) for p in take_pairs(pairs, 5, seed=0, salt="")]
    assert len(ids) == 5
    assert ids == sorted(ids)


def test_prompts_are_read_from_parquet_and_too_long_ones_dropped(tmp_path, tokenizer):
    path = str(tmp_path / "prompts.parquet")
    pq.write_table(pa.table({"instruction": ["why ?", "why " * 50]}), path)
    prompts = list(read_prompts([path]))
    assert [messages[0]["content"] for _, messages in prompts] == ["why ?", "why " * 50]
    assert len(tokenise_prompts(prompts, tokenizer, max_prompt_tokens=20)) == 1
    with pytest.raises(DataError, match="none of 2 prompts fits in max_prompt_tokens = 3"):
        tokenise_prompts(prompts, tokenizer, max_prompt_tokens=3)


def test_files_become_a_run_whose_heldout_prompts_are_held_out(tmp_path):
    path = pairs_file(tmp_path, *(row(prompt=f"Question {i} ?", id=str(i)) for i in range(60)))
    experiment = ExperimentConfig(
        name="own", objectives=OBJECTIVES, data=DataConfig(sources=(SourceConfig(path=path),), heldout_fraction=0.2)
    )
    data = load_data(experiment)
    assert len(data.train_pairs) + len(data.heldout_pairs) == 60
    assert shared_prompts((m for _, m in data.heldout_prompts), (p.prompt for p in data.train_pairs)) == 0


def test_pairs_that_lack_what_the_loss_learns_from_are_refused(tmp_path):
    [bare] = read(pairs_file(tmp_path, row()))
    require_annotations([bare], scores=False, margins=False)
    with pytest.raises(DataError, match="none of 1 training pairs has objective scores"):
        require_annotations([bare], scores=True, margins=False)
    with pytest.raises(DataError, match="none of 1 training pairs has a margin"):
        require_annotations([bare], scores=False, margins=True)
    annotated = read_all(pairs_file(tmp_path, row(margin=0, scores_rejected={"honesty": 1}))).pairs
    require_annotations([bare, *annotated], scores=True, margins=True)  # one that has it is enough
    swapped = read(pairs_file(tmp_path, row(id="p7", margin=-1)))
    with pytest.raises(DataError, match=r"pair 'p7' has margin -1\.0: its chosen response was rated worse"):
        require_annotations([*annotated, *swapped], scores=False, margins=True)


def test_what_will_be_reported_on_is_left_out_of_training_and_counted(tmp_path):
    pairs = pairs_file(tmp_path, *(row(prompt=f"question {i} ?") for i in range(60)))
    reported = tmp_path / "reported.jsonl"
    reported.write_text("".join(json.dumps({"instruction": f"Question  {i} ?"}) + "\n" for i in range(30)))
    sources = (SourceConfig(path=pairs),)
    data = DataConfig(sources=sources, heldout_fraction=0.2, evaluation_prompts=(str(reported),))
    experiment = ExperimentConfig(name="files", objectives=OBJECTIVES, data=data)
    clean, whole = (
        load_data(experiment.model_copy(update={"data": data.model_copy(update={"evaluation_prompts": files})}))
        for files in (data.evaluation_prompts, ())
    )
    numbers = [int(pair.prompt[0]["content"].split()[1]) for pair in clean.train_pairs]
    assert min(numbers) == 30
    assert [pair for pair in whole.train_pairs if int(pair.prompt[0]["content"].split()[1]) >= 30] == clean.train_pairs
    assert clean.heldout_pairs == whole.heldout_pairs
    left_out = len(whole.train_pairs) - len(clean.train_pairs) + len(whole.train_prompts) - len(clean.train_prompts)
    assert clean.contamination.training_exact == left_out > 0
    assert whole.contamination is None
