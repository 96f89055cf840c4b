"""`vrm` for users: a trained reward model in Python."""

import asyncio
import os
import re
import shutil
import subprocess
import sys

import httpx
import pytest

import vrm
from pipeline.errors import CheckpointError, DataError
from pipeline.evaluation.reward_scorer import RewardModelScorer
from pipeline.models.reward_model_card import CARD_FILE, RewardModelCard
from pipeline.serving.admission import Admission
from pipeline.serving.cache import ScoreCache
from pipeline.serving.http.app import build_api
from pipeline.serving.scoring_service import ScoringService
from tests.support.paths import ROOT

PROMPT = "how do I keep plants healthy"
MESSAGES = ({"role": "user", "content": PROMPT},)
RESPONSES = ["water them every day", "no"]


@pytest.fixture(scope="module")
def model(trained_reward_model):
    return vrm.load_reward_model(trained_reward_model, device="cpu")


def with_fidelity(directory, target, accuracy):
    """The same checkpoint, whose card says how often the scores of an objective ordered held-out pairs."""
    shutil.copytree(directory, target)
    card = RewardModelCard.model_validate_json((target / CARD_FILE).read_text())
    fidelity = {f"reasons/{card.objectives[0]}/pair_accuracy": accuracy, f"reasons/{card.objectives[0]}/pairs": 50.0}
    changed = card.model_copy(update={"metrics": card.metrics | fidelity})
    (target / CARD_FILE).write_text(changed.model_dump_json())
    return str(target), card.objectives[0]


# ----------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_scorer_of_the_pipeline(model, trained_reward_model):
    scorer = RewardModelScorer.load(trained_reward_model, max_tokens_per_batch=64)
    expected = scorer.score([MESSAGES, MESSAGES], RESPONSES)
    table = model.score(PROMPT, RESPONSES)
    objectives = scorer.card.objectives
    assert [row.reward for row in table] == pytest.approx([score.mean for score in expected], abs=1e-5)
    assert [row.reward_std for row in table] == pytest.approx([score.std for score in expected], abs=1e-5)
    for row, score in zip(table, expected, strict=True):
        assert row.objective_weights == pytest.approx(dict(zip(objectives, score.objective_weights, strict=True)))
        assert row.objective_scores == pytest.approx(
            dict(zip(objectives, score.objective_scores, strict=True)), abs=1e-5
        )


def test_a_text_is_a_turn_of_the_user(model):
    assert model.score(MESSAGES, RESPONSES) == model.score(PROMPT, RESPONSES)
    assert model.score(PROMPT, RESPONSES[0]) == model.score(PROMPT, RESPONSES[:1])


def test_scores_and_comparisons_are_those_of_the_service(model):
    async def score_rows(rows):
        return model._scorer.score(*rows)

    service = ScoringService(
        score_rows, model.description, admission=Admission(64), cache=ScoreCache(0), deadline_s=60.0
    )
    transport = httpx.ASGITransport(build_api(service, token="secret", replica="r1"))

    async def ask():
        async with vrm.AsyncClient("http://vrm", token="secret", transport=transport) as client:
            return await client.score(PROMPT, RESPONSES), await client.compare(PROMPT, *RESPONSES)

    answered, compared = asyncio.run(ask())
    assert tuple(answered.scores) == model.score(PROMPT, RESPONSES).scores
    assert compared == model.compare(PROMPT, *RESPONSES)
    assert answered.model_fingerprint == model.description.model_fingerprint


def test_comparing_takes_a_directory_or_a_loaded_model(model, trained_reward_model):
    compared = vrm.compare(model, PROMPT, *RESPONSES)
    assert compared == vrm.compare(trained_reward_model, PROMPT, *RESPONSES)
    assert compared.margin == pytest.approx(compared.a.reward - compared.b.reward)
    assert f"P(a > b) = {compared.probability:.2f}" in str(compared)


