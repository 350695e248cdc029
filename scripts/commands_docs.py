"""Write docs/reference/commands.md anew: every command of this repository's distributions, with its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
from generated import DOCS, write

from nanovllm.cli import cli

PAGE = DOCS / "reference" / "commands.md"


def markdown() -> str:
    return "\n\n".join(section(cli, click.Context(cli, info_name="nanovllm"))) + "\n"


def section(command: click.Command, ctx: click.Context) -> Iterator[str]:
    yield f"## {ctx.command_path}"
    yield f"    {' '.join([ctx.command_path, *command.collect_usage_pieces(ctx)])}"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        # Behind a \b click keeps the lines as they are.
        yield paragraph if paragraph[0] != "\b" else re.sub("^", "    ", paragraph[2:], flags=re.MULTILINE)
    shown = [(o, o.get_help_record(ctx)) for o in command.get_params(ctx) if isinstance(o, click.Option)]
    rows = [row(*record) for o, record in shown if record is not None and "--help" not in o.opts]
    if rows:
        yield "\n".join(["| option | | |", "|---|---|---|", *rows])
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            inner = command.get_command(ctx, name)
            if inner is not None:
                yield from section(inner, click.Context(inner, parent=ctx, info_name=name))


def row(spelling: str, about: str) -> str:
    """`about` is the help, and in brackets behind it what click knows: the default, bounds, whether it is required."""
    text, _, known = about.partition("  [")
    cells = (f"`{spelling}`", text, known.rstrip("]").replace("]  [", "; "))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    write(PAGE, markdown())
