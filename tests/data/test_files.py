"""Whatever reads rows reads them by one set of rules."""

import codecs
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.decontamination import EvaluationPrompts
from pipeline.data.evaluation_examples import read_examples
from pipeline.data.files import Row, read_json, read_rows
from pipeline.data.prompts import read_prompts
from pipeline.data.run_data import with_flipped_labels
from pipeline.errors import DataError
from tests.support.sources import read_mixture, read_pairs

OBJECTIVES = ("helpfulness",)
PAIR = {"prompt": "why ?", "chosen": "because", "rejected": "no"}
RATINGS = [{"helpfulness": 4}, {"helpfulness": 1}]
TURNS = {side: f"\n\nHuman: why ?\n\nAssistant: {text}" for side, text in (("chosen", "because"), ("rejected", "no"))}


def read_preferences(path, data_format="pairs"):
    return read_pairs(path, data_format, OBJECTIVES, max_left_out=0.0)


READERS = {
    **{
        data_format: (lambda path, f=data_format: read_preferences(path, f), row)
        for data_format, row in {
            "pairs": PAIR,
            "helpsteer2": {"prompt": "why ?", "responses": ["because", "no"], "labels": RATINGS},
            "ultrafeedback": PAIR,
            "hh_rlhf": TURNS,
            "webgpt": {**PAIR, "score": [1.0, -1.0]},
            "pku_saferlhf": PAIR,
        }.items()
    },
    "prompts": (lambda path: list(read_prompts([path])), {"prompt": "why ?"}),
    "evaluation examples": (lambda path: list(read_examples([path])), PAIR),
    "evaluation prompts": (lambda path: EvaluationPrompts([path]).prompts, {"prompt": "why ?"}),
}

every_reader = pytest.mark.parametrize(("read", "row"), READERS.values(), ids=READERS.keys())


