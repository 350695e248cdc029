"""The documentation as a site: built strictly, whole, the same as on GitHub, and with nothing from another host."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from markdown_it import MarkdownIt

import nanovllm
from browser_support import chromium, needs_browser
from support import REPO

DOCS = REPO / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("**/*.md"))
# What a browser fetches for a page by itself, and not because somebody clicks.
FETCHED = {
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("video", "src"),
    ("object", "data"),
}
OUTLINE = "h1 h2 h3 h4 h5 ul ol li table tr th td pre blockquote img em strong s del".split()


def build(repository: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As `make docs` does."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=repository, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip


class Html(HTMLParser):
    """What a page holds: anchors, links, what it fetches, and the outline of its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.outline: Counter[str] = Counter()
        self._in_text = "<article" not in text  # the site's pages have a frame around the text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        self._in_text |= tag == "article"
        if self._in_text and tag in OUTLINE:
            self.outline["del" if tag == "s" else tag] += 1
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        # rel=canonical, next and prev name pages; every other <link> is loaded, or a connection is made for it.
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values["href"])
        self.fetched += [values[name] for element, name in FETCHED if element == tag and name in values]

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._in_text = False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = build(REPO, out)
    # Strict: a warning ends the build. Whatever else is printed, by a theme or a plugin, is one as well.
    others = [line for line in built.stdout.splitlines() if not line.startswith("INFO ")]
    assert (built.returncode, others) == (0, []), built.stdout
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    return {path.relative_to(site).as_posix(): Html(path.read_text("utf-8")) for path in site.glob("**/*.html")}


def test_every_page_is_built_and_in_the_navigation(pages: dict[str, Html]) -> None:
    html = {page.removesuffix(".md") + ".html" for page in PAGES}
    assert html <= pages.keys()
    linked = {urldefrag(link).url for link in pages["index.html"].links}
    assert html - linked - {"index.html"} == set()


def test_every_public_name_is_in_the_reference(pages: dict[str, Html]) -> None:
    assert {name.lower() for name in nanovllm.__all__} - {"__version__"} <= pages["reference/python.html"].ids


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[str, Html]) -> None:
    checked = 0
    for name, page in pages.items():
        for link in (*page.links, *page.fetched):
            # The page for what is not found is shown at any address, so its links begin at the root.
            target, anchor = urldefrag(urljoin(f"http://site/{name}", link))
            if urlsplit(target).netloc != "site":
                continue
            path = unquote(urlsplit(target).path).lstrip("/") or "index.html"
            assert (site / path).is_file(), f"{name} links to {link}"
            if anchor:
                assert unquote(anchor) in pages[path].ids, f"{name} links to {link}, which has no such anchor"
            checked += 1
    assert checked > 1000


def test_nothing_comes_from_another_host(site: Path, pages: dict[str, Html]) -> None:
    assert {(name, url) for name, page in pages.items() for url in page.fetched if urlsplit(url).netloc} == set()
    for sheet in site.glob("**/*.css"):
        imported = re.findall(r"(?:url\(\s*|@import\s+)[\"']?([^\"')\s]+)", sheet.read_text("utf-8"))
        assert [url for url in imported if urlsplit(url).netloc] == [], sheet.name
    for picture in site.glob("**/*.svg"):
        hrefs = re.findall(r"(?:href|src)=[\"']([^\"']+)|url\(([^)]+)\)|@import", picture.read_text("utf-8"))
        assert [url for pair in hrefs for url in pair if urlsplit(url).netloc] == [], picture.name


def test_the_search_index_holds_every_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    found = {urldefrag(entry["location"]).url for entry in index["docs"]}
    assert {page.removesuffix(".md") + ".html" for page in PAGES} - found - {"index.html"} == set()


def github(text: str) -> Html:
    """CommonMark with GitHub's tables and strikethrough."""
    return Html(MarkdownIt("gfm-like", {"linkify": False}).render(text))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_same_outline_as_on_github(page: str, pages: dict[str, Html]) -> None:
    """Lists without a blank line before them, or with the wrong indentation, are where the two Markdowns differ."""
    there = github((DOCS / page).read_text("utf-8")).outline
    assert there["h1"] == 1
    assert pages[page.removesuffix(".md") + ".html"].outline == there


def test_the_outlines_are_compared_indeed() -> None:
    assert github("text\n- one\n- two\n").outline == {"ul": 1, "li": 2}
    assert Html("<li>menu<article><h1>x</h1><s>y</s></article><li>more").outline == {"h1": 1, "del": 1}


def test_a_mistake_fails_the_build_and_is_named(tmp_path: Path) -> None:
    for name in ("docs", "scripts", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "mkdocs.yml"):
        (shutil.copytree if (REPO / name).is_dir() else shutil.copy)(REPO / name, tmp_path / name)
    lost = "# Lost\n\n[page](nowhere.md) [anchor](quickstart.md#nowhere) [file](../nowhere.py) [self](#nowhere)\n"
    (tmp_path / "docs" / "lost.md").write_text(lost, encoding="utf-8")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    for complaint in (
        r'not included in the "nav" configuration:\s+- lost\.md',
        r"'lost\.md' contains a link 'nowhere\.md'",
        r"'lost\.md' contains a link 'quickstart\.md#nowhere'",
        r"'lost\.md' contains a link '\S*repository/nowhere\.py'",
        r"'lost\.md' contains a link '#nowhere'",
    ):
        assert re.search(complaint, built.stdout), f"{complaint}\n{built.stdout}"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@needs_browser
def test_search_works_in_a_browser_and_no_other_host_is_asked(address: str, tmp_path: Path) -> None:
    with chromium(tmp_path) as browser:
        browser.open(address + "index.html")
        browser.js("document.querySelector('#__search').click()")
        browser.find("input[name=query]").send_keys("prefix caching")
        links = browser.wait(
            lambda: browser.js("return [...document.querySelectorAll('.md-search-result__link')].map(a => a.href)")
        )
        assert all(link.startswith(address) for link in links)
        browser.open(links[0])
        assert "prefix" in browser.text("article").lower()
        fetched = browser.js("return performance.getEntries().map(e => e.name).filter(n => /^\\w+:/.test(n))")
        assert len(fetched) > 3
        assert [url for url in fetched if not url.startswith((address, "data:", "blob:"))] == []
        assert browser.complaints() == []
