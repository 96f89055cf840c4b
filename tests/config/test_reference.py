"""What `vrm explain` and docs/configuration.md say of a setting comes from the schema, and nothing is left unsaid."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from jobs.commands import vrm_command
from pipeline.config.base import Frozen
from pipeline.config.reference import Setting, as_markdown, explained, settings
from pipeline.errors import ConfigError


class Inner(Frozen):
    """Of the inner section.

    Not told.
    """

    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """How fast,
    in steps."""


class Base(Frozen):
    names: tuple[str, ...] = ()
    """Inherited."""


class Outer(Base):
    inner: Inner = Inner()
    kind: Literal["a", "b"] = "a"
    """Which."""
    flag: bool
    table: dict[str, int] = Field(default_factory=dict)
    """Counts."""


def test_settings_have_their_values_default_and_docstring_and_stand_in_front_of_sections():
    assert list(settings(Outer)) == [
        Setting(path="names", values="list of str", default="[]", text="Inherited."),
        Setting(path="kind", values="a or b", default="a", text="Which."),
        Setting(path="flag", values="bool", default="required", text=""),
        Setting(path="table", values="map of str to int", default="{}", text="Counts."),
        Setting(path="inner", values="section", default="", text="Of the inner section."),
        Setting(path="inner.rate", values="float > 0 <= 1 or null", default="null", text="How fast, in steps."),
    ]


def test_every_setting_of_a_recipe_has_a_sentence():
    assert [setting.path for setting in settings() if not setting.text.endswith((".", ")"))] == []


def test_the_page_of_the_documentation_is_that_of_the_schema():
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == as_markdown(), "python -m pipeline.config.reference > docs/configuration.md"


def test_a_setting_is_found_by_its_path_its_section_and_its_last_word(capsys):
    assert [s.path for s in explained("alignment.kl.coefficient")] == ["alignment.kl.coefficient"]
    assert [s.path for s in explained("sft.lora")][:2] == ["sft.lora", "sft.lora.rank"]
    assert {s.path for s in explained("target_margin")} == {"alignment.direct.target_margin"}
    vrm_command(["explain", "alignment.ppo.lcb_coefficient"])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "alignment.ppo.lcb_coefficient = 1    float >= 0"
    assert "standard deviations of the reward" in " ".join(rest)


def test_an_unknown_setting_is_refused_with_those_that_are_near():
    with pytest.raises(ConfigError, match=r"no setting is called 'kl\.coef'; near it: .*alignment\.kl\.coefficient"):
        explained("kl.coef")
