"""A mixture of sources: how much each one gives, which side its prompts stand on, and what its annotations mean."""

import json
import random

import pytest

from pipeline.config.data import DataConfig, SourceConfig
from pipeline.config.recipe import ExperimentConfig
from pipeline.config.reward import RewardConfig, VariationalLossConfig
from pipeline.data.preferences import LeftOut, normalised_prompt
from pipeline.data.recipe_files import check_data, data_files, read_sources
from pipeline.data.run_data import data_fingerprints, load_data
from pipeline.data.score_statistics import MixtureStatistics
from pipeline.data.sources import in_their_shares
from pipeline.errors import DataError
from pipeline.learning.reward_data import RewardData, share_by_source
from pipeline.loops.reward import RewardTraining
from tests.support.paths import SHARED_DATA, needs_public_data
from tests.support.sources import source_of

OBJECTIVES = ("helpfulness", "honesty")


def pairs_of(name, count, **columns):
    return [
        {"id": str(i), "prompt": f"{name} {i} ?", "chosen": f"{name} says {i}", "rejected": "no", **columns}
        for i in range(count)
    ]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(tmp_path, name, rows, **settings):
    return SourceConfig(name=name, path=jsonl(tmp_path / f"{name}.jsonl", rows), **settings)


def recipe(*sources, loss=None, **settings):
    return ExperimentConfig(
        name="mixture",
        objectives=OBJECTIVES,
        data=DataConfig(**{"sources": sources, "heldout_fraction": 0.25, **settings}),
        reward=RewardConfig(loss=loss or VariationalLossConfig()),
    )


def scores(helpfulness):
    return {"scores_chosen": {"helpfulness": helpfulness + 1, "honesty": 2}, "scores_rejected": {"helpfulness": 1}}


def texts(read):
    return {pair.chosen for pair in read.pairs}


# ----------------------------------------------------------------------------- how much of each source


def test_the_pairs_of_a_cap_depend_on_the_seed_alone_and_not_on_row_order_or_other_sources(tmp_path):
    rows = pairs_of("a", 50)
    shuffled = random.Random(1).sample(rows, 50)
    first, again = (source(tmp_path, f"s{i}", order, cap=10) for i, order in enumerate((rows, shuffled)))
    other = source(tmp_path, "other", pairs_of("b", 30))
    [alone] = read_sources(recipe(first))
    beside, _ = read_sources(recipe(again, other))
    assert len(alone.pairs) == 10
    assert texts(alone) == texts(beside)
    [elsewhere] = read_sources(recipe(first).model_copy(update={"seed": 1}))
    assert texts(elsewhere) != texts(alone)
    [larger] = read_sources(recipe(first.model_copy(update={"cap": 20})))
    assert texts(alone) < texts(larger)
    assert [pair.id for pair in alone.pairs] == sorted((pair.id for pair in alone.pairs), key=int)


def test_a_cap_above_the_rows_is_a_note(tmp_path):
    [read] = read_sources(recipe(source(tmp_path, "few", pairs_of("a", 5), cap=9)))
    assert (len(read.pairs), read.note()) == (5, "source few: 5 of 5 pairs, fewer than its cap of 9, without scores")


@pytest.mark.parametrize(
    ("weights", "used"),
    [
        ((0.5, 0.25, 0.25), (80, 40, 40)),  # the second source is the scarcest: it gives all
        ((2, 1, 1), (80, 40, 40)),
        ((None, 0.25, 0.25), (100, 40, 50)),  # 100 pairs are the other half; the second source has 40 for 50
        ((None, None, 0.3), (100, 40, 60)),
        ((None, None, None), (100, 40, 90)),
    ],
)
def test_weights_are_shares_of_the_mixture(tmp_path, weights, used):
    sizes = zip("abc", (100, 40, 90), weights, strict=True)
    reads = [
        source_of(jsonl(tmp_path / f"{name}.jsonl", pairs_of(name, size)), name=name, weight=weight)
        for name, size, weight in sizes
    ]
    assert tuple(len(read.pairs) for read in in_their_shares(reads, seed=0)) == used


