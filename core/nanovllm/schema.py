"""The configuration described for editors (JSON Schema) and for people (Markdown).

Both are generated from the pydantic models of config.py and of the installed plugins, so neither can be
out of date. This file loads no configuration.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from . import sources
from .components import options_model
from .config import COMMON_KEYS, Config
from .errors import PluginError
from .loader import Plugins
from .plugins import discover

Schema = dict[str, Any]


def json_schema(*, distributions: frozenset[str] | None = None) -> Schema:
    """The JSON Schema of a configuration file, with the sections of the installed plugins.

    `distributions` limits whose plugins are described. Of a plugin that cannot be loaded only the name is known.
    """
    schema = Config.model_json_schema()
    definitions = schema["$defs"]
    for section in sources.PLUGIN_SECTIONS:
        reference = schema["properties"][section]["$ref"].rpartition("/")[2]
        base = definitions.pop(reference)
        del base["properties"]["options"]
        offered = [f.name for f in discover(f"{section}s") if distributions is None or f.distribution in distributions]
        names = list(dict.fromkeys(offered))
        variants = []
        for name in names:
            options = _options(section, name)
            definitions |= {f"{section}.{name}.{key}": d for key, d in options.pop("$defs", {}).items()}
            variants.append(
                {
                    "title": f"{section}: {name}",
                    "properties": {**base["properties"], "type": {"const": name}, **options.get("properties", {})},
                    "required": ["type", *options.get("required", [])],
                    "additionalProperties": options.get("additionalProperties", False),
                }
            )
        # `type` is open: name@distribution, and plugins that are installed later.
        known = {"properties": {"type": {"enum": names}}, "required": ["type"]}
        schema["properties"][section] = {
            "description": base["description"],
            "default": base["properties"]["type"]["default"],
            "anyOf": [
                {"type": "string", "examples": names},
                {"type": "object", "properties": base["properties"], "if": known, "then": {"oneOf": variants}},
            ],
        }
    schema["properties"] |= {
        "profile": {
            "type": "string",
            "default": None,
            "description": "the profile to use, unless the environment or the call names another",
        },
        "profiles": {
            "type": "object",
            "default": {},
            "description": "of each name, keys that go over the rest of the file where that profile is chosen",
            "additionalProperties": {"$ref": "#"},
        },
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _options(section: str, name: str) -> Schema:
    """The JSON schema of one plugin's own keys."""
    try:
        model = options_model(Plugins().load(f"{section}s", name), section)
    except PluginError:
        return {"additionalProperties": True}
    return {} if model is None else model.model_json_schema(ref_template=f"#/$defs/{section}.{name}.{{model}}")


def markdown() -> str:
    """One table per section, for docs/configuration.md: what the core and its built-in plugins understand."""
    schema = json_schema(distributions=frozenset({"nanovllm"}))
    return "\n".join(_markdown(schema)) + "\n"


def _markdown(schema: Schema) -> Iterator[str]:
    properties = schema["properties"]
    sections = {k: schema["$defs"][p["$ref"].rpartition("/")[2]] for k, p in properties.items() if "$ref" in p}
    yield from table({k: p for k, p in properties.items() if k not in sections and k not in sources.PLUGIN_SECTIONS})
    for section in sources.PLUGIN_SECTIONS:
        plugin_section = properties[section]
        yield from ("", f"### `{section}`", "", plugin_section["description"], "")
        variants = plugin_section["anyOf"][1]["then"]["oneOf"]
        common = plugin_section["anyOf"][1]["properties"]
        yield from table(common)
        for variant in variants:
            own = {k: p for k, p in variant["properties"].items() if k not in COMMON_KEYS[section]}
            if own:
                yield from ("", f"Keys of `{variant['title']}`:", "")
                yield from table(own)
    for name, section in sections.items():
        yield from ("", f"### `{name}`", "", section["description"], "")
        yield from table(section["properties"])


def table(properties: dict[str, Schema]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key, p in properties.items():
        default = json.dumps(p["default"]) if "default" in p else "required"
        yield f"| `{key}` | {_type(p)} | `{default}` | {p.get('description', '')} |"


def _type(p: Schema) -> str:
    """'whole number, at least 1, or null'."""
    if "anyOf" in p:
        return ", or ".join(_type(option) for option in p["anyOf"])
    if "enum" in p:
        return " or ".join(f"`{v}`" for v in p["enum"])
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "array": "list"}
    kind: str = p["title"] if "pattern" in p else p.get("type", "mapping")  # a pattern is named by its title
    limits = (
        ("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"), ("exclusiveMaximum", "below"),
    )  # fmt: skip
    return ", ".join([words.get(kind, kind), *(f"{word} {p[name]}" for name, word in limits if name in p)])
