"""`BaseTokenizer`: what every tokenizer here does alike, whichever library splits the text.

This file knows neither a library nor a file: how a text becomes ids is `_ids` of the subclass.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanovllm.errors import RequestError, TokenizerError
from nanovllm.tokenizer import checked_messages

from .chat import ChatTemplate
from .controls import ControlTokens
from .templates import BUILT_IN

MAX_VOCAB = 1 << 24


class BaseTokenizer(ABC):
    """See nanovllm.tokenizer.Tokenizer for the methods."""

    def __init__(
        self,
        *,
        token_bytes: list[bytes],  # by id; b"" for special and undefined ids
        eos_ids: tuple[int, ...],
        controls: ControlTokens,
        names: Mapping[str, str],  # {"eos_token": "</s>", ...}, for chat templates
        template: ChatTemplate | None,
    ) -> None:
        self.vocab_size = len(token_bytes)
        self.eos_ids = eos_ids
        self._bytes = token_bytes
        self._controls = controls
        self._names = names
        self._template = template

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        encodable(text)
        return self._ids(self._controls.respell(text) if parse_special else text, add_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        checked = checked_messages(messages)
        template = self._template
        if template is None:
            raise TokenizerError(
                "the model's directory has no chat template",
                hint=f"add a chat_template.jinja, set tokenizer.chat_template to {', '.join(BUILT_IN)} or a jinja "
                "file, or use generate with a plain prompt",
            )
        for message in checked:
            encodable(message["content"])

        def render(messages: list[dict[str, str]]) -> str:
            variables = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
            return encodable(template.render({**self._names, **variables}))

        text = self._controls.respell_chat(checked, render)
        return self._ids(text, add_special_tokens=template.writes_plain_prompt)

    @abstractmethod
    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of an encodable text in which the wanted control tokens are respelled."""


def encodable(text: str) -> str:
    """The text itself. Raises RequestError for one that has no UTF-8."""
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise RequestError("the text contains a lone surrogate, which no text encoding can carry")
    return text


def guarded(library: str, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a library; whatever it raises becomes a TokenizerError. A panic of a Rust library is no Exception."""
    try:
        return call(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        raise TokenizerError(f"the {library} library {what}: {e}", hint="download the tokenizer again") from e


def eos_id(text: str, id_of: Mapping[str, int], name: str) -> int:
    """The id of the eos_token that the directory names. Raises TokenizerError where there is no such token."""
    if text not in id_of:
        raise TokenizerError(
            f"the eos_token {text!r} is not in {name}", hint="correct eos_token in tokenizer_config.json"
        )
    return id_of[text]
