"""`nanovllm plugins list | show NAME`: what is installed. Listing imports nothing; showing imports the one named."""

from __future__ import annotations

import json
from typing import Any

import click

from .conformance import test
from .new import new


@click.group()
def plugins() -> None:
    """List, show, write and test plugins."""


plugins.add_command(new)
plugins.add_command(test)


@plugins.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_(as_json: bool) -> None:
    """List what is installed, from package metadata."""
    from ..plugins import KINDS, discover

    found = discover()
    if as_json:
        rows = [
            {
                "kind": KINDS[f.group],
                "name": f.name,
                "distribution": f.distribution,
                "version": f.version,
                "value": f.value,
            }
            for f in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    table = [("KIND", "NAME", "FROM"), *((KINDS[f.group], f.name, f"{f.distribution} {f.version}") for f in found)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@plugins.command()
@click.argument("name")
def show(name: str) -> None:
    """Import the plugins called NAME and print what they offer. NAME may be `name@distribution`."""
    from ..errors import PluginError
    from ..plugins import discover

    bare, _, distribution = name.partition("@")
    named = [f for f in discover() if f.name == bare and distribution in ("", f.distribution)]
    if not named:
        names = ", ".join(sorted({f.name for f in discover()}))
        raise PluginError(f"no plugin named '{name}' is installed (have: {names})", hint="see: nanovllm plugins list")
    broken = 0
    for found in named:
        click.echo(f"{found}  ({found.value}, version {found.version})")
        try:
            for line in _describe(found):
                click.echo(f"  {line}")
        except PluginError as e:
            broken += 1
            click.echo(f"  error: {e}")
    if broken:
        raise PluginError(f"{broken} of {len(named)} plugins named '{name}' cannot be used")


def _describe(found: Any) -> list[str]:
    from ..components import options_model
    from ..loader import Plugins, load_object
    from ..plugins import package_directory
    from ..sources import PLUGIN_SECTIONS

    name = f"{found.name}@{found.distribution}"
    if found.group == "checkpoints":
        return [f"directory: {package_directory(found)}"]
    if found.group == "conformance":
        from ..testing import suite_for

        return [f"object: {suite_for(found.name)!r}"]
    if found.group not in ("runners", "tokenizers", "samplers", "observers"):
        return [f"object: {load_object(found)!r}"]
    plugin = Plugins().load(found.group, name)
    lines = [f"plugin API: {plugin.plugin.api_version}", f"hooks: {', '.join(plugin.hooks)}"]
    section = found.group.removesuffix("s")
    if section in PLUGIN_SECTIONS and (model := options_model(plugin, section)) is not None:
        lines += [
            f"{section}.{key}: {field.description or ''} (default {field.get_default(call_default_factory=True)!r})"
            for key, field in model.model_fields.items()
        ]
    return lines
