"""Write the tables of docs/configuration.md anew from the schema (`nanovllm config schema --markdown`)."""

from __future__ import annotations

from pathlib import Path

from nanovllm.schema import markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
START, END = "<!-- generated -->\n", "<!-- end of generated -->"

if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + markdown() + END + rest.partition(END)[2], encoding="utf-8")
