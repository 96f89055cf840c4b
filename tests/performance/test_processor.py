from pathlib import Path

import pytest

from tests.performance.processor import described, processor

SCRIPTS = sorted(path for path in Path(__file__).parent.glob("*.py") if "time.perf_counter()" in path.read_text())


def test_a_processor_is_described_by_its_first_core_and_the_limits_of_its_libraries():
    cores = "model name\t: AMD EPYC\nflags\t\t: fma avx avx2 avx512f\n\nmodel name\t: another\nflags\t\t: avx2\n"
    assert described(cores, {}) == "AMD EPYC (avx2, avx512f)"
    limited = {"ONEDNN_MAX_CPU_ISA": "AVX2", "HOME": "/root"}
    assert described(cores, limited) == "AMD EPYC (avx2, avx512f, ONEDNN_MAX_CPU_ISA=AVX2)"
    assert "(no vector instructions named)" in described("", {})
    assert " cores, load " in processor()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_that_measures_time_prints_its_processor(script):
    assert "print(processor()" in script.read_text() or "{processor()}" in script.read_text()
