"""`nanovllm plugins new KIND NAME`: the package of a new plugin, ready to install."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("kind", type=click.Choice(["runner", "tokenizer", "sampler", "family"]))
@click.argument("name")
@click.option("--directory", type=click.Path(path_type=Path), help="Where to write it.  [default: ./nanovllm-NAME]")
@click.option("--example", is_flag=True, help="With a small working body for the one method.")
def new(kind: str, name: str, directory: Path | None, example: bool) -> None:
    """Write an installable package for a new plugin.

    One method is left to write; `nanovllm plugins test` then says whether it is right.
    """
    from ..scaffold import write_package

    written = write_package(kind, name, directory, example)
    click.echo(f"wrote {written.directory}")
    if not example:
        click.echo(f"write {written.method} in {written.file}, then:")
    click.echo(f"  cd {written.directory}")
    click.echo("  pip install -e '.[test]'")
    click.echo(f"  nanovllm plugins test {written.tested}")
