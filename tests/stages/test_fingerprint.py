"""A stage's identity changes with everything it was computed from, and with nothing else."""

import hashlib

import pytest

from pipeline.config.load import load_recipe
from pipeline.stages.fingerprint import directory_fingerprint, fingerprint


def test_fingerprint_is_the_hash_of_canonical_json():
    canonical = '{"config":{"a":1,"b":[2.5,null]},"inputs":["f0"],"name":"align_policy","version":3}'
    expected = hashlib.sha256(canonical.encode()).hexdigest()
    assert fingerprint("align_policy", 3, {"b": [2.5, None], "a": 1}, ["f0"]) == expected


@pytest.mark.parametrize(
    "other",
    [
        ("train", 1, {"steps": 10}, ["x", "y"]),
        ("align", 2, {"steps": 10}, ["x", "y"]),
        ("align", 1, {"steps": 11}, ["x", "y"]),
        ("align", 1, {"steps": 10}, ["y", "x"]),
        ("align", 1, {"steps": 10}, ["x"]),
    ],
)
def test_every_part_of_the_identity_matters(other):
    assert fingerprint(*other) != fingerprint("align", 1, {"steps": 10}, ["x", "y"])


def test_rescaling_the_cluster_keeps_every_stage():
    def identity(*overrides):
        recipe = load_recipe("tiny", overrides)
        config = recipe.model_dump(mode="json", exclude={"cluster"})
        return fingerprint("align_policy", 1, config, [])

    assert identity("cluster.rollout.workers=7", "cluster.alignment.ranks=4") == identity()
    assert identity("alignment.num_steps=41") != identity()


def test_a_number_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint("align", 1, {"learning_rate": float("inf")}, [])


def test_a_directory_is_known_by_its_files_wherever_it_lies(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "deep").mkdir(parents=True)
        (tmp_path / place / "deep" / "b.json").write_text("2")
        (tmp_path / place / "a.json").write_text("1")
    here, there = (directory_fingerprint(str(tmp_path / place)) for place in ("here", "there"))
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"1", b"2"))
    assert here == there == hashlib.sha256(f"{one}  a.json\n{two}  deep/b.json\n".encode()).hexdigest()
    (tmp_path / "there" / "a.json").rename(tmp_path / "there" / "c.json")
    assert directory_fingerprint(str(tmp_path / "there")) != here
