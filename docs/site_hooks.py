"""What the documentation site does to its pages, for mkdocs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

OUTSIDE_LINK = re.compile(r"\[`?([^\]`]+)`?\]\(\.\./[^)]*\)")

SEARCHED_LAST = {"LOG.md": 0.2, "configuration.md": 0.6}
"""Long pages with every word in them, and the weight of what the search finds there."""


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Shows links to files outside the pages as their names: the site has no copy of the sources."""
    if weight := SEARCHED_LAST.get(page.file.src_uri):
        page.meta["search"] = {"boost": weight}
    return OUTSIDE_LINK.sub(r"`\1`", markdown)
