"""What the documentation site does to its pages, for mkdocs."""

import re

OUTSIDE_LINK = re.compile(r"\[`?([^\]`]+)`?\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Shows links to files outside the pages as their names: the site has no copy of the sources."""
    return OUTSIDE_LINK.sub(r"`\1`", markdown)
