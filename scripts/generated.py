"""The generated part of a page, between two marks: a script writes it, and a test compares it with the page."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
START, END = "<!-- generated -->\n", "<!-- end of generated -->"


def part(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


def write(page: Path, text: str) -> None:
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    page.write_text(before + START + text + END + rest.partition(END)[2], encoding="utf-8")
