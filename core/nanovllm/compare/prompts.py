"""What is asked: texts and conversations, built in or from a file. Knows no tokenizer and no engine."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError
from ..request import Message, show


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    content: str | tuple[Message, ...]  # a text, or a conversation
    parse_special: bool = False  # may its text become special tokens?
    is_optional: bool = False  # left out where no configuration takes it: a base model has no chat template

    @property
    def texts(self) -> tuple[str, ...]:
        """The plain texts in it."""
        return (self.content,) if isinstance(self.content, str) else tuple(m["content"] for m in self.content)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)

    def __str__(self) -> str:
        return f"{'chat ' if self.is_chat else ''}{show(self.texts[-1])}"


def asked(question: str) -> tuple[Message, ...]:
    """The conversation of one question."""
    return ({"role": "user", "content": question},)


_TEXTS = (
    "The capital of France is",
    "Once upon a time",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
    "Q: What is the capital of Japan?\nA:",
)
_CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    asked("What is the capital of Germany?"),
    asked("Name three colours."),
    (
        {"role": "user", "content": "What is the capital of Spain?"},
        {"role": "assistant", "content": "The capital of Spain is Madrid."},
        {"role": "user", "content": "And of Italy?"},
    ),
)
# Where tokenizers of one vocabulary have differed: white space, borders of words, characters of several bytes,
# numbers, and text beside a special token.
_HARD = (
    " leading", "trailing ", "two  spaces", "   ", "\n", "a\n\nb", "\t tabs\t", "line\r\nend", "it's we'll I'M",
    "3.14159 1,000,000 2026", "Zürich naïve ﬁne", "e\u0301 is é", "東京は日本の首都です。", "안녕하세요", "Привет, мир",
    "👩‍👩‍👧 🇫🇷 🤖", "\u200bzero\u00a0width", "x" * 40, "==>>!!??",
    "https://example.org/a?b=c&d=%20", "<|im_start|>", "</s>",
)  # fmt: skip
_MARKED = tuple(
    f"a {mark}{rest}"
    for mark in ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "[INST]", "<eos>")
    for rest in ("b", " b", "\nb")
)

BUILT_IN = (
    *(Prompt(content=text) for text in _TEXTS),
    *(Prompt(content=messages, is_optional=True) for messages in _CONVERSATIONS),
)
HARD_TO_TOKENIZE = (
    *BUILT_IN,
    *(Prompt(content=text) for text in _HARD),
    *(Prompt(content=text, parse_special=True) for text in _MARKED),
)


def from_text(text: str, as_chat: bool) -> Prompt:
    if not text:
        raise RequestError("a prompt is empty", hint="give it at least one character")
    return Prompt(content=asked(text) if as_chat else text)


def from_file(path: Path, as_chat: bool) -> tuple[Prompt, ...]:
    """Of a `.jsonl` file every line's "prompt" or "messages", of any other file every line that is not blank.

    Raises RequestError that names the file and the line.
    """
    is_json = path.suffix == ".jsonl"
    prompts = []
    for number, line in enumerate(re.split(r"\r?\n", read_text(path)), 1):  # not splitlines: JSON may hold U+2028
        if line.strip():
            try:
                prompts.append(_from_json(line, as_chat) if is_json else from_text(line, as_chat))
            except RequestError as e:
                raise RequestError(f"{path}, line {number}: {e.message}", hint=e.hint) from None
    if not prompts:
        raise RequestError(f"{path} holds no prompt", hint="write one on each line")
    return tuple(prompts)


def read_text(path: Path) -> str:
    """A file of UTF-8 text, with or without a byte order mark. Raises RequestError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RequestError(f"{path} cannot be read: {e.strerror or e}") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(f"{path} is no text: byte {e.start} is not UTF-8") from None
    if "\0" in text:
        raise RequestError(f"{path} is no text: byte {data.index(0)} is a NUL")
    return text.removeprefix("\ufeff")


def _from_json(line: str, as_chat: bool) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"not usable JSON: {e}") from None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise RequestError(f"a prompt is an object with 'prompt' or 'messages', not {show(row)}")
    if unknown := sorted(row.keys() - {"id", "prompt", "messages"}):
        raise RequestError(
            f"unknown field {show(unknown[0])}", hint="sampling parameters are given on the command line, for all"
        )
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise RequestError(f"'prompt' must be a text, not {show(row['prompt'])}")
        return from_text(row["prompt"], as_chat)
    from ..tokenizer import checked_messages

    return Prompt(content=tuple(checked_messages(row["messages"])))
