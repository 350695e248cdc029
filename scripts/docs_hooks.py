"""What the site needs beyond docs/: the files elsewhere in the repository that its pages link to.

A page of docs/ is written for readers on GitHub and on the site at once, so it links `../README.md` or `../core/x.py`.
Here such a file becomes part of the site, under repository/ and its own path, and so do those that it links to in turn.
mkdocs calls the two functions that begin with `on_`. It checks the links, whatever became of them here.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPO = Path(__file__).resolve().parents[1]
# Code is matched first, so that a link in it is not taken for one.
LINK = re.compile(r"^```.*?^```$|`[^`\n]+`|\]\((?P<target>[^)\s:#]+)(?P<anchor>#[^)\s]*)?\)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        for path in _linked((REPO / source).read_text(encoding="utf-8"), source):
            if path in seen or path.startswith("docs/") or not (REPO / path).is_file():
                continue
            seen.add(path)
            files.append(File.generated(config, f"repository/{path}", abs_src_path=str(REPO / path)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = _in_repository(page.file.src_uri)

    def here(path: str) -> str:
        return posixpath.relpath(_on_site(path), posixpath.dirname(page.file.src_uri) or ".")

    return _rewritten(markdown, source, here)


def _linked(markdown: str, source: str) -> Iterator[str]:
    """The paths, from the root of the repository, that a file links to."""
    found: list[str] = []
    _rewritten(markdown, source, lambda path: found.append(path) or path)
    yield from found


def _rewritten(markdown: str, source: str, place: Callable[[str], str]) -> str:
    """The text with `place(path)` for each relative link; paths are from the root of the repository."""
    folder = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        if match["target"] is None:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, match["target"]))
        if (REPO / path).is_dir():  # GitHub shows a directory, the site its README
            path = f"{path}/README.md"
        return f"]({place(path)}{match['anchor'] or ''})"

    return LINK.sub(link, markdown)


def _on_site(path: str) -> str:
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _in_repository(src_uri: str) -> str:
    path = PurePosixPath(src_uri)
    return path.relative_to("repository").as_posix() if path.parts[0] == "repository" else f"docs/{src_uri}"
