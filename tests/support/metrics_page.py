"""The keys that docs/metrics.md explains."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "metrics.md"
OF_A_ROW = {"stage", "step", "time"}
"""What a row of metrics.jsonl has beside its metrics."""
END = re.compile("_(low|high)$|/(low|high)$")
"""An end of an interval, which the page explains once for all."""
PLACEHOLDER = re.compile("[A-Z]+")


def documented_keys() -> list[str]:
    """Those in the first column of a table; a part in CAPITALS stands for any name."""
    first_cells = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    in_prose = re.findall(r"`(alarm/NAME|vrm/[A-Za-z_]+)`", PAGE.read_text())
    return [key for cell in first_cells for key in re.findall("`([^`]+)`", cell)] + in_prose


def undocumented(keys: Iterable[str]) -> list[str]:
    """The keys that the page does not explain.

    A key may contain "{}" for a part that only the running code knows: then the page must have one such key.
    """
    known = documented_keys()
    patterns = [re.compile(PLACEHOLDER.sub(".+", re.escape(key))) for key in known]

    def is_known(key: str) -> bool:
        if "{}" in key:
            return any(re.fullmatch(re.escape(key).replace(r"\{\}", ".+"), page_key) for page_key in known)
        # The page may name a key alone, or its ends alone.
        forms = (key, END.sub("", key), f"{key}_low")
        return any(pattern.fullmatch(form) for form in forms for pattern in patterns)

    return sorted(key for key in {*keys} - OF_A_ROW if not is_known(key))
