"""The event parser against a naive one that has the whole stream at once, for every split; and its limits."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm_runner_http.errors import UpstreamError
from nanovllm_runner_http.sse import Event, EventParser


def naive(stream: bytes) -> list[Event]:
    """The standard's algorithm on the whole text, in its own words."""
    *lines, _ = re.split(r"\r\n|\n|\r", stream.decode().removeprefix("\ufeff"))
    events: list[Event] = []
    kind, data = "", ""
    for line in lines:
        if line == "":
            if data:
                events.append(Event(kind or "message", data[:-1]))
            kind, data = "", ""
            continue
        if line.startswith(":"):
            continue
        field, colon, value = line.partition(":")
        value = value[1:] if colon and value[:1] == " " else value
        if field == "event":
            kind = value
        if field == "error":  # not the standard's: llama.cpp's
            kind = "error"
        if field in ("data", "error"):
            data += value + "\n"
    return events


def parsed(chunks: list[bytes], **limits: int) -> list[Event]:
    parser = EventParser(**limits)
    return [event for chunk in chunks for event in parser.feed(chunk)]


def split(stream: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(stream)) for cut in cuts})
    return [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]


LINES = st.sampled_from(
    ["data: ", "data:", "data", "data: a", "data:  b", "data: é€😀", ": a comment", ":", "", "", "", "event: ping",
     "event:", "event", "error: {}", "id: 7", "retry: 1", "what: ever", "data : no", "\ufeffdata: x"]
)  # fmt: skip
STREAMS = st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r", "\r\n"])), max_size=24).map(
    lambda parts: "".join(line + end for line, end in parts)
)


@given(
    stream=STREAMS,
    tail=st.sampled_from(["", "data: cut", "data: cut\r"]),
    cuts=st.lists(st.integers(0, 300), max_size=40),
)
@example(stream="data: a\r\n\r\n", tail="", cuts=list(range(12)))
@example(stream="\ufeffdata: a\n\n\ufeffdata: b\n\n", tail="", cuts=[1, 2])
def test_any_split_gives_what_the_whole_stream_says(stream: str, tail: str, cuts: list[int]) -> None:
    data = (stream + tail).encode()
    assert parsed(split(data, cuts)) == naive(data)


def test_an_event_is_there_with_the_last_byte_of_its_blank_line() -> None:
    parser = EventParser()
    stream = b'event: token\r\ndata: {"a":\rdata: 1}\n\r\n'
    arrived = [list(parser.feed(stream[i : i + 1])) for i in range(len(stream))]
    # The CR of the blank line already ends it: whether a LF follows can make no difference.
    assert arrived[-2] == [Event("token", '{"a":\n1}')]
    assert sum(map(len, arrived)) == 1


def test_what_comes_before_a_bad_byte_is_given_out() -> None:
    parser = EventParser()
    feed = parser.feed(b"data: good\n\ndata: \xff\n\ndata: never\n\n")
    assert next(feed) == Event("message", "good")
    with pytest.raises(UpstreamError, match="not UTF-8"):
        next(feed)


@pytest.mark.parametrize("size", [1, 3, 1000], ids="{} bytes at a time".format)
def test_a_line_at_its_limit_passes_and_one_byte_more_does_not(size: int) -> None:
    def chunks(line: bytes) -> list[bytes]:
        return [line[i : i + size] for i in range(0, len(line), size)]

    assert parsed(chunks(b"data: " + b"x" * 94 + b"\n\n"), max_line=100) == [Event("message", "x" * 94)]
    with pytest.raises(UpstreamError, match="a line of more than 100 bytes"):
        parsed(chunks(b"data: " + b"x" * 95 + b"\n\n"), max_line=100)
    with pytest.raises(UpstreamError, match="a line of more than 100 bytes"):
        parsed(chunks(b":" * 101), max_line=100)  # it need not end


def test_an_event_at_its_limit_passes_and_one_byte_more_does_not() -> None:
    lines = [b"data: " + b"x" * 9 + b"\n"] * 10  # ten lines and nine newlines between them
    assert parsed([*lines, b"\n"], max_event=99) == [Event("message", "\n".join(["x" * 9] * 10))]
    with pytest.raises(UpstreamError, match="an event of more than 98 bytes"):
        parsed([*lines, b"\n"], max_event=98)
    # The limit counts one event, not the stream.
    assert len(parsed([b"data: 12345\n\n"] * 100, max_event=5)) == 100
