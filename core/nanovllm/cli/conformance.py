"""`nanovllm plugins test NAME`: the conformance suites against an installed plugin, as a table by level.

Everything of the plugin runs in child processes with a bound in time. This file knows no suite.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .terminal import echo, printable

if TYPE_CHECKING:
    from ..config import Loaded
    from ..plugins import Found
    from ..testing.run import Result

_KINDS = {"runner": "runners", "tokenizer": "tokenizers", "sampler": "samplers", "family": "models"}


@click.command()
@click.argument("name")
@click.option("--kind", type=click.Choice(list(_KINDS)), help="Only what NAME is of this kind.  [default: all]")
@click.option("-c", "--config", "config_file", type=click.Path(path_type=Path), help="YAML configuration file.")
@click.option("-m", "--model", help="Model directory, file or name; for a family, a small config.json.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any configuration value.")
@click.option("--timeout", type=click.FloatRange(min=1), default=900, show_default=True, help="Seconds for one suite.")
@click.option("-v", "--verbose", is_flag=True, help="Show every test, and pytest's account of each failure.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def test(
    name: str, kind: str | None, config_file: Path | None, model: str | None, sets: tuple[str, ...],
    timeout: float, verbose: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run the conformance tests against the installed plugins called NAME, which may be `name@distribution`."""
    from dataclasses import asdict

    from ..errors import NanoVLLMError
    from ..testing import suite_for
    from ..testing.fresh import fresh
    from ..testing.run import run_in_child

    documents, failed = [], False
    for found in _chosen(name, kind):
        if found.group == "models":
            config = _family_config(found, model, sets)
        else:
            config = _plugin_config(found, name, config_file, model, sets)
        seen = fresh(found.group, config, suite_for(found.group).startup_seconds)
        if seen.problem is not None and seen.exit_code is not None:
            refusal = NanoVLLMError(f"{found}: {seen.problem}")
            refusal.exit_code = seen.exit_code
            raise refusal
        results = run_in_child(found.group, config, seen, timeout)
        failed |= any(r.outcome == "failed" for r in results)
        documents.append(
            {
                "kind": next(word for word, group in _KINDS.items() if group == found.group),
                "name": found.name,
                "distribution": found.distribution,
                "version": found.version,
                "api_version": seen.api_version,
                "config": config,
                "results": [asdict(result) for result in results],
            }
        )
        if not as_json:
            _show(documents[-1], results, verbose)
    if as_json:
        click.echo(json.dumps(documents, indent=2))
    if failed:
        click.get_current_context().exit(1)


def _chosen(name: str, kind: str | None) -> list[Found]:
    """What is called that, of that kind or of each. Raises PluginError."""
    from ..errors import PluginError
    from ..plugins import discover, find, normal_name

    groups = list(_KINDS.values()) if kind is None else [_KINDS[kind]]
    bare, _, distribution = name.partition("@")
    named = [f for group in groups for f in discover(group) if f.name == bare]
    offers = {f.group for f in named if not distribution or normal_name(f.distribution) == normal_name(distribution)}
    if not offers and kind is None:
        names = ", ".join(sorted({f.name for g in groups for f in discover(g)}))
        raise PluginError(
            f"no runner, tokenizer, sampler or model family named '{name}' is installed (have: {names})",
            hint="see: nanovllm plugins list",
        )
    return [find(group, name) for group in groups if group in offers or kind is not None]


def _plugin_config(
    found: Found, name: str, config_file: Path | None, model: str | None, sets: tuple[str, ...]
) -> dict[str, Any]:
    """What the user set, as the suite's fixture takes it: a runner's whole configuration, of others their section."""
    from ..config import load

    section = found.group.removesuffix("s")
    overrides = {section: name} | ({"model": model} if model is not None else {})
    loaded: Loaded = load(config_file, sets=sets, overrides=overrides, override_origin="command line")
    sections = None if section == "runner" else {section} if section == "sampler" else {section, "model"}
    return _given(loaded, sections)


def _given(loaded: Loaded, sections: set[str] | None) -> dict[str, Any]:
    """Dotted key -> value, of all that has not its default; `sections`: only of these."""
    from ..config import leaves

    return {
        key: value
        for key, value in leaves(loaded.config)
        if any(f"{key}.".startswith(f"{origin}.") for origin in loaded.origins)
        and (sections is None or key.partition(".")[0] in sections)
    }


def _family_config(found: Found, model: str | None, sets: tuple[str, ...]) -> dict[str, Any]:
    """The small config.json, with the keys that `--set` changes. Raises ConfigError, ModelError."""
    import yaml

    from ..errors import ConfigError, ModelError

    if model is None:
        raise ConfigError(
            "a model family is tested on a small config.json, of up to some million parameters",
            hint=f"try: nanovllm plugins test {found.name} --kind family --model config.json",
        )
    path = Path(model).expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{path} cannot be read: {e}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object")
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} has no '='", hint="write KEY=VALUE")
        try:
            config[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"the value of --set {text!r} cannot be read", hint="quote it") from None
    if config.setdefault("model_type", found.name) != found.name:
        raise ConfigError(f"{path} is of model_type {config['model_type']!r}, not {found.name!r}")
    return config


# ------------------------------------------------------------------------------------------------- the table


def _show(document: Mapping[str, Any], results: list[Result], verbose: bool) -> None:
    from ..testing.suite import LEVELS

    version = document["api_version"]
    written_for = "" if version is None else f", plugin API {version}"
    echo(f"{document['kind']} {document['name']} ({document['distribution']} {document['version']}{written_for})")
    echo(f"{'level':<14} {'passed':>6} {'failed':>6} {'skipped':>7}")
    for level in LEVELS:
        own = [r for r in results if r.level == level]
        counts = Counter("skipped" if r.outcome == "xfailed" else r.outcome for r in own)
        notes = "; ".join(note for r in own for note in r.notes)
        if own:
            row = f"{level:<14} {counts['passed']:>6} {counts['failed']:>6} {counts['skipped']:>7}   {notes}"
            echo(row.rstrip())
    for outcome in ("passed", "skipped", "xfailed", "failed"):
        for r in results:
            if r.outcome == outcome and (verbose or outcome != "passed"):
                echo(printable(f"{outcome:<7} {r.level:<13} {r.name}" + (f": {r.reason}" if r.reason else "")))
    if verbose:
        for r in results:
            if r.details:
                echo(f"\n{r.name}\n{r.details}")
    echo()
