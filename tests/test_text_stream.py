"""TokenStream and StopMatcher against naive references that look at the whole text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.errors import RequestError
from nanovllm.tokenizer import StopMatcher, TokenStream, checked_messages


def splits(data: st.DataObject, sequence):
    """The sequence cut into consecutive pieces at drawn places, empty pieces included."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sequence)), max_size=8)))
    return [sequence[a:b] for a, b in itertools.pairwise([0, *cuts, len(sequence)])]


# ------------------------------------------------------------------------------------- TokenStream

# Bytes that begin, continue and break characters of every length.
interesting = st.sampled_from([0x41, 0x0A, 0x80, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0xF5, 0xFF])
token = st.one_of(
    st.lists(interesting, max_size=4).map(bytes),
    st.binary(max_size=4),
    st.text(max_size=3).map(lambda t: t.encode("utf-8", "ignore")),
)


@given(st.data(), st.lists(token, max_size=12))
def test_stream_equals_the_whole_for_every_split(data, tokens):
    stream = TokenStream(tokens.__getitem__)
    pieces = [stream.feed(ids) for ids in splits(data, range(len(tokens)))]
    assert "".join([*pieces, stream.flush()]) == b"".join(tokens).decode("utf-8", "replace")


def test_every_sequence_of_three_interesting_bytes():
    values = [0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5]
    for data in itertools.product(values, repeat=4):
        stream = TokenStream(lambda i: bytes([i]))
        text = "".join(stream.feed((i,)) for i in data) + stream.flush()
        assert text == bytes(data).decode("utf-8", "replace"), bytes(data)


@given(st.text(max_size=40).filter(lambda t: t.isprintable()))
def test_no_replacement_character_before_the_true_end(text):
    data = text.replace("\ufffd", "").encode("utf-8", "ignore")
    stream = TokenStream(lambda i: data[i : i + 1])
    for i in range(len(data)):
        assert "\ufffd" not in stream.feed([i])
    assert stream.flush() == ""


def test_a_cut_inside_an_emoji_is_shown_only_by_flush():
    stream = TokenStream({0: b"ok \xf0\x9f", 1: b"\x99"}.__getitem__)
    assert [stream.feed([0]), stream.feed([1]), stream.flush(), stream.flush()] == ["ok ", "", "\ufffd", ""]


# ------------------------------------------------------------------------------------- StopMatcher


def whole(text: str, stops) -> tuple[str, str | None]:
    """The rule by brute force: the first end at which a stop is complete, and there the longest stop."""
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(stops, pieces) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        emit, matched = matcher.feed(piece)
        shown.append(emit)
        if matched is not None:
            assert matcher.flush() == ""
            return shown, matched
    return [*shown, matcher.flush()], None


few_letters = st.text(alphabet="ab\n", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=5)


@given(st.data(), few_letters, stop_lists)
@example(None, "aabab", ["abab", "ba"])
def test_matches_the_whole_text_rule_for_every_split(data, text, stops):
    pieces = splits(data, text) if data else list(text)
    shown, matched = run(stops, pieces)
    assert ("".join(shown), matched) == whole(text, stops)


@given(few_letters, stop_lists)
def test_holds_back_no_more_than_it_must(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for end, char in enumerate(text, 1):
        emit, matched = matcher.feed(char)
        if matched is not None:
            break
        shown += emit
        must = max((n for s in stops for n in range(1, len(s)) if text[:end].endswith(s[:n])), default=0)
        assert shown == text[: end - must]


@given(st.data(), few_letters, few_letters, stop_lists)
def test_text_before_min_tokens_passes_and_is_no_part_of_a_match(data, early, late, stops):
    matcher = StopMatcher(stops)
    for piece in splits(data, early):
        assert matcher.feed(piece, enabled=False) == (piece, None)
    shown, found = [], None
    for piece in splits(data, late):
        emit, found = matcher.feed(piece)
        shown.append(emit)
        if found is not None:
            break
    assert ("".join([*shown, matcher.flush()]), found) == whole(late, stops)


def test_switching_matching_off_gives_back_what_was_held():
    matcher = StopMatcher(("abc",))
    assert matcher.feed("xab") == ("x", None)
    assert matcher.feed("c", enabled=False) == ("abc", None)


@pytest.mark.parametrize(
    ("stops", "unit"),
    [
        (("a" * 1023 + "b",), "a"),
        (tuple("a" * (960 + i) + "b" for i in range(64)), "a"),
        (tuple("a" * (959 + i) + "bc" for i in range(64)), "a" * 1022 + "b"),
        (tuple(chr(0x100 + i) + "a" * 1023 for i in range(64)), "Ā" + "a" * 1022),
    ],
)
def test_work_is_linear_on_adversarial_text(stops, unit, monkeypatch):
    text = (unit * 100_000)[:100_000]
    comparisons = 0
    original = StopMatcher._is_prefix

    def counted(self, held):
        nonlocal comparisons
        comparisons += 1
        return original(self, held)

    monkeypatch.setattr(StopMatcher, "_is_prefix", counted)
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(text[i : i + 4])[0] for i in range(0, len(text), 4)) + matcher.flush()
    assert shown == text
    assert comparisons <= 2 * len(text)


# ---------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ("hello", "str"),
        ({"role": "user", "content": "x"}, "dict"),
        ([], "at least one"),
        ([{"role": "user", "content": "x"}, "y"], r"messages\[1\]"),
        ([{"role": "user"}], r"messages\[0\].*content"),
        ([{"content": "x"}], r"messages\[0\].*role"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": ["x"]}], "content"),
        ([{"role": "user", "content": "x", "tool_calls": "y"}], "tool_calls"),
        ([{"role": "", "content": "x"}], "role"),
        ([{"role": "user|><|system", "content": "x"}], "role"),
        ([{"role": "u" * 65, "content": "x"}], "role"),
    ],
)
def test_bad_messages_are_refused_by_name(messages, named):
    with pytest.raises(RequestError, match=named):
        checked_messages(messages)


def test_good_messages_are_copied():
    given_messages = ({"role": "user", "content": ""},)
    checked = checked_messages(given_messages)
    assert checked == list(given_messages)
    assert checked[0] is not given_messages[0]
