"""The documentation site builds strictly, its links hold, and it asks nothing of other machines."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
LOADED = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}
"""Element -> the attribute whose file a browser loads with the page."""
OUTSIDE_LINK = re.compile(r"\]\((\.\./[^)#]+)")


class Page(HTMLParser):
    """The links, the anchors and the loaded files of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        # <link rel="canonical"> and its kind name a page and load nothing.
        if tag in LOADED and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values.get(LOADED[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages: path -> Page."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    built = subprocess.run(
        [*command, "--site-dir", str(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    # Strict: a missing page, a missing anchor, a page outside the navigation or a broken docstring ends it with 1.
    assert built.returncode == 0, built.stderr
    return {path: Page(path.read_text()) for path in directory.rglob("*.html")}


def test_every_page_of_the_sources_is_built_and_found_by_the_search(site):
    built = {path.stem for path in site}
    assert {path.stem for path in DOCS.glob("*.md")} <= built
    [root] = [path.parent for path in site if path.name == "404.html"]
    index = json.loads((root / "search" / "search_index.json").read_text())
    # A stemmer would hide "preempted", typed in full; words are cut at dots, or no setting is found by its last part.
    assert "stemmer" not in index["config"]["pipeline"]
    assert "lcb_coefficient" in re.split(index["config"]["separator"], " ".join(page["text"] for page in index["docs"]))


def test_links_between_pages_and_their_anchors_exist(site):
    broken = []
    for path, page in site.items():
        for link in page.links if path.name != "404.html" else ():  # its links are those of the site's root
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (parts.fragment and target in site and not has_anchor(site[target], parts)):
                broken.append((path.name, link))
    assert broken == []


def has_anchor(page, parts):
    return unquote(parts.fragment) in page.anchors


def test_links_to_the_outside_are_well_formed(site):
    """Nobody asks whether they answer: tests use no network."""
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "http", "mailto"), (path.name, link)
                assert parts.scheme == "mailto" or "." in parts.netloc or "127.0.0.1" in parts.netloc, (path.name, link)


def test_a_page_loads_no_file_from_another_machine(site):
    loaded = [link for page in site.values() for link in page.loaded]
    assert len(loaded) > len(site)
    assert [link for link in loaded if urlsplit(link).netloc] == []


def test_links_from_the_pages_to_the_sources_exist():
    """On the site they are names alone; in the repository they are links."""
    for page in sorted(DOCS.glob("*.md")):
        for link in OUTSIDE_LINK.findall(page.read_text()):
            assert (DOCS / link).exists(), f"{page.name}: {link}"


def test_links_of_the_readme_exist():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 700
