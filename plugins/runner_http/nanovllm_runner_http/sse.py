"""Server-sent events from bytes that arrive in any pieces. Bounded; knows no socket and no JSON.

https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .errors import UpstreamError

MAX_LINE_BYTES = 1 << 20
MAX_EVENT_BYTES = 4 << 20
_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    type: str  # "message" unless an `event:` line said otherwise; "error" also for llama.cpp's old `error: {...}` lines
    data: str  # the `data:` lines, joined by newlines


class EventParser:
    """What comes out depends on the bytes alone, not on how they were split.

    Not as the standard says: invalid UTF-8 is an error instead of U+FFFD, and so is a line or an event beyond
    its limit. An event without the blank line that ends it is dropped, as the standard says.
    """

    def __init__(self, max_line: int = MAX_LINE_BYTES, max_event: int = MAX_EVENT_BYTES) -> None:
        self._max_line = max_line  # bytes, without the line's end
        self._max_event = max_event  # bytes of data
        self._line = bytearray()  # the beginning of a line whose end has not come
        self._after_cr = False  # the last byte was a CR: a LF right after it ends no other line
        self._is_first = True  # no line has been complete yet, so a byte order mark may come
        self._type = b""
        self._data: list[bytes] = []
        self._num_bytes = 0  # in _data

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events that these bytes complete. Raises UpstreamError, after the events before the bad place."""
        if self._after_cr and data:
            self._after_cr = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\n" not in data and b"\r" not in data:
            self._line += data
            self._check_line(self._line)
            return
        lines = data.splitlines(keepends=True)
        lines[0] = bytes(self._line) + lines[0]
        self._line.clear()
        self._after_cr = data.endswith(b"\r")
        for line in lines:
            whole = line.rstrip(b"\r\n")  # it has one end at most, and no other CR or LF
            self._check_line(whole)
            if len(whole) == len(line):
                self._line += line
            elif (event := self._take(whole)) is not None:
                yield event

    def _take(self, line: bytes) -> Event | None:
        """One line, without its end."""
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._type = value
        elif name in (b"data", b"error"):
            if name == b"error":
                self._type = name
            self._data.append(value)
            self._num_bytes += len(value) + 1
            if self._num_bytes > self._max_event + 1:
                raise UpstreamError(f"it sent an event of more than {self._max_event} bytes")
        return None  # a comment (no name), or a field that means nothing to us

    def _dispatch(self) -> Event | None:
        name, data = self._type, self._data
        self._type, self._data, self._num_bytes = b"", [], 0
        if not data:
            return None
        try:
            return Event(name.decode() or "message", b"\n".join(data).decode())
        except UnicodeDecodeError as e:
            raise UpstreamError(f"it sent an event that is not UTF-8: {e.reason} at byte {e.start}") from None

    def _check_line(self, line: bytes | bytearray) -> None:
        if len(line) > self._max_line:
            raise UpstreamError(f"it sent a line of more than {self._max_line} bytes")
