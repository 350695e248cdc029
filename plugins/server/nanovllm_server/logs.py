"""Logs: one JSON object a line, and one line per call with its request id. Never a key, a header or a query string,
and no prompt unless the configuration asks for it. Knows no route.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .call import REQUEST_ID
from .keys import OWNER
from .notes import call_facts

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .metrics import Metrics

log = logging.getLogger("nanovllm.server.calls")

_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")  # what a client may name its request
_MAX_PATH = 200  # characters


class Calls:
    """The outermost ASGI app: names each call, logs it when it is over, and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else uuid4().hex
        scope[REQUEST_ID] = request_id
        facts: dict[str, Any] = {"request_id": request_id}
        started, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        before = call_facts.set(facts)
        try:
            await self.app(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - started
            route = facts.get("route")
            self.metrics.count_call(route, status, facts.get("error"))
            facts |= {
                "method": scope["method"],
                "path": scope["path"][:_MAX_PATH],
                "status": status,  # 0: it ended before there was one
                "seconds": round(seconds, 4),
                "key": scope.get(OWNER, ""),
            }
            quiet = route in ("/livez", "/readyz", "/metrics") and status == 200
            log.log(logging.DEBUG if quiet else logging.INFO, "call")
            call_facts.reset(before)


class JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        facts = call_facts.get()
        if facts is not None:
            line |= facts if record.name == log.name else {"request_id": facts["request_id"]}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """For people; one line per record but for tracebacks."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        facts = call_facts.get()
        if facts is None:
            return text
        shown = facts if record.name == log.name else {"request_id": facts["request_id"]}
        return text + "".join(f" {key}={json.dumps(value, default=str)}" for key, value in shown.items())


def configure(log_format: str) -> None:
    """The process's log, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its own words about starting and stopping
    logging.captureWarnings(True)
