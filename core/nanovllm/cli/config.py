"""`nanovllm config show | check | schema`: what is configured, from where, and what could be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import EngineCommand, engine_options

if TYPE_CHECKING:
    from ..config import Loaded


_SECRET_NAMES = ("api_key", "key", "password", "secret", "token")  # which no option of ours has


@click.group()
def config() -> None:
    """Show, check and describe the configuration."""


@config.command(cls=EngineCommand)
@engine_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show(loaded: Loaded, as_json: bool) -> None:
    """Print each value with its origin. The output is itself a configuration file."""
    values = list(_flat(loaded))
    if as_json:
        rows = {key: {"value": value, "origin": origin} for key, value, origin in values}
        click.echo(json.dumps({"values": rows, "notes": loaded.notes}, indent=2, ensure_ascii=False))
        return
    lines = [(f"{key}: {json.dumps(value, ensure_ascii=False)}", origin) for key, value, origin in values]
    width = max(len(line) for line, _ in lines)
    for line, origin in lines:
        click.echo(f"{line:<{width}}  # {origin}")
    for note in loaded.notes:
        click.echo(f"# {note}")


def _flat(loaded: Loaded) -> list[tuple[str, Any, str]]:
    """(dotted key, value, origin) of everything; a plugin's own keys only where they were given."""
    from ..config import leaves

    return [(key, _shown(key, value), loaded.origins.get(key, "default")) for key, value in leaves(loaded.config)]


def _shown(key: str, value: Any) -> Any:
    """Without what looks like a secret; the options of a plugin are not checked here, so it may be in a wrong place."""
    from ..errors import without_secrets

    if isinstance(value, list):
        return [_shown(key, item) for item in value]
    if not isinstance(value, str):
        return value
    name = key.rpartition(".")[2]
    is_secret = name in _SECRET_NAMES or (name.endswith("_env") and not value.isidentifier())
    return "***" if is_secret else without_secrets(value)


@config.command()
@click.argument("file", type=click.Path(path_type=Path))
def check(file: Path) -> None:
    """Check FILE and its profiles, with the options of the plugins that they name; no model is loaded."""
    from .. import components
    from ..config import load
    from ..plugins import resolve_model

    whole = load(file, environ={})
    notes: dict[str, None] = {}  # each once
    for loaded in (whole, *(load(file, environ={}, overrides={"profile": name}) for name in whole.profiles)):
        _, path = resolve_model(loaded.config.model)
        components.choose(loaded, path)
        notes |= dict.fromkeys(loaded.notes)
    for note in notes:
        click.echo(f"note: {note}")
    click.echo(f"{file}: ok")


@config.command()
@click.option("--markdown", is_flag=True, help="Tables for people, of what needs no plugin.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of a configuration file, for editors."""
    from .. import schema as described

    if markdown:
        click.echo(described.markdown(), nl=False)
    else:
        click.echo(json.dumps(described.json_schema(), indent=2))