def lines(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def values(path):
    return [row.values for row in read_rows(str(path))]


def test_a_byte_order_mark_is_no_content(tmp_path):
    one, two, three = tmp_path / "one.jsonl", tmp_path / "two.json", tmp_path / "joined.jsonl"
    line = json.dumps(PAIR).encode() + b"\n"
    one.write_bytes(codecs.BOM_UTF8 + line)
    two.write_bytes(codecs.BOM_UTF8 + b"[" + line + b"]")
    three.write_bytes(2 * (codecs.BOM_UTF8 + line))
    assert values(one) == values(two) == [PAIR]
    assert values(three) == [PAIR, PAIR]
    assert read_json(two) == [PAIR]


@pytest.mark.parametrize("no_identity", [None, "", float("nan"), "absent"])
@pytest.mark.parametrize(
    ("read", "row"),
    [READERS[name] for name in READERS if name != "evaluation prompts"],  # these are their texts
)
def test_a_row_without_an_identity_is_known_by_its_place(tmp_path, read, row, no_identity):
    again = {**row, "id": "7"}
    path = lines(tmp_path, *2 * [row if no_identity == "absent" else {**row, "id": no_identity}], again)
    identities = [item[0] if isinstance(item, tuple) else item.id for item in read(path)]
    assert identities == [f"{Path(path).name}, line 1", f"{Path(path).name}, line 2", "7"]


@pytest.mark.parametrize("identity", [{"id": None}, {"id": "constant"}, {}])
def test_the_share_of_flipped_labels_is_the_one_asked_for(tmp_path, identity):
    path = lines(tmp_path, *({**PAIR, "prompt": f"q {i}", **identity} for i in range(200)))
    pairs = read_preferences(path)
    assert len({pair.id for pair in pairs}) == 200
    for seed in range(6):
        flipped = sum(pair.chosen == "no" for pair in with_flipped_labels(pairs, 0.3, seed))
        assert 40 <= flipped <= 80  # 60, three standard deviations of 6.5


def test_prompts_that_share_an_identity_or_a_directory_are_told_apart(tmp_path):
    for part, noun in (("a", "sky"), ("b", "sea")):
        (tmp_path / f"{part}.jsonl").write_text(f'{{"prompt": "why {noun} ?"}}\n{{"prompt": "how ?", "id": "p"}}\n')
    identities = [identity for identity, _ in read_prompts([str(tmp_path)])]
    assert identities == ["a.jsonl, line 1", "p", "b.jsonl, line 1", "p (2)"]


def test_flipped_labels_do_not_depend_on_where_the_data_lie(tmp_path):
    def flipped(directory):
        directory.mkdir()
        path = lines(directory, *({**PAIR, "prompt": f"q {i}"} for i in range(60)))
        return [pair.chosen == "no" for pair in with_flipped_labels(read_preferences(path), 0.3, seed=0)]

    assert flipped(tmp_path / "here") == flipped(tmp_path / "there")


def test_files_of_one_name_have_identities_of_their_own(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
    files = [lines(tmp_path / part, {"prompt": f"ask {part}"}) for part in ("a", "b")]
    identities = [identity for identity, _ in read_prompts([str(file) for file in files])]
    assert len(set(identities)) == 2


@pytest.mark.parametrize(("value", "kind"), [(True, int), (False, (int, float)), (1, bool)])
def test_a_truth_value_is_no_number(value, kind):
    row = Row(place="x.jsonl, line 1", number=1, values={"turn": value})
    with pytest.raises(DataError, match=rf"x\.jsonl, line 1, field 'turn': {value} is no "):
        row.require("turn", kind)
    assert Row(place="", number=1, values={"turn": True}).require("turn", bool) is True


@pytest.mark.parametrize(
    "read",
    [
        lambda files: list(read_prompts(files)),
        lambda files: list(read_examples(files)),
        read_mixture,
    ],
    ids=["prompts", "evaluation examples", "pairs"],
)
def test_a_file_that_would_count_twice_is_refused_under_any_name(tmp_path, read):
    row = json.dumps({"prompt": "why ?", "chosen": "so", "rejected": "no"})
    first, copy, other = tmp_path / "first.jsonl", tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    first.write_text(row)
    copy.write_text(row)
    other.write_text(row.replace("why", "how"))
    read([str(first), str(other)])
    for files in ([first, first], [first, other, copy], [tmp_path]):
        with pytest.raises(DataError, match=r"\.jsonl is the same as .*\.jsonl, so its rows would count twice"):
            read([str(file) for file in files])


TWICE = '"note": {"a": 1, "b": 2, "a": 3}'


@every_reader
def test_a_key_twice_in_one_object_is_refused(tmp_path, read, row):
    assert len(read(lines(tmp_path, row))) == 1
    repeated = json.dumps(row).replace("{", f'{{"{next(iter(row))}": "other", ', 1)
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: the key '{next(iter(row))}' stands 2 times"):
        read(lines(tmp_path, row, repeated))
    with pytest.raises(DataError, match=r"line 1: the key 'a' stands 2 times in one object\. Keep one"):
        read(lines(tmp_path, json.dumps(row)[:-1] + f", {TWICE}}}"))


def test_a_key_twice_is_named_in_a_list_and_in_a_single_value(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f'[{{"prompt": "why ?"}},\n{{{TWICE}}}]')
    with pytest.raises(DataError, match=r"row 2 \(line 2\): the key 'a' stands 2 times"):
        values(path)
    with pytest.raises(DataError, match=r"rows\.json: the key 'a' stands 2 times"):
        read_json(path)


@every_reader
def test_half_a_surrogate_pair_is_named_by_line_and_field(tmp_path, read, row):
    field = next(name for name, value in row.items() if isinstance(value, str))
    cut = {**row, field: row[field] + "\ud83d"}
    letter = (
        rf"rows\.jsonl, line 2, field '{field}': character {len(row[field]) + 1} is half a surrogate pair \('\\ud83d'"
    )
    with pytest.raises(DataError, match=letter):
        read(lines(tmp_path, row, cut))
    # A whole emoji is written as two halves that follow each other.
    assert len(read(lines(tmp_path, {**row, field: row[field] + "\ud83d\ude00"}))) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": [{"role": "user", "content": "cut \ud83d"}]}, "prompt.content"),
        ({"scores_chosen": {"\ude00": 1}}, "scores_chosen.\ude00"),
    ],
)
def test_half_a_surrogate_pair_is_found_in_turns_and_in_keys(tmp_path, changes, field):
    row = {**PAIR, **changes}
    with pytest.raises(DataError, match=re.escape(f"line 1, field {field!r}: character")):
        values(lines(tmp_path, row))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(DataError, match=re.escape(f"row 1 (line 1), field {field!r}: character")):
        values(path)
    with pytest.raises(DataError, match=re.escape(f"rows.json, field {field!r}: character")):
        read_json(path)


def test_bytes_that_are_no_text_in_parquet_are_named_by_row_and_field(tmp_path):
    path = tmp_path / "rows.parquet"
    half = pa.array([b"fine", b"cut \xed\xa0\xbd"]).view(pa.string())  # "\ud83d" as some writers encode it
    pq.write_table(pa.table({"prompt": ["a", "b"], "chosen": half}), path)
    with pytest.raises(DataError, match=r"rows\.parquet, row 2, field 'chosen': no UTF-8 \(.* at byte 5\)"):
        values(path)
