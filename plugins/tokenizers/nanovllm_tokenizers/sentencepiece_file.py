"""`ModelFile`: a SentencePiece .model, read as the protocol buffer that it is.

The library does not say which pieces are user-defined, and takes a model that was cut short between two
fields for a smaller one; so the file is read here first. This file knows the format and no library.

    ModelProto      1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec, 5 denormalizer_spec
    SentencePiece   1 piece, 2 score, 3 type
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from nanovllm.errors import TokenizerError

from .files import read_bytes

# Appended to a model: of a field that is there twice, the last one holds. normalizer_spec {add_dummy_prefix: false}
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_CONTROL_TYPE = b"\x18\x03"  # the same for a piece


class Kind(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    text: str
    kind: Kind


class _Field(NamedTuple):
    number: int
    begin: int  # where its tag is
    value: int | slice  # an integer, or data[slice]


class ModelFile:
    """The pieces of a model, and the model itself as the library takes it."""

    def __init__(self, path: Path) -> None:
        """Raises TokenizerError that names the file, and the piece or the byte where it is wrong."""
        self.path = path
        self.data = read_bytes(path)
        fields = [field for field in self._fields(0, len(self.data)) if isinstance(field.value, slice)]
        self._messages = [field for field in fields if field.number == 1]  # one per piece
        for field in fields:
            if field.number == 5 and self._has_rules(field.value):
                raise TokenizerError(
                    f"{path}: it has denormalisation rules, so the bytes of a token depend on its neighbours",
                    hint="use a model that was trained without them",
                )
        for number, name in {1: "pieces", 2: "trainer_spec", 3: "normalizer_spec"}.items():
            if all(field.number != number for field in fields):
                raise self._bad(f"it has no {name}, so it was cut short, or it is something else")
        self.pieces = [self._piece(i, field.value) for i, field in enumerate(self._messages)]

    def with_controls(self, ids: Iterable[int]) -> bytes:
        """The model in which these pieces are control pieces, which the library finds in no text."""
        parts, done = [], 0
        for i in sorted(ids):
            field = self._messages[i]
            message = self.data[field.value] + _CONTROL_TYPE
            parts += [self.data[done : field.begin], b"\n", _varint(len(message)), message]
            done = field.value.stop
        return b"".join([*parts, self.data[done:]])

    def _has_rules(self, normalizer_spec: slice) -> bool:
        fields = self._fields(normalizer_spec.start, normalizer_spec.stop)
        return any(number == 2 and isinstance(value, slice) and self.data[value] for number, _, value in fields)

    def _piece(self, i: int, span: slice) -> Piece:
        text, kind = "", 1
        for number, _, value in self._fields(span.start, span.stop):
            if number == 1 and isinstance(value, slice):
                try:
                    text = self.data[value].decode()
                except UnicodeDecodeError as e:
                    raise self._bad(f"piece {i} is not UTF-8 ({e.reason})") from None
            elif number == 3 and isinstance(value, int):
                kind = value
        if not text:
            raise self._bad(f"piece {i} has no text")
        try:
            return Piece(text, Kind(kind))
        except ValueError:
            raise self._bad(f"piece {i} has the type {kind}") from None

    def _fields(self, i: int, end: int) -> Iterator[_Field]:
        """The fields of the message data[i:end]."""
        while i < end:
            begin = i
            tag, i = self._read_varint(i, end)
            wire = tag & 7
            if wire == 0:
                number, i = self._read_varint(i, end)
                yield _Field(tag >> 3, begin, number)
                continue
            if wire == 2:
                length, i = self._read_varint(i, end)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise self._bad(f"byte {begin} begins no field")
            if i + length > end:
                raise self._bad(
                    f"it is cut short: the field at byte {begin} has {length} bytes, and {end - i} are left"
                )
            yield _Field(tag >> 3, begin, slice(i, i + length))
            i += length

    def _read_varint(self, i: int, end: int) -> tuple[int, int]:
        value = shift = 0
        for j in range(i, min(i + 10, end)):
            byte = self.data[j]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, j + 1
            shift += 7
        raise self._bad(f"it is cut short at byte {end}" if end - i < 10 else f"byte {i} begins no number")

    def _bad(self, what: str) -> TokenizerError:
        return TokenizerError(f"{self.path} is not a SentencePiece model: {what}", hint="download it again")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
