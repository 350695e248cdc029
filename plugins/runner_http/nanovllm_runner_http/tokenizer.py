"""Tokenizer `http`: the tokenizer of a server that has one.

The bytes of every token are fetched once, so that turning ids into text waits for no server; encoding asks it. Only
servers of the seeds' protocol, which cannot list their tokens, are asked for each when it first occurs. Safe to call
from several threads. Text inside of a conversation never becomes a special token.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nanovllm.errors import RequestError, TokenizerError
from nanovllm.tokenizer import checked_messages

from .dialects.llamacpp import special_ids
from .dialects.shared import asked, found, ids
from .errors import UpstreamError, one_line
from .transport import Transport

if TYPE_CHECKING:
    from nanovllm.hookspecs import Context

    from .options import TokenizerOptions

T = TypeVar("T")

MAX_VOCABULARY_BYTES = 64 << 20  # of the answer that lists it: about 100 for each token
MAX_VOCAB_SIZE = 1 << 20
VOCABULARY_SECONDS = 120.0  # for that answer, which a busy server puts behind others


class Server(Protocol):
    """How one kind of server is asked. Its methods raise UpstreamError."""

    vocab_size: int
    eos_ids: tuple[int, ...]

    def token_bytes(self, token: int) -> bytes: ...  # 0 <= token < vocab_size
    def encode(self, text: str, parse_special: bool) -> tuple[int, ...]: ...
    def chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]: ...


class HttpTokenizer:
    def __init__(self, ctx: Context) -> None:
        options: TokenizerOptions = ctx.options
        self._url = options.url
        self._server: Server = self._asked(lambda: _server(Transport(options.url, options), options))

    @property
    def vocab_size(self) -> int:
        return self._server.vocab_size

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._server.eos_ids

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self._ids(lambda: self._server.encode(text, parse_special))

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._server.vocab_size:
            return b""
        return self._asked(lambda: self._server.token_bytes(token_id))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        conversation = checked_messages(messages)
        return self._ids(lambda: self._server.chat(conversation))

    def _ids(self, ask: Callable[[], tuple[int, ...]]) -> list[int]:
        tokens = self._asked(ask)
        if any(not 0 <= token < self.vocab_size for token in tokens):
            raise TokenizerError(f"{self._url} sent an id outside of its vocabulary of {self.vocab_size} entries")
        return list(tokens)

    def _asked(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except UpstreamError as e:
            # What it refuses is the caller's mistake; that it cannot be reached is not.
            kind = RequestError if e.status in (400, 413, 422) else TokenizerError
            raise kind(f"tokenizer http: {e.message}", hint=e.hint) from None


def _server(transport: Transport, options: TokenizerOptions) -> Server:
    if options.dialect != "nanovllm" and (props := found(transport, "/props")) is not None:
        return LlamaCppTokenizer(transport, props)
    if options.dialect != "llamacpp":
        info = found(transport, "/info") or {}
        listed = _listed(transport)
        if listed is not None:
            return NanoVLLMTokenizer(transport, ids(info.get("eos_token_ids") or []), listed)
        size = options.vocab_size or info.get("vocab_size")
        if type(size) is int and 0 < size <= MAX_VOCAB_SIZE:
            return SeedTokenizer(transport, ids(info.get("eos_token_ids") or []), size)
    raise UpstreamError(
        f"{transport.url} shares no tokenizer, or does not tell the size of its vocabulary",
        hint="set tokenizer.vocab_size, or another tokenizer, or none for a server that takes text",
    )


class LlamaCppTokenizer:
    """llama-server's `/tokenize`, `/apply-template` and, for the bytes of all tokens, one `/completion`."""

    def __init__(self, transport: Transport, props: Mapping[str, Any]) -> None:
        self._transport = transport
        self._table = self._vocabulary()
        self.vocab_size = len(self._table)
        self.eos_ids = special_ids(transport, props.get("eos_token"))

    def token_bytes(self, token: int) -> bytes:
        return self._table[token]

    def encode(self, text: str, parse_special: bool) -> tuple[int, ...]:
        return self._ids(text, parse_special=parse_special, add_special=True)

    def chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        contents = [message["content"] for message in messages]
        if self._ids(contents, parse_special=True) == self._ids(contents, parse_special=False):
            return self._ids(self._rendered(messages), parse_special=True, add_special=True)
        # A content spells a special token. The server takes all of a text in one way, so the template is rendered
        # around marks that it cannot contain, and the contents' own ids are put in their places.
        marks = [secrets.token_hex(16) for _ in messages]
        rest = self._rendered([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
        parts: list[str | int] = []
        for mark, content in zip(marks, contents, strict=True):
            before, found_mark, rest = rest.partition(mark)
            if not found_mark or mark in rest:
                raise RequestError(
                    "a message spells a special token, and the server's template does not let it through as text",
                    hint="remove it, or set a tokenizer with the model's files",
                )
            parts += [before, *self._ids(content, parse_special=False)]
        return self._ids([*parts, rest], parse_special=True, add_special=True)

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        prompt = asked(self._transport, "/apply-template", {"messages": messages}).get("prompt")
        if not isinstance(prompt, str):
            raise UpstreamError(f"{self._transport.url} answered /apply-template without a prompt")
        return prompt

    def _ids(
        self, content: str | Sequence[str | int], *, parse_special: bool, add_special: bool = False
    ) -> tuple[int, ...]:
        body = {"content": content, "parse_special": parse_special, "add_special": add_special}
        return ids(asked(self._transport, "/tokenize", body).get("tokens"))

    def _vocabulary(self) -> tuple[bytes, ...]:
        """The bytes of all tokens, from the log-probabilities of one; b"" for special ones.

        `/detokenize` does not tell them: it spells special tokens out, and makes U+FFFD of half a character.
        """
        body = {
            "prompt": [0], "n_predict": 1, "n_probs": MAX_VOCAB_SIZE, "temperature": 0,
            "response_fields": ["completion_probabilities"],
        }  # fmt: skip
        answer = self._transport.post("/completion", body, timeout=VOCABULARY_SECONDS, max_bytes=MAX_VOCABULARY_BYTES)
        try:
            table = {e["id"]: bytes(e["bytes"]) for e in answer["completion_probabilities"][0]["top_logprobs"]}
            return tuple(table[token] for token in range(len(table)))
        except (KeyError, IndexError, TypeError, ValueError):
            raise UpstreamError(
                f"{self._transport.url} does not list its tokens, as llama.cpp does since the end of 2024",
                hint="leave the tokenizer out: such a server takes text and gives text",
            ) from None


class SeedTokenizer:
    """`/v1/tokenize` and `/v1/detokenize` of the seeds' protocol, which knows text only."""

    def __init__(self, transport: Transport, eos_ids: tuple[int, ...], vocab_size: int) -> None:
        self._transport = transport
        self._seen: dict[int, bytes] = {}
        self.eos_ids = eos_ids
        self.vocab_size = vocab_size

    def token_bytes(self, token: int) -> bytes:
        if token not in self._seen:  # two threads may both ask, and get the same
            text = asked(self._transport, "/v1/detokenize", {"token_ids": [token]}).get("text")
            if not isinstance(text, str):
                raise UpstreamError(f"{self._transport.url} answered /v1/detokenize without a text")
            self._seen[token] = text.encode()
        return self._seen[token]

    def encode(self, text: str, parse_special: bool) -> tuple[int, ...]:
        return self._ids({"text": text})

    def chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        raise UpstreamError(f"{self._transport.url} has no chat template", hint="write the prompt as a text")

    def _ids(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        return ids(asked(self._transport, "/v1/tokenize", body).get("token_ids"))


class NanoVLLMTokenizer(SeedTokenizer):
    """The same of a server of ours, which lists its tokens, and knows special ones and a chat template."""

    def __init__(self, transport: Transport, eos_ids: tuple[int, ...], listed: tuple[bytes, ...]) -> None:
        super().__init__(transport, eos_ids, len(listed))
        self._listed = listed

    def token_bytes(self, token: int) -> bytes:
        return self._listed[token]

    def encode(self, text: str, parse_special: bool) -> tuple[int, ...]:
        return self._ids({"text": text, "parse_special": parse_special})

    def chat(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return self._ids({"messages": messages})


def _listed(transport: Transport) -> tuple[bytes, ...] | None:
    """`/v1/vocabulary`, the bytes of all tokens; None from a server that has none."""
    try:
        answer = transport.get("/v1/vocabulary", max_bytes=MAX_VOCABULARY_BYTES)
    except UpstreamError as e:
        if e.status == 404:
            return None
        raise
    try:
        return tuple(base64.b64decode(piece, validate=True) for piece in answer["token_bytes"])
    except (KeyError, TypeError, ValueError, binascii.Error) as e:
        raise UpstreamError(f"{transport.url} answered /v1/vocabulary wrongly: {one_line(e)}") from None
