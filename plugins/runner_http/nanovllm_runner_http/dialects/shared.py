"""What several dialects read alike: a probe's answer, an event's JSON, a server's complaint, log-probabilities.

Knows no dialect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nanovllm.batch import TokenLogprob
from nanovllm.errors import ConfigError
from nanovllm.tokenizer import Tokenizer

from ..errors import UpstreamError, one_line

if TYPE_CHECKING:
    from ..sse import Event
    from ..transport import Transport

# What a server without a path answers; 200 is a page for people. LM Studio says 200 and an error as JSON.
_NO_SUCH_PATH = frozenset([200, 404, 405, 501])

MAX_COUNT = 2**31 - 1  # of what is counted in a model: entries, tokens

# Any two vocabularies spell this differently, unless one is the other's.
_SAMPLE = "The quick brown fox jumps over 13 lazy dogs; naïve façade, 你好, été: x = [0.25]\n"


def found(transport: Transport, path: str) -> dict[str, Any] | None:
    """The JSON object under `path`; None if the server has none there. Raises UpstreamError for all other trouble."""
    try:
        answer = transport.get(path)
    except UpstreamError as e:
        if e.status in _NO_SUCH_PATH:
            return None
        raise
    return answer if isinstance(answer, dict) else None


def served_models(transport: Transport) -> dict[str, dict[str, Any]] | None:
    """What `/v1/models` lists, by name; None if there is no such list."""
    listed = (found(transport, "/v1/models") or {}).get("data")
    if not isinstance(listed, list):
        return None
    return {m["id"]: m for m in listed if isinstance(m, dict) and isinstance(m.get("id"), str)}


def asked(transport: Transport, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object that answers a POST. Raises UpstreamError."""
    answer = transport.post(path, body)
    if not isinstance(answer, dict):
        raise UpstreamError(
            f"{transport.url} answered {path} with {one_line(repr(answer), 40)}, which is no JSON object"
        )
    return answer


def conversation(prompt: object) -> list[dict[str, str]] | None:
    """The prompt of a ScheduledSeq, if it is messages."""
    messages = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, str) else []
    return [dict(message) for message in messages] if messages and isinstance(messages[0], Mapping) else None


def parsed(event: Event) -> dict[str, Any]:
    """The JSON object of an event. Raises UpstreamError."""
    try:
        data = json.loads(event.data)
    except (ValueError, RecursionError):
        raise UpstreamError(f"it sent an event that is no JSON: {one_line(event.data, 80)}") from None
    if not isinstance(data, dict):
        raise UpstreamError(f"it sent an event that is no JSON object: {one_line(event.data, 80)}")
    return data


def field(data: dict[str, Any], name: str, kind: type) -> Any:
    """`data[name]`, which must be of this type. Raises UpstreamError."""
    value = data.get(name)
    if type(value) is not kind:  # True is an int to Python, not to us
        raise UpstreamError(f"it sent an event whose {name!r} is {one_line(repr(value), 40)}")
    return value


def count(value: Any) -> int | None:
    """A size that a server tells of itself; None for what cannot be one."""
    return value if type(value) is int and 0 < value <= MAX_COUNT else None


def ids(value: Any) -> tuple[int, ...]:
    """A list of token ids. Raises UpstreamError."""
    if not isinstance(value, list) or any(type(i) is not int for i in value):
        raise UpstreamError(f"it sent token ids that are no list of whole numbers: {one_line(repr(value), 40)}")
    return tuple(value)


def complaint(data: Any) -> UpstreamError:
    """The error that a server reports inside of a stream, whatever its shape."""
    can_retry = False
    while isinstance(data, dict):
        can_retry |= data.get("code") in (429, 503)
        inner = next((data[key] for key in ("error", "message", "detail") if data.get(key)), None)
        if inner is None:
            break
        data = inner
    return UpstreamError(f"it reported: {one_line(data)}", can_retry=can_retry)


def logprob(token: int, value: Any, most_likely: Sequence[tuple[Any, Any]], num_wanted: int) -> TokenLogprob:
    """`most_likely` is (id, logprob), best first. The rank is exact among these; behind them, the best it can be."""
    numbers = [value, *(number for _, number in most_likely)]
    # An integer may be one that no float can be.
    if any(type(i) is not int for i, _ in most_likely) or any(
        type(number) is not float and not (type(number) is int and abs(number) < 1 << 64) for number in numbers
    ):
        raise UpstreamError(f"it sent log-probabilities that are no numbers, for token {token}")
    order = [i for i, _ in most_likely]
    rank = order.index(token) + 1 if token in order else len(order) + 1
    return TokenLogprob(token, float(value), rank, tuple((i, float(x)) for i, x in most_likely[:num_wanted]))


def check_same_vocabulary(
    url: str, tokenizer: Tokenizer, vocab_size: int | None, detokenize: Callable[[list[int]], str]
) -> None:
    """Raises ConfigError if the server reads the tokenizer's ids as another text."""
    sample = tokenizer.encode(_SAMPLE)
    read: str | None = None
    if vocab_size is None or all(i < vocab_size for i in sample):
        read = detokenize(sample)
    # Some tokenizers put a special token or a space in front, or drop what they cannot spell.
    if read is None or not read.endswith(tokenizer.decode(sample).lstrip()):
        shown = "ids outside of its vocabulary" if read is None else repr(one_line(read, 60))
        raise ConfigError(
            f"{url} reads the tokenizer's ids of {one_line(_SAMPLE, 40)!r} as {shown}: its vocabulary is another one",
            hint="point tokenizer.path at the tokenizer of the server's model, or set tokenizer: http",
        )
