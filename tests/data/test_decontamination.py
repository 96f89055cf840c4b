import json
import unicodedata

import pytest

from pipeline.data.decontamination import EvaluationPrompts, SharedPrompt, find_contamination
from pipeline.data.prompts import read_prompts
from pipeline.errors import DataError
from tests.support.paths import SHARED_DATA, needs_public_data

THIRTEEN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asks(text):
    return ({"role": "user", "content": text},)


def contamination(tmp_path, evaluation, *training):
    file = jsonl(tmp_path / "evaluation.jsonl", *({"instruction": text} for text in evaluation))
    return find_contamination(
        (("mine", f"t{i}", asks(text)) for i, text in enumerate(training)), EvaluationPrompts([file])
    )


def counts(found):
    [file] = found.files
    return file.exact, file.overlapping, found.training_exact, found.training_overlapping


def test_case_and_white_space_do_not_hide_a_repeated_prompt(tmp_path):
    found = contamination(tmp_path, ["Why is\nthe sky blue?", "And the sea?"], "why is  the sky BLUE?", "Why is grass?")
    assert counts(found) == (1, 0, 1, 0)
    assert (found.training_prompts, found.files[0].prompts) == (2, 2)
    [example] = found.files[0].examples
    assert example == SharedPrompt(
        evaluation=f"{tmp_path}/evaluation.jsonl, line 1", training_id="t0", shared="why is the sky blue?"
    )


def test_unicode_forms_do_not_hide_a_repeated_prompt_or_an_overlap(tmp_path):
    asked = "Where is the café in this town ?"
    decomposed, marked = unicodedata.normalize("NFD", asked), asked.replace("café", "ca\u200bfé\ufeff")
    assert counts(contamination(tmp_path, [asked], decomposed, marked)) == (1, 0, 2, 0)
    accented = THIRTEEN.replace("seven", "säven")
    found = contamination(tmp_path, [f"Count: {accented}."], unicodedata.normalize("NFD", f"say {accented} slowly"))
    assert counts(found) == (0, 1, 0, 1)


def test_thirteen_words_in_a_row_overlap_and_twelve_do_not(tmp_path):
    twelve = THIRTEEN.removesuffix(" thirteen")
    found = contamination(tmp_path, [f"Count: {THIRTEEN}."], f"please {twelve} ok", f"say {THIRTEEN} slowly")
    assert counts(found) == (0, 1, 0, 1)
    assert found.files[0].examples[0].training_id == "t1"
    assert found.files[0].examples[0].shared == THIRTEEN


def test_punctuation_does_not_hide_an_overlap(tmp_path):
    found = contamination(tmp_path, [f"Count: {THIRTEEN}."], THIRTEEN.replace(" ", ", "))
    assert counts(found) == (0, 1, 0, 1)


def test_an_exact_match_is_not_counted_as_an_overlap_again(tmp_path):
    found = contamination(tmp_path, [THIRTEEN], THIRTEEN, f"{THIRTEEN} and on")
    assert counts(found) == (1, 0, 1, 1)  # the evaluation prompt once; each training prompt by what it is


def test_a_repeated_evaluation_prompt_counts_once_and_a_repeated_training_prompt_each_time(tmp_path):
    found = contamination(tmp_path, ["Why?", "why?"], "why?", "WHY?")
    assert found.files[0].prompts == 1
    assert counts(found) == (1, 0, 2, 0)


def test_a_system_turn_does_not_hide_a_repeated_prompt(tmp_path):
    evaluation = EvaluationPrompts([jsonl(tmp_path / "e.jsonl", {"prompt": "Why?"})])
    messages = ({"role": "system", "content": "You are kind."}, *asks("why?"))
    assert evaluation.holds(messages)
    assert not evaluation.holds((*asks("hello"), {"role": "assistant", "content": "hi"}, *asks("why?")))
    assert find_contamination([("mine", "a", messages)], evaluation).training_exact == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"turns": ["Why?", "And now in French."]},
        {"turns": [{"content": "Why?"}]},
    ],
)
def test_the_layouts_of_the_benchmarks_are_read(tmp_path, row):
    evaluation = EvaluationPrompts([jsonl(tmp_path / "question.jsonl", row)])
    assert evaluation.holds(asks("why?"))
    assert not evaluation.holds(asks("And now in French."))


@pytest.mark.parametrize(
    ("row", "letter"),
    [
        ({"asked": "Why?"}, r"line 2: none of the fields messages, prompt, instruction, question, turns is there"),
        ({"turns": []}, r"line 2, field 'turns': None is no prompt"),
    ],
)
def test_a_row_without_a_prompt_is_named(tmp_path, row, letter):
    with pytest.raises(DataError, match=letter):
        EvaluationPrompts([jsonl(tmp_path / "e.jsonl", {"prompt": "a"}, row)])


def test_each_file_has_its_counts_and_few_examples(tmp_path):
    first = jsonl(tmp_path / "first.jsonl", *({"prompt": f"question {i}"} for i in range(9)))
    second = jsonl(tmp_path / "second.jsonl", {"prompt": "question 3"}, {"prompt": "other"})
    training = (("even" if i % 2 == 0 else "odd", f"t{i}", asks(f"Question {i}")) for i in range(7))
    found = find_contamination(training, EvaluationPrompts([first, second]))
    assert [(file.prompts, file.exact) for file in found.files] == [(9, 7), (2, 1)]
    assert [example.training_id for example in found.files[0].examples] == ["t0", "t1", "t2", "t3", "t4"]
    metrics = found.metrics()
    assert metrics[f"contamination/{second}/exact"] == 1.0
    assert metrics["contamination/training_prompts"] == metrics["contamination/training_exact"] == 7.0
    assert [metrics[f"contamination/source/{name}/exact"] for name in ("even", "odd")] == [4.0, 3.0]


@needs_public_data
def test_alpaca_eval_stands_in_the_instruction_mixture_and_not_in_alpaca():
    # The mixture holds the test sets of Self-Instruct and Koala, which AlpacaEval is made of.
    evaluation = EvaluationPrompts([str(SHARED_DATA / "alpaca_eval" / "instructions.jsonl")])
    assert len(evaluation.prompts) == 805
    mixture, alpaca = (
        find_contamination(
            (("mine", *prompt) for prompt in read_prompts([str(SHARED_DATA / "instructions" / file)])), evaluation
        )
        for file in ("instructions.parquet", "alpaca_5000.parquet")
    )
    assert (mixture.files[0].exact, mixture.files[0].overlapping) == (292, 7)
    assert (alpaca.files[0].exact, alpaca.files[0].overlapping) == (0, 0)


@needs_public_data
def test_mt_bench_and_arena_hard_questions_are_read():
    files = [str(SHARED_DATA / name / "question.jsonl") for name in ("mt_bench", "arena_hard")]
    evaluation = EvaluationPrompts(files)
    found = find_contamination([], evaluation)
    assert [file.prompts for file in found.files] == [80, 500]
