"""The packages of the project are found beside a user's own modules of the same names."""

import subprocess
import sys

import cloudpickle
import pytest

from tests.support.clashing_modules import write_clashing_modules
from tests.support.paths import ROOT
from vrm import own_packages
from vrm.own_packages import find_own_packages_first_in_worker, without_clashes


@pytest.fixture
def own_directory(tmp_path):
    """A directory with modules that have the names of the project's packages."""
    write_clashing_modules(tmp_path, jobs="mine = True\n")
    return tmp_path


def test_directories_that_clash_stand_behind_the_project(own_directory, tmp_path_factory):
    other = str(tmp_path_factory.mktemp("other"))
    assert without_clashes([str(own_directory), other, str(ROOT)]) == [other, str(ROOT), str(own_directory)]
    assert without_clashes([str(own_directory), other]) == [other, str(ROOT), str(own_directory)]
    assert without_clashes(["", other]) == ["", other]


@pytest.mark.parametrize("code", ["import vrm; vrm.Client", "from vrm.command_line import main; main()"])
def test_vrm_works_beside_modules_of_the_same_names(own_directory, code):
    """As in a notebook, where Python looks into the current directory first."""
    done = run(own_directory, f"{code}\nimport pipeline, sys; print(pipeline.__file__)", "recipes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(ROOT / "pipeline" / "__init__.py")


def test_a_module_that_was_imported_before_is_named(own_directory):
    done = run(own_directory, "import jobs, vrm; vrm.Client")
    assert done.returncode == 1
    assert f"has imported {str(own_directory / 'jobs' / '__init__.py')!r} as 'jobs'" in done.stderr


def test_a_worker_and_the_processes_that_it_spawns_find_the_packages_of_the_driver(own_directory):
    """As in a worker of Ray: it gets the hook by value, and its path changes after the hook has run."""
    cloudpickle.register_pickle_by_value(own_packages)
    try:
        (own_directory / "hook").write_bytes(cloudpickle.dumps(find_own_packages_first_in_worker))
    finally:
        cloudpickle.unregister_pickle_by_value(own_packages)
    worker = (
        "import multiprocessing, pickle, sys\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "pickle.load(open('hook', 'rb'))()\n"
        f"sys.path.insert(0, {str(own_directory)!r})\n"
        "import pipeline\n"
        "with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as engine:\n"
        "    spawned = engine.submit(eval, \"__import__('actors').__file__\").result()\n"
        "print(pipeline.__file__, spawned)"
    )
    done = run(own_directory, worker)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("pipeline", "actors")]


def run(directory, code, *arguments):
    place = f"import sys; sys.path.insert(1, {str(ROOT)!r})\n"  # behind the current directory, as site-packages are
    return subprocess.run(
        [sys.executable, "-c", place + code, *arguments],
        cwd=directory,
        env={"PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
