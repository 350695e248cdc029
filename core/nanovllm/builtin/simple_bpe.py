"""The built-in tokenizer: 125 entries, no files and no dependencies, for the mock runner and first steps.

Ids, in order: 4 special tokens, 48 words, the 62 ASCII letters and digits, 11 marks; 4 + 48 + 62 + 11 = 125.
(The ancestor listed 49 words, "a" among them, and so gave the letter "a" two ids and had one id too many.)

Every entry has one spelling and every spelling one id. The space is an entry of its own, so spaces
come back exactly as they were; a character outside the alphabet becomes <unk> and is lost. This file
knows no model and no chat template: a conversation is written as "User: ...\\nAssistant:".
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from ..errors import RequestError
from ..tokenizer import checked_messages

_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_WORDS = (
    "the of and to in is it you that he was for on are with as his they at be this have from or "
    "one had by word but not what all were we when your can said there use an each which she do how hello world"
)
_MARKS = tuple(" \n.,!?:;'\"-")
_ENTRIES = (*_SPECIAL, *_WORDS.split(), *string.ascii_lowercase, *string.ascii_uppercase, *string.digits, *_MARKS)


class SimpleBPETokenizer:
    """Longest match, left to right, over a fixed vocabulary of 125 (the name is the seeds': nothing is merged)."""

    vocab_size = len(_ENTRIES)

    def __init__(self, eos_id: int = 2) -> None:
        if type(eos_id) is not int or not 0 <= eos_id < self.vocab_size:
            raise RequestError(f"eos_id must be between 0 and {self.vocab_size - 1}, not {eos_id!r}")
        self.eos_ids = (eos_id,)
        self._ids = {entry: i for i, entry in enumerate(_ENTRIES)}
        self._bytes = [b"" if entry in _SPECIAL else entry.encode() for entry in _ENTRIES]
        # Alternatives are tried in order, so longest first is longest match; "." takes any other character.
        longest_first = sorted(_ENTRIES, key=len, reverse=True)
        plain = [re.escape(entry) for entry in longest_first if entry not in _SPECIAL]
        self._plain = re.compile("|".join([*plain, "."]), re.DOTALL)
        self._with_special = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        unknown = self._ids["<unk>"]
        pattern = self._with_special if parse_special else self._plain
        return [self._ids.get(piece, unknown) for piece in pattern.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        lines = [f"{m['role'].capitalize()}: {m['content']}\n" for m in checked_messages(messages)]
        return self.encode("".join(lines) + "Assistant:")


NewSimpleBPETokenizer = SimpleBPETokenizer  # the seeds' constructor
