"""Servers: the transports to the servers of one model, and which of them takes the next stream.

The one with the fewest open streams; among equals, the one that a prompt's beginning is hashed to, so that prompts
that begin alike meet the same cache. Of several, one that cannot be reached is left out, and asked again, after a
back-off that grows, whether it still serves the same; a thread that wants a server does that, there is none for it
alone. A server of our own that has died is started again. This file never retries a stream and never shows a token.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from nanovllm.errors import ConfigError, NanoVLLMError, RunnerDead, RunnerError

from .dialects import Dialect, Facts
from .errors import UpstreamError
from .options import HttpOptions
from .probe import PATIENCE
from .process import ServerProcess, server_command
from .transport import Transport

log = logging.getLogger("nanovllm.http")

BACKOFFS = (1.0, 30.0)  # seconds that a server is left out: at first, doubled with every failure, and at most
PING_TIMEOUT = 2.0  # seconds
BUSY_OR_AWAY = (429, 502, 503, 504)  # the statuses that say something about the server and not about the request

Ask: TypeAlias = Callable[[Transport, float], tuple[Dialect, Facts]]


@dataclass(eq=False, slots=True)
class _Member:
    transport: Transport
    num_open: int = 0  # streams
    num_failed: int = 0  # times in a row that it was left out
    out_until: float | None = None  # by the clock; None = it takes streams
    is_asked: bool = False  # a thread finds out whether it is back
    cause: str = ""  # why it is left out


class Servers:
    """Thread-safe. The transports belong to it, and so does the process that serves the only one, if given."""

    def __init__(
        self,
        transports: Sequence[Transport],
        process: ServerProcess | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert process is None or len(transports) == 1, "we start one server"
        self.transports = tuple(transports)
        self._members = [_Member(transport) for transport in transports]
        self._process = process
        self._is_suspect = False  # did a stream of the process break since it was last looked at?
        self._clock = clock
        self._changed = threading.Condition()  # guards the members, and tells that one was asked
        self._ask: Ask | None = None
        self._facts: Facts | None = None

    def agree(self, ask: Ask) -> tuple[Dialect, Facts]:
        """What all servers can do; one that cannot be reached is left out and asked later.

        `ask`: what a server is, by waiting at most so many seconds for it to load.

        Raises ConfigError where two differ, UpstreamError where none can be reached or one cannot be used.
        """
        self._ask = ask
        found: list[tuple[Transport, Dialect, Facts]] = []
        for member in self._members:
            try:
                dialect, facts = ask(member.transport, PATIENCE)
            except UpstreamError as e:
                if not e.can_retry or len(self._members) == 1:
                    raise
                self._leave_out(member, e)
                continue
            if found and (difference := _difference(found[0][2], facts)):
                raise ConfigError(
                    f"{found[0][0].url} and {member.transport.url} do not serve the same: {difference}",
                    hint="list only servers of one model in runner.servers",
                )
            found.append((member.transport, dialect, facts))
        if not found:
            raise _none(self._members)
        all_facts = [facts for _, _, facts in found]
        self._facts = replace(
            all_facts[0],
            max_model_len=_least(facts.max_model_len for facts in all_facts),
            num_slots=_least(facts.num_slots for facts in all_facts),
            lacks=frozenset().union(*(facts.lacks for facts in all_facts)),
        )
        return found[0][1], self._facts

    def acquire(self, tried: Collection[Transport] = (), head: bytes = b"") -> Transport:
        """The server for a stream's next attempt, counted as busy until `release`; one not in `tried` if there is any.

        `head`: how the prompt begins. May block: for a moment while a server that was left out is asked, and as long
        as our own takes to start again. Raises UpstreamError if none can be reached, RunnerDead if ours died too often.
        """
        if self._process is not None:
            is_suspect, self._is_suspect = self._is_suspect, False
            try:
                self._process.revive(is_suspect=is_suspect)
            except RunnerDead:
                raise
            except RunnerError as e:
                raise UpstreamError(e.message, can_retry=True, hint=e.hint) from None
        self._ask_again(lambda member, now: member.out_until is not None and member.out_until <= now)
        member = self._take(tried, head)
        if member is None:  # then a back-off makes no sense
            self._ask_again(lambda member, now: member.out_until is not None)
            with self._changed:  # other threads may be asking, too
                self._changed.wait_for(
                    lambda: (
                        any(m.out_until is None for m in self._members) or not any(m.is_asked for m in self._members)
                    )
                )
            member = self._take(tried, head)
        if member is None:
            raise _none(self._members)
        return member.transport

    def release(self, transport: Transport, failure: UpstreamError | None) -> None:
        """The attempt has ended; `failure` tells how (None: well, or aborted by us)."""
        with self._changed:
            member = next(m for m in self._members if m.transport is transport)
            member.num_open -= 1
            if failure is None:
                if member.out_until is None:
                    member.num_failed = 0
            elif self._process is not None:
                self._is_suspect |= failure.status is None
            elif len(self._members) > 1 and (
                failure.can_retry if failure.status is None else failure.status in BUSY_OR_AWAY
            ):
                self._leave_out(member, failure)

    def close(self) -> None:
        """Close every transport, and end our own server, even while it is being started."""
        if self._process is not None:
            self._process.close()
        for transport in self.transports:
            transport.close()

    # ------------------------------------------------------------------------------------- details

    def _take(self, tried: Collection[Transport], head: bytes) -> _Member | None:
        with self._changed:
            healthy = [m for m in self._members if m.out_until is None]
            if not healthy:
                return None
            fresh = [m for m in healthy if m.transport not in tried] or healthy
            least = min(m.num_open for m in fresh)
            member = max((m for m in fresh if m.num_open == least), key=lambda m: _weight(head, m.transport.url))
            member.num_open += 1
            return member

    def _leave_out(self, member: _Member, cause: UpstreamError) -> None:
        """Of the many streams that a server takes with it, only the first counts."""
        member.cause = str(cause)
        if member.out_until is not None and not member.is_asked:
            return
        first, longest = BACKOFFS
        pause = min(first * 2.0**member.num_failed, longest)
        if cause.retry_after is not None:
            pause = min(max(pause, cause.retry_after), longest)
        member.num_failed += 1
        member.out_until = self._clock() + pause
        log.warning("%s gets no work for %g s: %s", member.transport.url, pause, cause.message)

    def _ask_again(self, is_due: Callable[[_Member, float], bool]) -> None:
        """Find out whether servers that were left out are back; no two threads ask the same one."""
        with self._changed:
            now = self._clock()
            due = [m for m in self._members if not m.is_asked and is_due(m, now)]
            for member in due:
                member.is_asked = True
        for member in due:
            failure: UpstreamError | None = UpstreamError("it was interrupted")
            try:
                self._check(member.transport)
                failure = None
            except UpstreamError as e:
                failure = e
            except NanoVLLMError as e:  # it speaks another language now
                failure = UpstreamError(e.message)
            finally:
                with self._changed:
                    if failure is not None:
                        self._leave_out(member, failure)
                    else:
                        member.out_until = None
                        log.info("%s is back", member.transport.url)
                    member.is_asked = False
                    self._changed.notify_all()

    def _check(self, transport: Transport) -> None:
        """Raises UpstreamError unless it is up and serves what the others serve."""
        if not is_up(transport):
            raise UpstreamError(f"{transport.url} does not answer, or is not ready yet", can_retry=True)
        if self._ask is not None and self._facts is not None:
            _, facts = self._ask(transport, 0.0)
            difference = _difference(self._facts, facts)
            length, agreed = facts.max_model_len, self._facts.max_model_len
            if length is not None and agreed is not None and length < agreed:
                difference = f"max_model_len {agreed} against {length}"
            elif lacks := facts.lacks - self._facts.lacks:
                difference = f"it lacks {', '.join(sorted(lacks))}"
            if difference:
                raise UpstreamError(f"{transport.url} does not serve what the others do: {difference}", can_retry=True)


def open_servers(options: HttpOptions) -> Servers:
    """The servers that the configuration names, or the one that it says to start, running. Raises RunnerError."""
    if not options.is_managed:
        return Servers([Transport(url, options) for url in options.addresses])
    transport = Transport("http://127.0.0.1", options)  # its port comes with the process

    def is_ready(url: str) -> bool:
        transport.url = url
        return is_up(transport)

    process = ServerProcess(
        server_command(options), is_ready, start_timeout=options.startup_timeout, max_restarts=options.restarts
    )
    try:
        process.start()
    except BaseException:
        transport.close()
        raise
    return Servers([transport], process)


def is_up(transport: Transport) -> bool:
    """Does it answer, and not with what a server says while it loads? Not every one has a /health: a 404 will do."""
    try:
        transport.get("/health", retries=0, timeout=PING_TIMEOUT)
    except UpstreamError as e:
        return e.status is not None and e.status < 500 and e.status != 429
    return True


def _difference(a: Facts, b: Facts) -> str | None:
    names = ["dialect", "vocab_size", "eos_ids", "takes_ids", "takes_text"]
    if a.dialect == "openai":
        names += ["kind", "model"]  # by which requests are written
    for name in names:
        one, other = getattr(a, name), getattr(b, name)
        if one != other and not _is_unknown(one) and not _is_unknown(other):
            return f"{name} {one!r} against {other!r}"
    return None


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _is_unknown(value: Any) -> bool:
    return value is None or value == ()


def _weight(head: bytes, url: str) -> bytes:
    """Rendezvous hashing: a server that comes or goes moves only the prompts that are its own."""
    return hashlib.blake2b(head + b"\0" + url.encode(), digest_size=8).digest()


def _none(members: Sequence[_Member]) -> UpstreamError:
    causes = "; ".join(m.cause for m in members)
    return UpstreamError(f"none of the {len(members)} servers can be reached: {causes}", can_retry=True)
