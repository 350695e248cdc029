"""Transport: one server, one pooled `requests.Session`; every failure is an UpstreamError.

Knows no dialect, no engine and no other server.
"""

from __future__ import annotations

import json
import logging
import os
import random
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import requests
import urllib3.exceptions as low_failures
from requests.structures import CaseInsensitiveDict

from nanovllm.errors import ConfigError

from .backoff import Backoff
from .call import Adapter, Call
from .errors import UpstreamError, one_line
from .failures import in_words, refusal
from .options import ConnectionOptions
from .watchdog import TIMEOUT, Watchdog

log = logging.getLogger("nanovllm.http")

HEADERS = {"Accept": "application/json, text/event-stream", "Accept-Encoding": "identity"}
MAX_JSON_BYTES = 16 << 20
MAX_ERROR_BYTES = 64 << 10  # of the body of an answer that reports a failure
MAX_CONNECTIONS = 1024  # kept open between calls
READ_BYTES = 64 << 10  # at most, of what has arrived
MAX_DRAIN_READS = 8  # for the rest of a stream whose last event has come
DRAIN_SECONDS = 0.5  # each


class Answer:
    """The response to an open stream."""

    def __init__(
        self, response: requests.Response, call: Call, fail: Callable[[Exception | None], UpstreamError]
    ) -> None:
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._raw = response.raw
        self._call = call
        self._fail = fail

    def read(self) -> bytes:
        """What has arrived, at least one byte; b"" at the end. Raises UpstreamError for a connection that breaks."""
        try:
            data: bytes = self._raw.read1(READ_BYTES, decode_content=False)
        except (low_failures.HTTPError, OSError) as e:
            raise self._fail(e) from e
        if not data and self._call.is_aborted:  # an end that we have made
            raise self._fail(None)
        return data


class Transport:
    def __init__(
        self,
        url: str,
        options: ConnectionOptions,
        *,
        pause: Callable[[Call, float], None] = Call.sleep,  # between attempts
        jitter: Callable[[], float] = random.random,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.url = url  # names the server in every message; a restarted server may get another one
        self.timeouts = options.timeouts
        self.backoff = Backoff(options.retries, jitter)
        self._pause = pause
        self._watchdog = Watchdog()
        self._current = threading.local()  # .call: what this thread is doing
        session = self._session = requests.Session()
        session.trust_env = False  # no proxies, certificates or passwords from the environment
        session.verify = _verify(options)
        self._key = _key(options, environment)
        session.headers = CaseInsensitiveDict(HEADERS)
        if self._key is not None:
            session.headers["Authorization"] = f"Bearer {self._key}"
        if options.proxy is not None:
            session.proxies = {"http": options.proxy, "https": options.proxy}
        if not options.verify and url.startswith("https"):
            log.warning("%s: certificates are not checked (verify: false)", url)
        for scheme in ("http://", "https://"):
            session.mount(scheme, Adapter(self._current, num_connections=MAX_CONNECTIONS, is_verifying=options.verify))

    # ------------------------------------------------------------------------------ whole answers

    def get(
        self,
        path: str,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> Any:
        """GET, and the JSON that came. Raises UpstreamError, also for any status but 200.

        `retries`: None = as configured, 0 = one attempt. `timeout`: seconds for an attempt, None = timeouts.read.
        """
        return self._retried("GET", path, None, Call(), retries, timeout, max_bytes)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        retries: int | None = None,
        timeout: float | None = None,
        call: Call | None = None,
        max_bytes: int = MAX_JSON_BYTES,
    ) -> Any:
        """POST JSON, and the JSON that came. Raises as `get` does. `retries=0` for what must not happen twice."""
        return self._retried("POST", path, body, call or Call(), retries, timeout, max_bytes)

    def _retried(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        call: Call,
        retries: int | None,
        timeout: float | None,
        max_bytes: int,
    ) -> Any:
        num_failed = 0
        while True:
            try:
                return self._once(method, path, body, call, timeout or self.timeouts.read, max_bytes)
            except UpstreamError as e:
                num_failed += 1
                delay = self.backoff.delay(num_failed, e) if retries is None or num_failed <= retries else None
                if delay is None or call.is_aborted:
                    raise
                log.info("%s; trying again in %.1f s", e, delay)
            self._pause(call, delay)

    def _once(
        self, method: str, path: str, body: Mapping[str, Any] | None, call: Call, timeout: float, max_bytes: int
    ) -> Any:
        """One attempt."""
        try:
            with self._watchdog.watching(call, timeout), self._open(method, path, body, call, timeout) as answer:
                data = _read_whole(answer, max_bytes, self.url)
        except UpstreamError:
            if call.why == TIMEOUT:
                raise UpstreamError(f"{self.url} did not answer {path} within {timeout:g} s") from None
            raise
        if not data:  # an answer that was cut in its headers looks like this, too
            raise UpstreamError(f"{self.url} broke off its answer to {path}: nothing came", can_retry=True)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as e:
            raise UpstreamError(
                f"{self.url} answered {path} with something that is not JSON: {one_line(e)}", status=200
            ) from None

    # ----------------------------------------------------------------------------------- streams

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any], call: Call) -> Iterator[Answer]:
        """POST JSON and read the answer as it comes. One attempt, with no timeout but that for connecting.

        Leaving it without an exception reads the little that may be left, so that the connection serves again.
        Raises UpstreamError.
        """
        with self._open("POST", path, body, call, None) as answer:
            yield answer

    @contextmanager
    def _open(
        self, method: str, path: str, body: Mapping[str, Any] | None, call: Call, timeout: float | None
    ) -> Iterator[Answer]:
        def refused() -> bytes:
            body = _read_whole(answer, MAX_ERROR_BYTES, self.url)
            # Some tell what key is wrong.
            return body if self._key is None else body.replace(self._key.encode(), b"***")

        def fail(e: Exception | None) -> UpstreamError:
            if e is None or call.is_aborted:
                return UpstreamError(f"{self.url}: the call of {path} was aborted")
            return in_words(e, self.url, path, self.timeouts.connect, timeout)

        if call.is_aborted:
            raise fail(None)
        self._current.call = call
        try:
            response = self._session.request(
                method,
                self.url + path,
                data=None if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode(),
                headers=None if body is None else {"Content-Type": "application/json"},
                timeout=(self.timeouts.connect, timeout),
                stream=True,
                allow_redirects=False,
            )
        except (requests.RequestException, low_failures.HTTPError, OSError) as e:
            raise fail(e) from e
        try:
            answer = Answer(response, call, fail)
            if answer.status != 200:
                raise refusal(answer.status, answer.headers, refused, self.url, path)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise UpstreamError(f"{self.url} compressed its answer to {path}, which was not asked for")
            yield answer
            _drain(response)
        finally:
            call.detach()
            response.close()

    def close(self) -> None:
        self._watchdog.close()
        self._session.close()