# ----------------------------------------------------------------------------- the table


def test_every_row_has_its_numbers_by_objective(model):
    table = model.score(PROMPT, RESPONSES)
    first = table.rows()[0]
    assert (first["prompt"], first["response"], first["reward"]) == (PROMPT, RESPONSES[0], table[0].reward)
    for objective in model.description.objectives:
        assert first[f"weight/{objective}"] == table[0].objective_weights[objective]
        assert first[f"score/{objective}"] == table[0].objective_scores[objective]
        assert first[f"rating/{objective}"] == table[0].ratings[objective]
        assert first[f"contribution/{objective}"] == table[0].contributions[objective]
    frame = table.to_pandas()
    assert frame["reward_std"].tolist() == [row.reward_std for row in table]


def test_only_verified_objectives_are_shown_as_reasons(trained_reward_model, tmp_path):
    unsure, objective = with_fidelity(trained_reward_model, tmp_path / "unsure", accuracy=0.6)
    sure, _ = with_fidelity(trained_reward_model, tmp_path / "sure", accuracy=0.7)
    shown = str(vrm.load_reward_model(unsure, device="cpu").score(PROMPT, RESPONSES))
    assert objective not in shown
    assert shown.endswith(
        "No objective of this model is verified on held-out annotations, so the table shows no reasons."
    )
    table = vrm.load_reward_model(sure, device="cpu").score(PROMPT, RESPONSES)
    header, first, _ = str(table).splitlines()
    assert re.split(r" {2,}", header) == ["response", "reward", "sd", objective, "what the model cannot tell apart"]
    assert f"{table[0].reward:.2f}" in first
    assert f"{table[0].contributions[objective]:+.2f}" in first


def test_a_notebook_shows_texts_as_texts(model):
    shown = model.score(PROMPT, ["<script>alert(1)</script>"])._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


# ----------------------------------------------------------------------------- what cannot be scored


@pytest.mark.parametrize(
    ("prompt", "responses", "message"),
    [
        ("", ["yes"], "the prompt: '' is no prompt"),
        ([{"role": "narrator", "content": "hi"}], ["yes"], "role 'narrator'"),
        (PROMPT, [], "0 prompts and 0 responses"),
        (PROMPT, [None], "response None is no text"),
    ],
)
def test_input_that_is_no_conversation_is_refused(model, prompt, responses, message):
    with pytest.raises(DataError, match=message):
        model.score(prompt, responses)


def test_a_workspace_stands_for_its_newest_finished_reward_model(trained_reward_model, tmp_path):
    for number, name in enumerate(("old", "new", "unfinished")):
        stage = tmp_path / "stages" / f"train_reward_model-{name}"
        shutil.copytree(trained_reward_model, stage / "result")
        if name != "unfinished":
            (stage / "manifest.json").write_text("{}")
            os.utime(stage / "manifest.json", (number, number))
    loaded = vrm.load_reward_model(tmp_path, device="cpu")
    assert loaded.directory.endswith("stages/train_reward_model-new/result")


@pytest.mark.parametrize(("exists", "message"), [(True, "neither reward_model.json nor"), (False, "does not exist")])
def test_a_directory_without_a_reward_model_is_refused(tmp_path, exists, message):
    with pytest.raises(CheckpointError, match=message):
        vrm.load_reward_model(tmp_path if exists else tmp_path / "nowhere")


# ----------------------------------------------------------------------------- the package


def test_importing_vrm_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; started = time.process_time(); import vrm; seconds = time.process_time() - started\n"
        "print(seconds < 0.3, sorted({'torch', 'ray', 'transformers', 'pydantic', 'httpx'} & sys.modules.keys()))\n"
        "print([name for name in vrm.__all__ if not hasattr(vrm, name)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["True []", "[]"], done.stderr


def test_an_unknown_name_of_the_package_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'load'. It has .*load_reward_model"):
        vrm.load  # noqa: B018
