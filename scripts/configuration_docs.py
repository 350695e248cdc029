"""Write what the schema says anew: the tables of docs/configuration.md, and that of the server's options."""

from __future__ import annotations

from pathlib import Path

from nanovllm.schema import markdown, table
from nanovllm_server.options import ServerOptions

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, START, END = DOCS / "configuration.md", "<!-- generated -->\n", "<!-- end of generated -->"
SERVER, OPTIONS = DOCS / "server" / "operations.md", "## Options\n\n"  # its table ends the page

if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + START + markdown() + END + rest.partition(END)[2], encoding="utf-8")
    before = SERVER.read_text(encoding="utf-8").partition(OPTIONS)[0]
    rows = table(ServerOptions.model_json_schema()["properties"])
    SERVER.write_text(before + OPTIONS + "\n".join(rows) + "\n", encoding="utf-8")
