"""The source archive and the wheel: what they carry, and that vrm works from any directory, without the checkout."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

import vrm
from tests.support.clashing_modules import write_clashing_modules
from tests.support.paths import ROOT

pytestmark = pytest.mark.components

PACKAGES = ("actors", "cluster", "jobs", "pipeline", "vrm")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NO_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source archive. Built from a copy, because the build leaves its own files beside the sources."""
    directory = tmp_path_factory.mktemp("sdist")
    copy = directory / "checkout"
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=NO_SOURCES)
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(directory)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [built] = directory.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the source archive, as an installer does that finds no wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", directory, sdist)
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


@pytest.fixture
def own_directory(tmp_path):
    """A directory of a user whose modules have the names of the packages."""
    write_clashing_modules(tmp_path, jobs="raise RuntimeError('jobs of the user was imported')\n")
    return tmp_path


def environment_of(*places):
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return others | {"PYTHONPATH": os.pathsep.join(map(str, places))}


def in_package(installed, *command, cwd):
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment_of(installed),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_source_archive_holds_what_a_build_needs_and_no_test(sdist):
    with tarfile.open(sdist) as archive:
        held = {Path(name).parts[1] for name in archive.getnames() if "/" in name}
    assert held == {*PACKAGES, *FILES, "PKG-INFO", "setup.cfg", "vrm_pipeline.egg-info"}


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
        "import actors, cluster.resources, jobs.commands, pipeline.config.load as load\n"
        "print(actors.__file__, cluster.resources.__file__, jobs.commands.__file__, load.RECIPES, sep='\\n')"
    )
    places = in_package(installed, sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert len(places) == 4
    assert all(Path(place).is_relative_to(installed) and Path(place).exists() for place in places)


# ----------------------------------------------------------------------------- beside modules of the same names


def test_vrm_finds_its_own_packages_beside_a_users(installed, own_directory):
    printed = in_package(installed, installed / "bin" / "vrm", "run", "tiny", "--dry-run", cwd=own_directory)
    assert "at most at once" in printed


def test_ray_workers_find_the_packages_of_the_wheel_beside_a_users(installed, own_directory, trained_reward_model):
    """Ray puts the driver's current directory in front of the path of its workers, and here PYTHONPATH names it too."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    command = [installed / "bin" / "vrm", "serve", "--model", trained_reward_model, "--port", str(port), "--no-token"]
    # Ray's own folder is everybody's; and the path of a socket must be short.
    with tempfile.TemporaryDirectory() as ray_folder, open(own_directory / "log", "w", encoding="utf-8") as log:
        environment = environment_of(own_directory, installed) | {"RAY_TMPDIR": ray_folder}
        service = subprocess.Popen(command, cwd=own_directory, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            gives_up = time.monotonic() + 300
            while "serving" not in (printed := Path(log.name).read_text(encoding="utf-8")):
                assert service.poll() is None, printed
                assert time.monotonic() < gives_up, printed
                time.sleep(0.1)
            with vrm.Client(f"http://127.0.0.1:{port}") as client:
                answered = client.score("how do I keep plants healthy", ["water them", "no"])
            service.send_signal(signal.SIGTERM)
            assert service.wait(timeout=120) == 0
        finally:
            service.kill()
            service.wait()
    expected = vrm.load_reward_model(trained_reward_model, device="cpu").score(
        "how do I keep plants healthy", ["water them", "no"]
    )
    assert [row.reward for row in answered.scores] == pytest.approx([row.reward for row in expected], abs=1e-5)
