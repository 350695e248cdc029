"""From a tokenizer.json to the bytes of each token, by the rules of the file's own decoder.

A stream can show a token as soon as it comes only if the token's bytes do not depend on its neighbours.
Decoders for which that holds are turned into one function of the piece; the others are refused by
name. What a decoder does to the start of a whole text (dropping the space before the first word) is
left out on purpose: a generated text is a continuation. This file knows no tokenizer library.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from nanovllm.errors import TokenizerError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a single byte


def piece_decoder(decoder: dict[str, Any] | None, name: str) -> Callable[[str], bytes]:
    """The function from a piece to its bytes. `name` (the file) is for the TokenizerError."""
    if decoder is None:
        return lambda piece: b" " + piece.encode()  # pieces are words, joined by spaces
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    texts: list[Callable[[str], str]] = []  # applied in order to a piece that is still text
    to_bytes: Callable[[str], bytes] = str.encode
    fused = False  # a later step sees the whole text, not one piece
    for step in steps:
        kind = step.get("type")
        if kind == "ByteLevel":
            to_bytes = _byte_level()
        elif kind == "ByteFallback":
            to_bytes = _byte_fallback
        elif kind == "Fuse":
            fused = True
        elif kind == "Metaspace":
            texts.append(_replace(step.get("replacement", "▁"), " "))
        elif kind == "Replace" and isinstance(step["pattern"].get("String"), str):
            old = step["pattern"]["String"]
            if fused and len(old) != 1:
                raise _refused(name, f"Replace({old!r}) after Fuse, which may span two tokens")
            texts.append(_replace(old, step["content"]))
        elif kind == "Strip" and fused and step.get("stop") == 0:
            pass  # the start of the whole text
        else:
            raise _refused(name, f"{kind!r} here")

    def decode(piece: str) -> bytes:
        for text in texts:
            piece = text(piece)
        return to_bytes(piece)

    return decode


def _refused(name: str, what: str) -> TokenizerError:
    return TokenizerError(
        f"{name}: its decoder uses {what}, so the bytes of a token depend on its neighbours",
        hint="use a tokenizer.json whose decoder is ByteLevel, Metaspace, or Replace/ByteFallback/Fuse/Strip",
    )


def _replace(old: str, new: str) -> Callable[[str], str]:
    return lambda piece: piece.replace(old, new)


def _byte_fallback(piece: str) -> bytes:
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.encode()


def _byte_level() -> Callable[[str], bytes]:
    """GPT-2's `bytes_to_unicode`, reversed: printable bytes stand for themselves, the others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}

    def decode(piece: str) -> bytes:
        try:
            return bytes([byte_of[c] for c in piece])
        except KeyError:  # not spelled in the byte alphabet: taken as it is, as the library does
            return piece.encode()

    return decode