def test_only_the_rows_of_a_subset_are_read(tmp_path):
    rows = pairs_of("a", 4, subset="harmless", fold=1) + pairs_of("b", 3, subset="helpful", fold=1)
    assert texts(source_of(jsonl(tmp_path / "hh.jsonl", rows), where={"subset": "helpful", "fold": 1})) == {
        "b says 0",
        "b says 1",
        "b says 2",
    }
    with pytest.raises(DataError, match=r"no row has the values .*subset has harmless, helpful"):
        source_of(tmp_path / "hh.jsonl", where={"subset": "harmles"})
    with pytest.raises(DataError, match=r"line 1: .* names the column 'part'; the row has chosen, fold, id, prompt"):
        source_of(tmp_path / "hh.jsonl", where={"part": "harmless"})


# ----------------------------------------------------------------------------- one prompt, one side


def test_the_split_is_by_prompt_over_all_sources(tmp_path):
    shared = pairs_of("same", 40)
    first = source(tmp_path, "first", shared)
    second = source(tmp_path, "second", [{**row, "prompt": row["prompt"].upper(), "chosen": "else"} for row in shared])
    data = load_data(recipe(first, second))
    sides = [{normalised_prompt(pair.prompt) for pair in side} for side in (data.train_pairs, data.heldout_pairs)]
    assert not sides[0] & sides[1]
    assert len(data.train_pairs) == 2 * len(sides[0])
    assert {pair.id.partition("/")[0] for pair in data.heldout_pairs} == {"first", "second"}


def test_two_sources_that_claim_a_prompt_for_both_sides_are_refused_with_the_cure(tmp_path):
    train = source(tmp_path, "train", pairs_of("a", 6) + pairs_of("b", 3), side="train")
    heldout = source(tmp_path, "heldout", pairs_of("b", 5), side="heldout")
    with pytest.raises(DataError, match=r"3 prompts are claimed .*: 3 of 'train' and 'heldout'.*'b 0 \?'.*side: both"):
        load_data(recipe(train, heldout))
    data = load_data(recipe(train.model_copy(update={"side": "both"}), heldout, heldout_fraction=0.01))
    held = {pair.prompt[0]["content"] for pair in data.heldout_pairs}
    assert held >= {f"b {i} ?" for i in range(5)}
    assert "source train: 3 pairs share a prompt with a source that is all for training or all held out" in " ".join(
        data.source_notes
    )
    assert not any(normalised_prompt(messages).startswith("b ") for _, messages in data.train_prompts)


def test_a_source_may_be_all_for_training(tmp_path):
    train = source(tmp_path, "train", pairs_of("a", 40), side="train")
    heldout = source(tmp_path, "heldout", pairs_of("b", 10), side="heldout")
    data = load_data(recipe(train, heldout, max_pairs=20))
    assert {pair.source for pair in data.train_pairs} == {"train"}
    assert (len(data.train_pairs), len(data.heldout_pairs)) == (20, 10)


def test_contamination_is_counted_by_source(tmp_path):
    reported = jsonl(tmp_path / "reported.jsonl", [{"prompt": f"A {i} ?"} for i in range(30)])
    sources = (source(tmp_path, name, pairs_of(name, 30)) for name in "ab")
    data = load_data(recipe(*sources, evaluation_prompts=(reported,)))
    metrics = data.contamination.metrics()
    assert metrics["contamination/source/a/exact"] == metrics["contamination/source/a/prompts"] > 0
    assert metrics["contamination/source/b/exact"] == 0 < metrics["contamination/source/b/prompts"]
    assert {pair.source for pair in data.train_pairs} == {"b"}