# ----------------------------------------------------------------------------------------- the session


def _verify(options: ConnectionOptions) -> bool | str:
    if options.ca_file is None:
        return options.verify
    try:
        ssl.create_default_context(cafile=options.ca_file)
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(f"ca_file {options.ca_file} cannot be used: {e.strerror or e}") from None
    return str(options.ca_file)


def _key(options: ConnectionOptions, environment: Mapping[str, str]) -> str | None:
    """The bearer token. Raises ConfigError."""
    if options.api_key_env is not None:
        where = f"the environment variable {options.api_key_env}"
        if options.api_key_env not in environment:
            raise ConfigError(f"{where} is not set, which api_key_env names", hint=f"export {options.api_key_env}=KEY")
        key = environment[options.api_key_env]
    elif options.api_key_file is not None:
        where = f"the file {options.api_key_file}"
        try:
            key = options.api_key_file.read_text("ascii")
        except OSError as e:
            raise ConfigError(f"{where} with the server's key cannot be read: {e.strerror or e}") from None
        except UnicodeDecodeError:
            key = ""
    else:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where} holds no key: it must be one word of plain ASCII characters")
    return key


# ------------------------------------------------------------------------------------------ the answer


def _read_whole(answer: Answer, limit: int, url: str) -> bytes:
    parts, size = [], 0
    while data := answer.read():
        parts.append(data)
        size += len(data)
        if size > limit:
            raise UpstreamError(f"{url} sent an answer of more than {limit} bytes")
    return b"".join(parts)


def _drain(response: requests.Response) -> None:
    """Read to the end of an answer that has said all: a connection goes back to its pool only then."""
    raw = response.raw
    if raw.connection is not None and raw.connection.sock is not None:
        raw.connection.sock.settimeout(DRAIN_SECONDS)
    with suppress(low_failures.HTTPError, OSError):  # one that breaks, or goes on, is closed
        for _ in range(MAX_DRAIN_READS):
            if not raw.read1(READ_BYTES, decode_content=False):
                return
