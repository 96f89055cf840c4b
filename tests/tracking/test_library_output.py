"""Who prints where: in a process of its own, since it redirects descriptors."""

import os
import pty
import subprocess
import sys

from tests.support.paths import ROOT
from tests.tracking.test_progress import read_all

SCRIPT = """
import logging, os, sys
old = logging.StreamHandler(sys.stderr)      # as Ray's, from its import
from pipeline.errors import {error}
from pipeline.tracking.library_output import library_output_to
library = type(sys)("library")
exec("import sys\\ndef speak():\\n    print('a library prints'); print('and warns', file=sys.stderr)", library.__dict__)
with library_output_to({path!r}) as printed:
    print("a line of ours")
    print("an error line of ours", file=sys.stderr)
    library.speak()
    logging.getLogger("lib").addHandler(old)
    logging.getLogger("lib").warning("an old handler")
    new = logging.StreamHandler(sys.stdout)   # as DeepSpeed's, from an import in the job
    logging.getLogger("new").addHandler(new)
    logging.getLogger("new").warning("a new handler")
    os.write(1, b"C code\\n")
    os.write(2, b"C code that fails\\n")
    os.system("echo a child")
    if {fails}:
        raise {error}("the end")
print("after it")
"""


def run(tmp_path, *, error="DataError", fails=False):
    path = tmp_path / "workspace" / "libraries.log"
    script = SCRIPT.format(path=str(path), error=error, fails=fails)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    return done, path


def test_the_console_gets_our_lines_and_the_file_those_of_libraries(tmp_path):
    done, path = run(tmp_path)
    assert done.stdout == "a line of ours\nafter it\n"
    assert done.stderr == "an error line of ours\n"
    assert sorted(path.read_text().splitlines()) == sorted(
        [
            *("a library prints", "and warns", "an old handler", "a new handler"),
            *("C code", "C code that fails", "a child"),
        ]
    )


def test_our_lines_stay_on_the_console_when_ray_has_printed(tmp_path):
    """The first message of a raylet, or of another node, makes Ray's manager of progress bars."""
    script = f"""
from pipeline.tracking.library_output import library_output_to
with library_output_to({str(tmp_path / "libraries.log")!r}):
    from ray.experimental import tqdm_ray
    tqdm_ray.instance()
    print("a line of ours")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout == "a line of ours\n"


def test_a_failure_tells_where_the_file_is(tmp_path):
    done, path = run(tmp_path, fails=True)
    assert done.returncode == 1
    assert f"What the libraries printed is in {path}\n" in done.stderr
    assert "DataError: the end" in done.stderr


def test_a_preemption_is_no_failure(tmp_path):
    done, _ = run(tmp_path, error="Preempted", fails=True)
    assert "What the libraries printed" not in done.stderr
    assert "Preempted: the end" in done.stderr


LIVE = """
from pipeline.tracking.library_output import library_output_to
from pipeline.tracking.progress import Progress
library = type(__import__("sys"))("library")
exec("def speak(): print('a library prints')", library.__dict__)
with library_output_to({path!r}):
    with Progress("sft", 2) as progress:
        progress.show(1, "nll 3")
        print("a remark of ours")
        library.speak()
        progress.show(2, "nll 2")
    print("sft finished")
"""


def test_on_a_terminal_our_lines_stand_above_the_bar_and_those_of_libraries_nowhere(tmp_path):
    path = tmp_path / "libraries.log"
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    script = LIVE.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, stdout=writer, env=environment, timeout=240)
    os.close(writer)
    text = read_all(reader)
    assert done.returncode == 0
    assert "━" in text
    assert text.index("a remark of ours") < text.index("2/2  nll 2") < text.index("sft finished")
    assert "a library prints" not in text
    assert path.read_text() == "a library prints\n"
