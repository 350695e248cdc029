"""Tokens that a server left out of its stream because they end inside of a character, found again from the text.

llama-server sends nothing while the text ends with an incomplete UTF-8 character, and then one event with the whole
text and only the last token. The ones between are the only way, or one of several ways, to spell the rest of that
text with tokens that end inside of a character. An id is never guessed: several ways, none is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from nanovllm.tokenizer import Tokenizer


class Gaps:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def fill(self, text: str, last: int, num_missing: int) -> tuple[int, ...] | None:
        """The tokens before `last` in this text; None if they cannot be told."""
        data, end = text.encode(), self._tokenizer.token_bytes(last)
        if not data.endswith(end):
            return None
        ways = self._spellings(data[: len(data) - len(end)], 0, num_missing)
        first = next(ways, None)
        return first if next(ways, None) is None else None

    def _spellings(self, data: bytes, start: int, num_tokens: int) -> Iterator[tuple[int, ...]]:
        """All ways to spell data[start:] with so many tokens, each of which leaves the text incomplete."""
        if num_tokens == 0:
            if start == len(data):
                yield ()
            return
        for stop in range(start + 1, min(len(data), start + self._longest) + 1):
            if not is_incomplete(data[:stop]):
                continue
            for token in self._fragments.get(data[start:stop], ()):
                for rest in self._spellings(data, stop, num_tokens - 1):
                    yield (token, *rest)

    @cached_property
    def _fragments(self) -> dict[bytes, list[int]]:
        """The tokens that are no whole text of their own: only these can end inside of a character."""
        fragments: dict[bytes, list[int]] = {}
        for token in range(self._tokenizer.vocab_size):
            piece = self._tokenizer.token_bytes(token)
            try:
                piece.decode()
            except UnicodeDecodeError:
                fragments.setdefault(piece, []).append(token)
        return fragments

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._fragments), default=0)


def is_incomplete(data: bytes) -> bool:
    """Does it end with the beginning of a UTF-8 character?"""
    for size in range(1, min(3, len(data)) + 1):
        byte = data[-size]
        if byte >= 0xC0:
            return size < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False
