"""API keys: where they come from, and the gate that asks for one on every path that is not open by name.

Only hashes are kept, and every one of them is compared, in constant time. A line of a key file may go on with the
key's name and its own limits: `KEY name=acme requests_per_minute=60`. Knows no route.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.errors import ConfigError

from .errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

VARIABLE = "NANOVLLM_API_KEY"  # the environment's way to name one
MIN_CHARS = 16
MAX_KEYS = 10_000
OWNER = "nanovllm.owner"  # in the scope: which key, as a short name; "" where no keys are asked for
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NUMBER = re.compile(r"\d{1,12}(\.\d{1,6})?")


LIMITS = ("requests_per_minute", "tokens_per_minute", "answers_at_once")  # that a key may have of its own


@dataclass(frozen=True, slots=True)
class Key:
    secret: str = field(repr=False)
    name: str = ""  # "" = the beginning of its hash
    limits: Mapping[str, float] = field(default_factory=dict)  # of LIMITS, those that it has


class Keys:
    """Empty: nobody is asked for a key."""

    def __init__(self, keys: Iterable[str | Key] = ()) -> None:
        self._names: dict[bytes, str] = {}  # by hash
        self._limits: dict[str, Mapping[str, float]] = {}  # by name
        for given in keys:
            key = Key(given) if isinstance(given, str) else given
            digest = hashlib.sha256(key.secret.encode()).digest()
            self._names[digest] = key.name or digest.hex()[:16]
            self._limits[self._names[digest]] = key.limits

    def __len__(self) -> int:
        return len(self._names)

    def owner(self, authorization: bytes | None) -> str | None:
        """The name of the key in an Authorization header; None if it holds none of ours."""
        if not self._names:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        presented = hashlib.sha256(key.strip()).digest()
        found = None
        for known, name in self._names.items():  # all of them, whatever the first ones say
            if hmac.compare_digest(known, presented):
                found = name
        return found if scheme.lower() == b"bearer" else None

    def limits(self, owner: str) -> Mapping[str, float]:
        """Those of LIMITS that this key has of its own."""
        return self._limits.get(owner, {})


def cache_salt(owner: str, salt: str | None) -> str | None:
    """Nobody sees, not even by the clock, what others have asked; a client's own salt divides further."""
    return (owner or None) if salt is None else hashlib.sha256(f"{owner}\0{salt}".encode()).hexdigest()


def load_keys(file: Path | None, environment: Mapping[str, str]) -> Keys:
    """One key a line, `#` begins a remark; and the variable's. Raises ConfigError for a file that holds no keys."""
    found: list[Key] = []
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"the key file {file} cannot be read: {e}") from None
        for number, line in enumerate(lines, 1):
            if words := line.partition("#")[0].split():
                found.append(_key(words, f"{file}, line {number}"))
        if not 0 < len(found) <= MAX_KEYS:
            raise ConfigError(f"the key file {file} holds {len(found)} keys, not 1 to {MAX_KEYS}")
    if VARIABLE in environment:
        found.append(_key([environment[VARIABLE].strip()], VARIABLE))
    names = [key.name for key in found if key.name]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"the key file {file} has two keys with the name {twice}")
    return Keys(found)


def _key(words: list[str], where: str) -> Key:
    secret, *options = words
    if len(secret) < MIN_CHARS or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(
            f"{where}: a key has at least {MIN_CHARS} plain characters without spaces",
            hint="make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    name, limits = "", {}
    for option in options:
        key, _, value = option.partition("=")
        if key == "name" and _NAME.fullmatch(value):
            name = value
        elif key in LIMITS and _NUMBER.fullmatch(value) and float(value) > 0:
            limits[key] = float(value)
        else:  # not shown: it may be a part of a key
            raise ConfigError(f"{where}: behind a key may stand name=NAME, {'=N, '.join(LIMITS)}=N")
    return Key(secret, name, limits)


class Gate:
    """An ASGI app before another one: without a key of ours, nothing but the open paths is there."""

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str]) -> None:
        self.app = app
        self.keys = keys
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        owner = self.keys.owner(dict(scope["headers"]).get(b"authorization"))
        # The path as the server parsed it, to the letter: never a URL put together from headers.
        if owner is None and not (scope["type"] == "http" and scope["path"] in self.open_paths):
            if scope["type"] == "http":
                error = ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
                response = error.response()
                response.headers["www-authenticate"] = "Bearer"
                response.headers["connection"] = "close"  # the body of the request is not read
                await response(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        scope[OWNER] = owner or ""
        await self.app(scope, receive, send)