def test_every_source_has_its_share_of_a_limited_evaluation(tmp_path):
    reads = [source_of(jsonl(tmp_path / f"{n}.jsonl", pairs_of(n, size)), name=n) for n, size in (("a", 60), ("b", 30))]
    pairs = [pair for read in reads for pair in read.pairs]
    kept = share_by_source(pairs, 30)
    assert [pair.source for pair in kept] == ["a"] * 20 + ["b"] * 10
    assert share_by_source(reads[0].pairs, 7) == list(reads[0].pairs[:7])


# ----------------------------------------------------------------------------- annotations


def test_columns_become_the_objectives_of_the_recipe(tmp_path):
    rows = pairs_of("a", 3, scores_chosen={"useful": 4, "style": 2}, scores_rejected={"useful": 1})
    path = jsonl(tmp_path / "a.jsonl", rows)
    read = source_of(path, objectives={"useful": "helpfulness", "preferred": "honesty"})
    assert read.pairs[0].scores_chosen == {"helpfulness": 4.0, "honesty": 1.0}
    assert read.pairs[0].scores_rejected == {"helpfulness": 1.0, "honesty": 0.0}
    assert source_of(path, objectives="none").pairs[0].scores_chosen is None
    with pytest.raises(DataError, match=r"no row has the annotation column 'usefull'.*useful, style, preferred.*mean"):
        source_of(path, objectives={"usefull": "helpfulness"})


def test_the_overall_score_of_a_publisher_is_a_column(tmp_path):
    binarized = jsonl(tmp_path / "u.jsonl", pairs_of("a", 2, score_chosen=8.0, score_rejected=3.0))
    [pair, _] = source_of(binarized, "ultrafeedback", objectives={"score": "helpfulness"}).pairs
    assert (pair.scores_chosen, pair.scores_rejected) == ({"helpfulness": 8.0}, {"helpfulness": 3.0})
    webgpt = jsonl(tmp_path / "w.jsonl", pairs_of("a", 2, score=[-1.5, 1.5]))
    [pair, _] = source_of(webgpt, "webgpt", objectives={"score": "helpfulness"}).pairs
    assert (pair.scores_chosen, pair.scores_rejected) == ({"helpfulness": 1.5}, {"helpfulness": -1.5})
    flags = {"response_0": "care", "response_1": "harm", "safer_response_id": 0}
    flags |= {"is_response_0_safe": True, "is_response_1_safe": False}
    pku = jsonl(tmp_path / "p.jsonl", [{"prompt": "why ?", **flags}])
    [pair] = source_of(pku, "pku_saferlhf", objectives={"is_safe": "safety"}).pairs
    assert (pair.scores_chosen, pair.scores_rejected) == ({"safety": 1.0}, {"safety": 0.0})


def test_raw_ultrafeedback_without_objectives_is_ordered_by_all_its_ratings(tmp_path):
    def completion(text, *ratings):
        annotations = {name: {"Rating": rating} for name, rating in zip(OBJECTIVES, ratings, strict=True)}
        return {"response": text, "annotations": annotations}

    completions = [completion("worse", "2", "N/A"), completion("best", "5", "4")]
    rows = [{"instruction": "why ?", "completions": completions}]
    [pair] = source_of(jsonl(tmp_path / "raw.jsonl", rows), "ultrafeedback", objectives="none").pairs
    assert (pair.chosen, pair.rejected, pair.margin, pair.scores_chosen) == ("best", "worse", 2.5, None)


