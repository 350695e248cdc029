"""Between text and ids: the Tokenizer protocol, TokenStream and StopMatcher.

    ids -> Tokenizer.token_bytes -> TokenStream -> whole characters -> StopMatcher -> text that may be shown

This file knows no tokenizer library, no sequence and no scheduler. A generated text is a continuation:
it is the bytes of its tokens, one after another, so a leading space of the first one is kept.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from .errors import RequestError


class Tokenizer(Protocol):
    """Text to ids and back. Immutable after construction and safe to call from several threads."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 <= id < vocab_size. The model's logits may be wider (padding), never narrower."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, by the tokenizer's own files; empty if they name none."""
        ...

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The ids of a prompt, with the special tokens that the tokenizer itself adds (BOS and the like).

        `parse_special=False`: text that spells a special token stays plain text. True: it becomes
        the token; only for text that the caller wrote, never for a user's.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The concatenation of `token_bytes`, as UTF-8; invalid bytes become U+FFFD. Never raises."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text.

        b"" for special and undefined ids, also for any id >= vocab_size, which padded logits can yield.
        """
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation `[{"role": ..., "content": ...}, ...]`, ready for the answer.

        Text inside a content never becomes a special token. Raises RequestError for messages that are
        malformed or that the template refuses, and TokenizerError where no template is known.
        """
        ...


def checked_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The conversation as plain dicts of "role" and "content"; RequestError that names the first bad message."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"a conversation must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise RequestError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{i}] must be a mapping, not {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RequestError(f"messages[{i}] needs a text under {key!r}")
        if unknown := sorted(str(key) for key in message if key not in ("role", "content")):
            raise RequestError(f"messages[{i}] has {unknown[0]!r}; only 'role' and 'content' are taken")
        # A role is a name that templates put between markers ('<|' + role + '|>'): it may not bring its own.
        if not re.fullmatch(r"[\w-]{1,64}", message["role"]):
            raise RequestError(f"messages[{i}] has the role {message['role'][:64]!r}; a role is one word")
    return [dict(message) for message in messages]


class TokenStream:
    """Turns one sequence's tokens into text, whole characters only.

    The concatenation of every `feed` and one `flush` equals
    `b"".join(map(token_bytes, ids)).decode("utf-8", "replace")`, however the ids are split.
    """

    __slots__ = ("_held", "_token_bytes")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._held = b""  # 0..3 bytes: the beginning of a character whose end has not come

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that these tokens complete; "" while one is incomplete."""
        data = self._held + b"".join(map(self._token_bytes, ids))
        text, used = utf_8_decode(data, "replace", False)
        self._held = data[used:]
        return text

    def flush(self) -> str:
        """At the true end: U+FFFD for a character that never became whole, else ""."""
        data, self._held = self._held, b""
        return data.decode("utf-8", "replace")


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces, and lets no part of the found one through.

    The stop that completes first ends the text; of those that complete at the same character, the one
    that starts first (the longest). The rule looks at characters, so the result does not depend on
    how the text was split, and a decision never waits for later text. Without stops there is nothing
    to match: keep no matcher.

    Time is linear in the text: a character makes the held text one longer, each failed comparison
    makes it one shorter. Building costs one sort of the stops.
    """

    __slots__ = ("_first", "_held", "_last", "_longest", "_sorted")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere: refuse it at the door"
        self._sorted = sorted(set(stops))
        self._longest = sorted(self._sorted, key=len, reverse=True)
        self._first = {stop[0] for stop in stops}
        self._last = {stop[-1] for stop in stops}
        self._held = ""  # the longest end of the text that is a proper prefix of a stop

    def feed(self, text: str, enabled: bool = True) -> tuple[str, str | None]:
        """Take the next piece; return (text that is safe to show, the stop that was found or None).

        After a match the text has ended: what followed the stop in this piece is dropped.
        `enabled=False` (fewer than min_tokens so far): the piece passes through unexamined, and a
        later match cannot begin in it.
        """
        if not enabled:
            return self.flush() + text, None
        held = self._held
        if not held and self._first.isdisjoint(text):
            return text, None
        pending = held + text
        for end, char in enumerate(text, len(held) + 1):
            held += char
            while held and not self._is_prefix(held):
                held = held[1:]
            # A stop that ends here is an end of `held`, because it is a prefix of a stop itself.
            if char in self._last:
                for stop in self._longest:
                    if held.endswith(stop):
                        self._held = ""
                        return pending[: end - len(stop)], stop
        self._held = held
        return pending[: len(pending) - len(held)], None

    def flush(self) -> str:
        """The held text, when the generation ends for another reason."""
        held, self._held = self._held, ""
        return held

    def _is_prefix(self, text: str) -> bool:
        i = bisect_left(self._sorted, text)  # strings that begin with `text` sort directly from here
        return i < len(self._sorted) and self._sorted[i].startswith(text)
