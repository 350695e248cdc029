"""Write the tables of docs/server/api.md anew from the server's OpenAPI document (`GET /openapi.json`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from generated import DOCS, write

from nanovllm_server.app import ROUTES
from nanovllm_server.openapi import document

PAGE = DOCS / "server" / "api.md"
NULL = {"type": "null"}


def markdown() -> str:
    """A section for each route: what it takes, what it answers."""
    api = document("", [operation for module in ROUTES for operation in module.OPERATIONS])
    schemas = api["components"]["schemas"]
    out = []
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            key = "" if "security" in operation else " Asks for no API key."
            out.append(f"### {method.upper()} {path}\n\n{operation['summary']}.{key}\n")
            if "requestBody" in operation:
                body = operation["requestBody"]["content"]["application/json"]["schema"]
                out.append("| field | type | default | |\n|---|---|---|---|")
                out += [
                    f"| `{name}` | {kind} | {default} | {about} |"
                    for name, kind, default, about in fields(body, schemas)
                ]
                out.append("")
            answers = operation["responses"]["200"]["content"]
            by_schema: dict[str, list[str]] = {}
            for content_type, content in answers.items():
                word = (
                    "each event of `text/event-stream`" if content_type == "text/event-stream" else f"`{content_type}`"
                )
                by_schema.setdefault(json.dumps(content["schema"]), []).append(word)
            for schema, words in by_schema.items():
                rows = [f"| `{name}` | {kind} |" for name, kind, _, _ in fields(json.loads(schema), schemas)]
                out.append(f"Answer, {' and '.join(words)}{':' if rows else '.'}\n")
                out += ["| field | type |\n|---|---|", *rows, ""] if rows else []
            others = [status for status in operation["responses"] if status != "200"]
            out.append(f"Other statuses: {', '.join(others)}.\n" if others else "")
    return "\n".join(out).rstrip("\n") + "\n"


def fields(schema: Any, schemas: Any, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(path, type, default, description) of every field, those of inner objects behind their own."""
    schema = resolved(schema, schemas)
    for name, field in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        options = [option for option in field.get("anyOf", [field]) if option != NULL]
        default = "" if required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        # A body's field may always be null, if it may be left out.
        shown = kind(field if required or "default" not in field else {"anyOf": options}, schemas)
        yield prefix + name, shown, "required" if required else default, field.get("description", "")
        for option in flat(options):
            inner, suffix = (option.get("items"), "[].") if option.get("type") == "array" else (option, ".")
            if inner is not None and "$ref" in json.dumps(inner):
                yield from fields(inner, schemas, prefix + name + suffix)


def flat(options: list[Any]) -> Iterator[Any]:
    for option in options:
        yield from flat(option["anyOf"]) if "anyOf" in option else [option]


def resolved(schema: Any, schemas: Any) -> Any:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def kind(schema: Any, schemas: Any) -> str:
    """A type in words, with its bounds."""
    schema = resolved(schema, schemas)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(option, schemas) for option in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "array":
            most = f"at most {schema['maxItems']} " if "maxItems" in schema else ""
            return f"{most}[{kind(schema['items'], schemas)}]"
        case "object" if "properties" not in schema:
            values = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), {})
            most = f", at most {schema['maxProperties']}" if "maxProperties" in schema else ""
            return f"object of {kind(values, schemas)}{most}"
        case name:
            bounds = [
                f"{sign} {schema[key]}"
                for key, sign in (
                    ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"),
                    ("minLength", "length ≥"), ("maxLength", "length ≤"),
                )
                if key in schema
            ]  # fmt: skip
            return " ".join([name or "any", *([f"({', '.join(bounds)})"] if bounds else [])])


if __name__ == "__main__":
    write(PAGE, markdown())