def test_each_row_is_standardised_by_the_statistics_of_its_own_source(tmp_path):
    fine = source(tmp_path, "fine", [row | scores(i % 5 * 2) for i, row in enumerate(pairs_of("a", 40))])
    coarse = source(tmp_path, "coarse", [row | scores(i % 5 * 0.2) for i, row in enumerate(pairs_of("b", 60))])
    pairs = [pair for read in read_sources(recipe(fine, coarse)) for pair in read.pairs]
    statistics = MixtureStatistics.of(pairs, OBJECTIVES)
    values, mask = statistics.standardise([p.scores_chosen for p in pairs], [p.source for p in pairs])
    for name in ("fine", "coarse"):
        rows = [b for b, pair in enumerate(pairs) if pair.source == name]
        own = statistics.sources[name]
        expected = [(pairs[b].scores_chosen["helpfulness"] - own.mean[0]) / own.std[0] for b in rows]
        assert values[rows, 0].tolist() == pytest.approx(expected)
    assert mask.all()
    assert statistics.scale_sources == ("coarse", "coarse")
    assert (statistics.mean, statistics.std) == (statistics.sources["coarse"].mean, statistics.sources["coarse"].std)


def test_a_source_that_is_only_held_out_is_standardised_by_its_own_annotations(tmp_path):
    pairs = source_of(jsonl(tmp_path / "a.jsonl", pairs_of("a", 10, **scores(3))), name="a").pairs
    heldout = source_of(jsonl(tmp_path / "b.jsonl", pairs_of("b", 10, **scores(7))), name="b").pairs
    statistics = MixtureStatistics.of(pairs, OBJECTIVES, heldout=[*pairs[:1], *heldout])
    assert statistics.sources["a"] == MixtureStatistics.of(pairs, OBJECTIVES).sources["a"]
    assert statistics.sources["b"].mean[0] == pytest.approx((8 + 1) / 2)
    assert statistics.sources["b"].count == (0, 0)  # it trains nothing, so its scale is shown to nobody
    assert statistics.scale_sources == ("a", "a")


def test_an_objective_that_no_source_annotates_is_refused(tmp_path):
    annotated = source(tmp_path, "a", pairs_of("a", 9, scores_chosen={"helpful": 3}), objectives={"helpful": "honesty"})
    bare = source(tmp_path, "b", pairs_of("b", 9))
    with pytest.raises(DataError, match=r"unknown objective 'helpfulness'.*a: helpful; b: none\. Did you mean"):
        load_data(recipe(annotated, bare))
    load_data(recipe(bare))  # nothing is annotated at all: the pairs train the likelihood alone


def test_a_source_without_annotations_is_refused_where_a_weight_of_scores_is_asked_for(tmp_path):
    annotated = source(tmp_path, "a", [row | scores(3) for row in pairs_of("a", 20)])
    bare = source(tmp_path, "b", pairs_of("b", 20))
    loss = VariationalLossConfig(score_weight=0.3)
    with pytest.raises(
        DataError, match=r"source 'b' has no usable annotation, but .*score_weight = 0.3.*objectives: none"
    ):
        load_data(recipe(annotated, bare, loss=loss))
    load_data(recipe(annotated, bare))
    load_data(recipe(annotated, bare.model_copy(update={"objectives": {}}), loss=loss))


def test_a_mapped_column_without_a_single_value_is_refused_before_a_run(tmp_path):
    nothing = {"scores_chosen": {"helpful": None}, "scores_rejected": {"helpful": "N/A"}}
    annotated = source(tmp_path, "a", [row | scores(3) for row in pairs_of("a", 20)])
    empty = source(tmp_path, "b", pairs_of("b", 20, **nothing), objectives={"helpful": "helpfulness"})
    for read in (check_data, load_data):
        with pytest.raises(DataError, match=r"source 'b' has no usable annotation, but its map of `objectives` asks"):
            read(recipe(annotated, empty))


# ----------------------------------------------------------------------------- what a run says


