"""bfloat16 where the processor multiplies it, float32 elsewhere, and what a recipe names as it is."""

import pytest

from pipeline.config.load import load_recipe
from pipeline.models import native_dtype
from pipeline.models.native_dtype import multiplies_bfloat16, with_native_dtype

AVX2 = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 fma\n"
AVX512 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f\n"
AVX512_BF16 = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.mark.parametrize(
    ("cpu_info", "has"), [(AVX2, False), (AVX512, False), (AVX512_BF16, True), (ARM, True), ("", False)]
)
def test_a_processor_is_judged_by_its_flags(cpu_info, has):
    assert multiplies_bfloat16(cpu_info) is has


@pytest.mark.parametrize(("cpu_info", "dtype"), [(AVX2, "float32"), (AVX512_BF16, "bfloat16")])
def test_auto_is_what_the_processor_multiplies(cpu_info, dtype, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(cpu_info)
    monkeypatch.setattr(native_dtype, "CPU_INFO", file)
    recipe = with_native_dtype(load_recipe("tiny", ["reward.backbone_dtype=auto"]))
    assert recipe.reward.backbone_dtype == dtype
    assert recipe.cluster == load_recipe("tiny").cluster


def test_a_dtype_that_a_recipe_names_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(native_dtype, "CPU_INFO", tmp_path / "nothing there")
    recipe = load_recipe("tiny", ["reward.backbone_dtype=bfloat16"])
    assert with_native_dtype(recipe) is recipe
