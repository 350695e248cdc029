"""A request's body as one JSON object, within the server's caps and without JSON's traps. Knows no field."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from .errors import ApiError, ClientGone

if TYPE_CHECKING:
    from starlette.requests import Request

    from .options import ServerOptions

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json(request: Request, options: ServerOptions) -> dict[str, Any]:
    """Raises ApiError: 415, 413, 408, or 400 for what is no JSON object; ClientGone."""
    return loads(await read_body(request, options.max_body_bytes, options.body_seconds))


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """A body that says it is JSON, whole. Raises ApiError (415, 413, 408), ClientGone."""
    # A browser sends this type to another site only if that site lets it.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be application/json")
    too_large = ApiError(413, f"a body may have {max_bytes} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > max_bytes:
        raise too_large
    try:
        body = await asyncio.wait_for(_read(request, max_bytes), seconds)
    except ClientDisconnect:
        raise ClientGone from None
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s") from None
    if body is None:
        raise too_large
    return bytes(body)


async def _read(request: Request, max_bytes: int) -> bytearray | None:
    """None: it is larger."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            return None
    return body


def check_text(num_chars: int, options: ServerOptions) -> None:
    """A tokenizer's work is bounded before it begins. Raises ApiError."""
    if num_chars > options.max_text_chars:
        raise ApiError(400, f"the text has {num_chars} characters; at most {options.max_text_chars} are taken")


def loads(body: bytes) -> dict[str, Any]:
    """One JSON object: UTF-8, each key once, finite numbers, whole characters. Raises ApiError."""
    try:
        text = body.decode()  # json itself would take UTF-16, too
        data = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_each_key_once)
        if _SURROGATE.search(body):  # most are halves of a pair
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body contains a lone surrogate, which no text encoding can carry") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as e:  # no JSON, no UTF-8, or a number too long to read
        raise ApiError(400, f"the body is no JSON: {str(e)[:200]}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return found
