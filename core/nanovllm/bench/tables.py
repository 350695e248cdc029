"""A table as a value, printed for terminals and as Markdown. Knows nothing about what is in it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""  # a sentence below it
    num_text: int = 1  # columns of text, the first ones; the others hold numbers


def markdown(heading: str, tables: Iterable[Table]) -> str:
    parts = [_broken(heading)] if heading else []
    for table in tables:
        lines = [f"### {table.title}", "", _line(table.header), _rule(table)]
        parts.append(
            "\n".join([*lines, *map(_line, table.rows)]) + (f"\n\n{_broken(table.note)}" if table.note else "")
        )
    return "\n\n".join(parts) + "\n"


def terminal(heading: str, tables: Iterable[Table]) -> str:
    """Plain text without control sequences, as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table as Grid

    buffer = io.StringIO()
    console = Console(file=buffer, width=400, color_system=None, highlight=False, markup=False, emoji=False)
    if heading:
        console.print(heading, soft_wrap=True)
    for table in tables:
        grid = Grid(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for i, name in enumerate(table.header):
            grid.add_column(name, justify="left" if i < table.num_text else "right", no_wrap=True)
        for row in table.rows:
            grid.add_row(*row)
        console.print(f"\n{table.title}")
        console.print(grid)
        if table.note:
            console.print(table.note, soft_wrap=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _broken(text: str) -> str:
    """Markdown joins lines unless they end in two spaces."""
    return text.replace("\n", "  \n")


def _rule(table: Table) -> str:
    return "|---" * table.num_text + "|---:" * (len(table.header) - table.num_text) + "|"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
