"""`examine`: the `server:` section for `nanovllm doctor`: who would be let in, by what, before anything is served."""

from __future__ import annotations

import os
import ssl
import stat
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path

from nanovllm.doctor import Case, Finding

from .bind import bind
from .environment import load_arguments
from .keys import Keys, load_keys
from .options import ServerOptions, server_options

LIBRARIES = ("fastapi", "starlette", "uvicorn", "h11")


def examine(case: Case) -> Iterator[Finding]:
    """Raises ConfigError for what `serve` would refuse."""
    for name in LIBRARIES:
        import_module(name)
    yield Finding("ok", f"imported: {', '.join(f'{name} {metadata.version(name)}' for name in LIBRARIES)}")
    if case.loaded is None:
        return
    options = server_options(case.loaded, {})
    keys = load_keys(options.api_key_file, load_arguments()["environ"])
    yield from _door(options, keys)
    if options.tls_certificate is not None:
        yield _certificate(options.tls_certificate, options.tls_key)
    for name, file in (("api_key_file", options.api_key_file), ("tls_key", options.tls_key)):
        if file is None or not file.exists() or sys.platform == "win32":
            continue
        if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            yield Finding("warning", f"server.{name}: others on this machine can read {file}", f"chmod 600 {file}")


def _door(options: ServerOptions, keys: Keys) -> Iterator[Finding]:
    with bind(options.host, 0, keys):  # any port: the real one may be in use by the very server that is examined
        pass
    who = f"those with one of {len(keys)} API keys" if len(keys) else "this machine"
    yield Finding("ok", f"at {options.host} `serve` lets in {who}")
    if len(keys) and options.tls_certificate is None and options.host not in ("127.0.0.1", "::1", "localhost"):
        yield Finding(
            "note", "without TLS the keys cross the network as they are",
            "set server.tls_certificate, or put a proxy with TLS before it",
        )  # fmt: skip


def _certificate(certificate: Path, key: Path | None) -> Finding:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError) as e:
        return Finding(
            "error", f"server.tls_certificate {certificate} cannot be used: {e}", "name a certificate and its key"
        )
    return Finding("ok", f"{os.fspath(certificate)} and its key belong together")