def test_a_run_says_what_each_source_gives(tmp_path, tiny_policy):
    first = source(tmp_path, "first", [row | scores(i % 3) for i, row in enumerate(pairs_of("a", 40))])
    second = source(tmp_path, "second", [*pairs_of("b", 20), {"prompt": "x", "chosen": "same", "rejected": "same"}])
    experiment = recipe(first, second)
    data = load_data(experiment)
    assert data.left_out == {"first": {}, "second": {LeftOut.IDENTICAL: 1}}
    training = RewardTraining.prepare(experiment, data, str(tiny_policy))
    about = training.about_the_data()
    assert about["data/left_out/second/identical_responses"] == 1.0
    assert about["data/source/first/train_pairs"] + about["data/source/first/heldout_pairs"] == 40
    notes = training.notes(about)
    assert "source second: 20 of 20 pairs, without scores; left out: 1 with identical responses" in notes
    assert "scores are shown on the scale of the source with most annotations: helpfulness of first, " in " ".join(
        notes
    )


def test_a_run_says_which_scores_never_change(tmp_path, tiny_policy):
    rows = [row | scores(i % 3) for i, row in enumerate(pairs_of("a", 40))]
    experiment = recipe(source(tmp_path, "flat", rows))
    training = RewardTraining.prepare(experiment, load_data(experiment), str(tiny_policy))
    said = "every score of honesty in source flat is 2: it tells no response from another"
    assert [said] == [note for note in training.notes(training.about_the_data()) if note.startswith("every score")]


def test_the_files_of_a_recipe_are_all_that_a_run_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("VRM_DATA_ROOT", str(tmp_path))
    for name in ("a", "b", "prompts", "reported"):
        jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    sources = (SourceConfig(path="a.jsonl"), SourceConfig(hub="some/set"), SourceConfig(path="b.jsonl"))
    experiment = recipe(*sources, prompts=("prompts.jsonl",), evaluation_prompts=("reported.jsonl",))
    names = "prompts", "reported", "a", "b"
    assert [file.path for file in data_files(experiment)] == [str(tmp_path / f"{name}.jsonl") for name in names]
    assert len(data_fingerprints(experiment)) == 4


@needs_public_data
def test_a_mixture_of_real_sources(tokenizer):
    def real(path, data_format, **settings):
        return SourceConfig(path=str(SHARED_DATA / path), format=data_format, cap=60, **settings)

    hh, safety = "hh_rlhf/hh_rlhf_test.parquet", {"preferred": "safety"}
    attributes = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    experiment = ExperimentConfig(
        name="real",
        objectives=(*attributes, "safety"),
        data=DataConfig(
            sources=(
                real("helpsteer2/helpsteer2.parquet", "helpsteer2"),
                real("pku_saferlhf/pku_saferlhf_5k.parquet", "pku_saferlhf", objectives=safety),
                real(hh, "hh_rlhf", name="harmless", where={"subset": "harmless"}, objectives=safety),
                real(hh, "hh_rlhf", name="helpful", where={"subset": "helpful"}, objectives="none"),
                real("ultrafeedback_binarized/ultrafeedback_binarized.parquet", "ultrafeedback", objectives="none"),
                real("webgpt_comparisons/webgpt_test.parquet", "webgpt", objectives="none"),
            ),
            heldout_fraction=0.25,
        ),
        reward=RewardConfig(loss=VariationalLossConfig(score_weight=0.3), max_length=100000),
    )
    data = load_data(experiment)
    assert len(data.train_pairs) + len(data.heldout_pairs) == 6 * 60
    training = RewardData.of(experiment, data, tokenizer)
    assert training.statistics.scale_sources[:5] == ("helpsteer2",) * 5
    assert training.statistics.scale_sources[5] in ("pku_saferlhf_5k", "harmless")
    batch = training.heldout
    assert set(batch.sources) == {source.name for source in experiment.data.sources}
    annotated = batch.score_mask[: batch.num_pairs]
    for name, columns in (("helpsteer2", range(5)), ("harmless", [5]), ("helpful", []), ("webgpt_test", [])):
        rows = [b for b, source in enumerate(batch.sources) if source == name]
        assert annotated[rows].any(0).nonzero().flatten().tolist() == list(columns)
