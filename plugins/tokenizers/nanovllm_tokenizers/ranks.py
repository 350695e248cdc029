"""A tiktoken rank file: one token per line, `base64 rank`, the rank being its id and its priority.

This file knows the format. Which pattern and special tokens belong to a file is known.py.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Collection
from pathlib import Path

from nanovllm.errors import TokenizerError

from .files import read_text

_LINE = re.compile(r"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")


def is_rank_file(file: Path) -> bool:
    """Whether its first line is one of a rank file."""
    try:
        with file.open("rb") as opened:
            first = opened.readline(1000)
    except OSError:
        return False
    return _LINE.fullmatch(first.decode("latin-1").rstrip("\r\n")) is not None


def read_ranks(file: Path, taken: Collection[int]) -> dict[bytes, int]:
    """{token: id}; `taken`: ids of special tokens, which the file leaves out.

    Raises TokenizerError that names file and line: the tokens are all different, and their ids are
    0, 1, 2, ... in order, without those taken. Every single byte is a token.
    """
    ranks: dict[bytes, int] = {}
    expected = 0
    number = 0
    for number, line in enumerate(read_text(file).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise _bad(file, number, f"{line[:80]!r} is not a token in base64 and its rank")
        try:
            token = b64decode(match[1], validate=True)
        except Base64Error as e:
            raise _bad(file, number, f"{match[1][:80]!r} is not base64 ({e})") from None
        if int(match[2]) in taken:
            raise TokenizerError(
                f"{file}, line {number}: the rank {match[2]} is also the id of a special token",
                hint="correct tokenizer.special_tokens, or the added tokens in tokenizer_config.json",
            )
        while expected in taken:
            expected += 1
        if int(match[2]) != expected:
            raise _bad(file, number, f"the rank is {match[2]}, but the next one must be {expected}")
        if token in ranks:
            raise _bad(file, number, f"the token {token[:80]!r} has the rank {ranks[token]} already")
        ranks[token] = expected
        expected += 1
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise _bad(file, number, f"it ends here, with no token for the byte 0x{missing[0]:02X}")
    return ranks


def _bad(file: Path, number: int, what: str) -> TokenizerError:
    return TokenizerError(f"{file}, line {number}: {what}", hint="download it again")
