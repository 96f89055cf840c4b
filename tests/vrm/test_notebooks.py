"""The notebooks run from the first cell to the last, in a kernel of their own."""

import json
import re
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbformat import read

from tests.support.paths import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"
LIGHT_BYTES = 30_000


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """One for all: `score_and_explain` reads the model that `train_on_own_pairs` writes."""
    return tmp_path_factory.mktemp("notebooks")


def executed(name, directory, monkeypatch):
    """What the cells printed and showed as text."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": directory}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_own_pairs_are_trained_on_and_then_scored_with_reasons(directory, monkeypatch):
    trained = executed("train_on_own_pairs", directory, monkeypatch)
    low = re.search(r"orders \d+% \[(\d+)%, \d+%\] of the held-out pairs right", trained)
    assert int(low.group(1)) > 50, trained
    reasons = re.search(r"may give as reasons: (.+)", trained).group(1).split(", ")
    assert reasons != ["nothing"], trained
    scored = executed("score_and_explain", directory, monkeypatch)
    assert re.search(r"[ab] is preferred: P\(a > b\) = 0\.\d\d", scored), scored
    header = scored[scored.index("response ") :].splitlines()[0]
    assert header.split()[3 : 3 + len(reasons)] == reasons


def test_a_tiny_policy_is_aligned(directory, monkeypatch):
    assert re.search(
        r"the aligned policy wins \d+% \[\d+%, \d+%\] by the truth", executed("align_tiny", directory, monkeypatch)
    )


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.stem)
def test_committed_outputs_are_there_and_light(file):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert any(cell.get("outputs") for cell in cells)
    assert file.stat().st_size < LIGHT_BYTES
    assert str(Path.home()) not in file.read_text(encoding="utf-8")
    assert "/tmp/" not in file.read_text(encoding="utf-8")
