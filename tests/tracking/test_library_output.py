"""Who prints where: in a process of its own, since it redirects descriptors."""

import subprocess
import sys

from tests.support.paths import ROOT

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
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
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


def test_a_failure_tells_where_the_file_is(tmp_path):
    done, path = run(tmp_path, fails=True)
    assert done.returncode == 1
    assert f"What the libraries printed is in {path}\n" in done.stderr
    assert "DataError: the end" in done.stderr


def test_a_preemption_is_no_failure(tmp_path):
    done, _ = run(tmp_path, error="Preempted", fails=True)
    assert "What the libraries printed" not in done.stderr
    assert "Preempted: the end" in done.stderr
