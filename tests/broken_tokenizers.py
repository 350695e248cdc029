"""A tokenizer of bytes that keeps its protocol, and what can be wrong with it, one thing at a time."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanovllm.errors import RequestError
from nanovllm.tokenizer import checked_messages

SPECIAL = ("<s>", "</s>", "<|im_end|>")  # 256, 257, 258


class ByteTokenizer:
    """One id per byte, and three special tokens."""

    vocab_size = 256 + len(SPECIAL)
    eos_ids: Any = (257,)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [256, *self.ids(text, parse_special)]

    def ids(self, text: str, parse_special: bool = False) -> list[int]:
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise RequestError("the text has a lone surrogate")
        if not parse_special:
            return list(text.encode())
        pieces = re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text)
        return [i for p in pieces for i in ([256 + SPECIAL.index(p)] if p in SPECIAL else p.encode())]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> Any:
        return bytes([token_id]) if 0 <= token_id < 256 else b""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        said = [[*self.ids(f"{m['role']}: {m['content']}"), 258] for m in checked_messages(messages)]
        return [256, *(i for ids in said for i in ids)]


class VocabularyTooSmall(ByteTokenizer):
    vocab_size = 200


class NumpyIds(ByteTokenizer):
    def encode(self, text: str, parse_special: bool = False) -> Any:
        return list(np.array(super().encode(text, parse_special)))


class StripsTheFirstSpace(ByteTokenizer):
    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids).removeprefix(" ")


class StrictUtf8(ByteTokenizer):
    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()


class UnknownIdsRaise(ByteTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return ([bytes([i]) for i in range(256)] + [b""] * 3)[token_id]  # and -1 is the last one


class BytesAreText(ByteTokenizer):
    def token_bytes(self, token_id: int) -> Any:
        return super().token_bytes(token_id).decode("latin-1")


class TextIsParsed(ByteTokenizer):
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return super().encode(text, True)


class MessagesAreParsed(ByteTokenizer):
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}<|im_end|>" for m in checked_messages(messages)), True)


class MessagesAreNotChecked(ByteTokenizer):
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}" for m in messages))


class TheMessageIsLost(ByteTokenizer):
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode("".join(m["role"] for m in checked_messages(messages)))


class MessagesAreConsumed(ByteTokenizer):
    def chat(self, messages: Any) -> list[int]:
        ids = super().chat(messages)
        messages.append({"role": "assistant", "content": ""})
        return ids


class EndOutsideTheVocabulary(ByteTokenizer):
    eos_ids = (100_257,)


class EndIsAList(ByteTokenizer):
    eos_ids = [257]  # noqa: RUF012 (what is wrong with it)


class SharedList(ByteTokenizer):
    def __init__(self) -> None:
        self.cache: dict[tuple[str, bool], list[int]] = {}

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self.cache.setdefault((text, parse_special), super().encode(text, parse_special))


class OneBufferForAll(ByteTokenizer):
    def __init__(self) -> None:
        self.text = ""

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        self.text = text
        time.sleep(1e-5)  # where a library would let another thread run
        return super().encode(self.text, parse_special)


class NulEndsTheText(ByteTokenizer):
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        if "\0" in text:
            raise RequestError("embedded null character")
        return super().encode(text, parse_special)


class Recursive(ByteTokenizer):
    def ids(self, text: str, parse_special: bool = False) -> list[int]:
        head = super().ids(text[:8], parse_special)
        return head + (self.ids(text[8:], parse_special) if text[8:] else [])


class CutsLongTexts(ByteTokenizer):
    """As a tokenizer.json with `truncation` asks for."""

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return super().encode(text, parse_special)[:512]


class KeepsTheLastMessage(ByteTokenizer):
    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return super().chat(checked_messages(messages)[-1:])


class BeginsOnce(ByteTokenizer):
    """Only the first conversation has a beginning."""

    def __init__(self) -> None:
        self.num = 0

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        self.num += 1
        return super().chat(messages)[self.num > 1 :]


class LosesEveryOtherSpace(ByteTokenizer):
    """The bytes of a token depend on what was asked for before it."""

    def __init__(self) -> None:
        self.is_kept = True

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == 32:
            self.is_kept = not self.is_kept
        return b"" if token_id == 32 and self.is_kept else super().token_bytes(token_id)


class Dropout(ByteTokenizer):
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return super().encode(text, parse_special) + [256] * random.randrange(2)


class EveryInstanceIsDifferent(ByteTokenizer):
    def __init__(self) -> None:
        self.first = random.randrange(256)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return [self.first, *self.ids(text, parse_special)]


class ParsingDropsTheBeginning(ByteTokenizer):
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self.ids(text, True) if parse_special else super().encode(text)


class Shouts(ByteTokenizer):
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return super().encode(text.upper(), parse_special)


# What is wrong -> the test that says so.
CAUGHT_BY: dict[Callable[[], Any], str] = {
    VocabularyTooSmall: "test_encoding_gives_ids_of_the_vocabulary",
    NumpyIds: "test_encoding_gives_ids_of_the_vocabulary",
    StripsTheFirstSpace: "test_decoding_is_the_concatenation_of_bytes",
    StrictUtf8: "test_decoding_is_the_concatenation_of_bytes",
    UnknownIdsRaise: "test_an_unknown_id_has_no_bytes",
    BytesAreText: "test_every_id_has_bytes",
    TextIsParsed: "test_text_never_becomes_a_special_token",
    MessagesAreParsed: "test_a_message_never_becomes_a_special_token",
    MessagesAreNotChecked: "test_a_malformed_conversation_is_refused",
    TheMessageIsLost: "test_a_conversation_becomes_ids",
    MessagesAreConsumed: "test_a_conversation_is_left_as_it_was",
    EndOutsideTheVocabulary: "test_end_ids_are_of_the_vocabulary",
    EndIsAList: "test_end_ids_are_of_the_vocabulary",
    SharedList: "test_callers_cannot_change_it",
    OneBufferForAll: "test_threads_do_not_disturb_each_other",
    NulEndsTheText: "test_any_text_is_encoded_or_refused",
    CutsLongTexts: "test_long_texts_are_encoded",
    KeepsTheLastMessage: "test_a_conversation_becomes_ids",
    BeginsOnce: "test_a_text_has_one_encoding",
    Recursive: "test_long_texts_are_encoded",
    LosesEveryOtherSpace: "test_a_stream_is_the_whole_text",
    Dropout: "test_a_text_has_one_encoding",
    EveryInstanceIsDifferent: "test_a_text_has_one_encoding",
    ParsingDropsTheBeginning: "test_plain_text_is_the_same_with_parse_special",
    Shouts: "test_plain_text_comes_back",
}
