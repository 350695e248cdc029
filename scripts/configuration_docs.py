"""Write what the schema says anew: the tables of docs/configuration.md, and that of the server's options."""

from __future__ import annotations

from generated import DOCS, write

from nanovllm.schema import markdown, table
from nanovllm_server.options import ServerOptions

PAGE = DOCS / "configuration.md"
SERVER, OPTIONS = DOCS / "server" / "operations.md", "## Options\n\n"  # its table ends the page

if __name__ == "__main__":
    write(PAGE, markdown())
    before = SERVER.read_text(encoding="utf-8").partition(OPTIONS)[0]
    rows = table(ServerOptions.model_json_schema()["properties"])
    SERVER.write_text(before + OPTIONS + "\n".join(rows) + "\n", encoding="utf-8")
