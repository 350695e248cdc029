"""A Hugging Face hub in a thread: the two endpoints that `pull` uses, and the ways in which they fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
LFS_FROM = 1000  # bytes, from which a file is a large one


@dataclass
class FakeHub:
    """One repository. What it serves may be changed at any time."""

    repo: str
    files: dict[str, bytes]
    url: str = ""
    cut: dict[str, int] = field(default_factory=dict)  # name -> bytes after which the connection breaks, once
    goes_down: bool = False  # after the first break, until `is_down` is taken back
    refusal: tuple[int, str] | None = None  # status and X-Error-Code of the listing
    corrupt: set[str] = field(default_factory=set)  # names whose first byte is wrong
    ignores_range: bool = False
    hides_checksums: bool = False
    elsewhere: str | None = None  # host and port that large files are redirected to
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, Authorization
    is_down: bool = False

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data)}
            if not self.hides_checksums:
                sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                if len(data) >= LFS_FROM:
                    sibling["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            siblings.append(sibling)
        return {"id": self.repo, "sha": COMMIT, "siblings": siblings}


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((path, self.headers["Range"], self.headers["Authorization"]))
            if path == f"/api/models/{hub.repo}/revision/main":
                if hub.refusal:
                    return self.answer(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
                return self.answer(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})
            name = path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")
            if name not in hub.files:
                code = "RevisionNotFound" if path.startswith(f"/api/models/{hub.repo}/") else "RepoNotFound"
                return self.answer(404, b"{}", {"X-Error-Code": code})
            if hub.is_down:
                return self.answer(503, b"")
            if hub.elsewhere and len(hub.files[name]) >= LFS_FROM and self.headers["Host"] != hub.elsewhere:
                return self.answer(302, b"", {"Location": f"http://{hub.elsewhere}{self.path}"})
            return self.file(name)

        def file(self, name: str) -> None:
            data = hub.files[name]
            if name in hub.corrupt:
                data = bytes([data[0] ^ 1]) + data[1:]
            start = 0
            headers = {}
            if self.headers["Range"] and not hub.ignores_range:
                start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            cut = hub.cut.pop(name, None)
            self.answer(206 if headers else 200, data[start:], headers, cut)

        def answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:cut])
            if cut is not None and hub.goes_down:
                hub.is_down = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
