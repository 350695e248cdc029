"""The OpenAPI document, made of the models that check the requests. Knows no engine and no route's work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE = "#/components/schemas/{model}"


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every refusal and failure."""

    error: Error


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route, as the document describes it."""

    method: Literal["get", "post"]
    path: str
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None  # None: what `content_type` says
    event: type[BaseModel] | None = None  # of a stream, where the request may ask for one
    content_type: str = "application/json"
    statuses: Mapping[int, str] | None = None  # other answers with a meaning of their own
    is_open: bool = False  # no key is asked for


_REFUSALS = {
    400: "the request is wrong; `param` says where",
    401: "no valid API key",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not application/json",
    429: "more than this key may have now; see Retry-After",
    500: "the model failed to answer",
    503: "loading, draining, overloaded or dead; see Retry-After",
}


def document(version: str, operations: Iterable[Operation]) -> dict[str, Any]:
    operations = tuple(operations)
    bodies = [(o.body, "validation") for o in operations if o.body is not None]
    answers = [(model, "serialization") for o in operations for model in (o.answer, o.event) if model is not None]
    references, definitions = models_json_schema(
        [*dict.fromkeys(bodies), *dict.fromkeys(answers), (ErrorAnswer, "serialization")],  # type: ignore[list-item]
        ref_template=_REFERENCE,
    )
    paths: dict[str, dict[str, Any]] = {}
    for o in operations:
        refusals = dict(_REFUSALS)
        if o.body is None:
            refusals = {status: refusals[status] for status in (401, 429, 503)}
        if o.is_open:
            refusals = {}
        failed = {"application/json": {"schema": references[ErrorAnswer, "serialization"]}}
        fine = {o.content_type: {"schema": references[o.answer, "serialization"] if o.answer is not None else {}}}
        if o.event is not None:
            fine["text/event-stream"] = {"schema": references[o.event, "serialization"]}
        operation: dict[str, Any] = {
            "summary": o.summary,
            "responses": {
                "200": {"description": "OK", "content": fine},
                **{
                    str(status): {"description": text, "content": failed}
                    for status, text in sorted({**refusals, **(o.statuses or {})}.items())
                },
            },
        }
        if o.body is not None:
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": references[o.body, "validation"]}},
            }
        if "{" in o.path:
            name = o.path.partition("{")[2].partition("}")[0]
            operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
        if not o.is_open:
            operation["security"] = [{"key": []}]
        paths.setdefault(o.path, {})[o.method] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanovllm", "version": version},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
