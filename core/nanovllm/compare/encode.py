"""What a tokenizer makes of every prompt, together with what tells a template's fault from its own. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from typing import NamedTuple

from ..errors import NanoVLLMError, TokenizerError
from ..tokenizer import Tokenizer
from .prompts import Prompt

Ids = tuple[int, ...]


class Encoded(NamedTuple):
    """What one tokenizer makes of a prompt."""

    plain: tuple[Ids, ...]  # of each plain text in it
    ids: Ids | None  # what the model gets; None: refused, or the runner tokenizes where nobody can see it
    refusal: str | None = None  # why there are no ids


class Tokenized(NamedTuple):
    """All that a comparison knows of one configuration's tokenizer."""

    name: str  # the configuration's
    vocab_size: int | None  # None: it has no tokenizer of its own
    eos_ids: Ids  # that end an answer
    encoded: tuple[Encoded, ...]  # one per prompt
    token_bytes: Mapping[int, bytes]  # of every id that is looked at

    def spelled(self, ids: Ids) -> bytes:
        return b"".join(self.token_bytes[token] for token in ids)

    def piece(self, token: int) -> str:
        spelled = self.token_bytes.get(token)  # None: the token occurs nowhere
        return str(token) if spelled is None else f"{token} {spelled.decode('utf-8', 'replace')!r}"


@contextmanager
def telling() -> Iterator[None]:
    """Turns whatever a plugin's tokenizer raises into a TokenizerError."""
    try:
        yield
    except NanoVLLMError:
        raise
    except Exception as e:
        raise TokenizerError(f"the tokenizer failed: {type(e).__name__}: {e}") from e


def encode(tokenizer: Tokenizer | None, prompt: Prompt) -> Encoded:
    """`tokenizer` None: the runner has its own, and shows nothing of what it does."""
    plain: tuple[Ids, ...] = ()
    if tokenizer is None:
        return Encoded(plain, None)
    try:
        with telling():
            plain = tuple(tuple(map(index, tokenizer.encode(text, prompt.parse_special))) for text in prompt.texts)
            ids = plain[0] if isinstance(prompt.content, str) else tuple(map(index, tokenizer.chat(prompt.content)))
    except NanoVLLMError as e:
        return Encoded(plain, None, str(e))
    return Encoded(plain, ids)


def bytes_of(
    tokenizer: Tokenizer | None, encoded: Sequence[Encoded], more: Iterable[Sequence[int]]
) -> dict[int, bytes]:
    """What each id stands for that occurs, in the prompts or in `more`. Raises TokenizerError."""
    if tokenizer is None:
        return {}
    used = {token for e in encoded for ids in (*e.plain, e.ids or ()) for token in ids}
    with telling():
        return {token: tokenizer.token_bytes(token) for token in sorted(used.union(*more))}
