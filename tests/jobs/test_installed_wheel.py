"""The wheel: what it carries, and that it works from any directory, without the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.components

PACKAGES = ("actors", "cluster", "jobs", "pipeline")
NO_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because the build leaves its own files beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = directory / "checkout"
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=NO_SOURCES)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    pip("wheel", "--no-build-isolation", "--wheel-dir", directory, copy)
    [built] = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory that holds the wheel's packages and its scripts, and nothing that they depend on."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--target", target, wheel)
    return target


def pip(command, *arguments):
    call = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *map(str, arguments)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def in_package(installed, *command, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_carries_every_file_of_the_packages_and_no_test(wheel):
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in sources} >= {".py", ".yaml", ".html", ".j2"}
    assert carried == sources


def test_vrm_runs_from_any_directory(installed, tmp_path):
    vrm = installed / "bin" / "vrm"
    assert "tiny" in in_package(installed, vrm, "recipes", cwd=tmp_path)
    printed = in_package(installed, vrm, "run", "tiny", "--dry-run", cwd=tmp_path)
    assert "name: tiny" in printed
    assert "at most at once" in printed


def test_code_and_data_are_those_of_the_wheel(installed, tmp_path):
    code = (
        "import actors, cluster.resources, jobs.vrm, pipeline.config.load as load\n"
        "print(actors.__file__, cluster.resources.__file__, jobs.vrm.__file__, load.RECIPES, sep='\\n')"
    )
    places = in_package(installed, sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(installed) and Path(place).exists() for place in places)
