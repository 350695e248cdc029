"""What users hold: parameters and requests going in, deltas and outputs coming out.

All values here are frozen, and validated where they are built: a bad one raises RequestError that
names the field. This file knows no tokenizer, no scheduler and no runner; limits that depend on a
model are checked by `Engine.add`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias, TypedDict

from .batch import TokenLogprob
from .errors import RequestError, without_secrets

Message: TypeAlias = Mapping[str, str]  # {"role": ..., "content": ...}
Prompt: TypeAlias = "str | Sequence[int] | Sequence[Message]"

# Caps on what one request may ask for. They bound memory and time per step; none is a model's limit.
MAX_N = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_SALT_CHARS = 256
MAX_PRIORITY = 2**31 - 1
MAX_TOKENS = 2**31 - 1  # positions are int32


class Finish(str, enum.Enum):
    """Why a completion ended. Each is a string: `Finish.STOP == "stop"`."""

    STOP = "stop"  # an end-of-sequence id, a stop id or a stop string
    LENGTH = "length"  # max_tokens, or the model's or the KV pool's length
    ABORT = "abort"  # the caller went away, or the engine was closed
    ERROR = "error"  # see `error`

    __str__ = str.__str__


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Applied in one order by every sampler: penalties, bias, mask, temperature, top-k, top-p, min-p;
    ties go to the lowest id. Raises RequestError for a value out of range, naming it.
    """

    temperature: float = 1.0  # 0 = greedy; at most 100
    top_k: int = 0  # keep the k most likely; 0 (or -1) = all
    top_p: float = 1.0  # keep the smallest set with at least this probability, in (0, 1]
    min_p: float = 0.0  # drop tokens below this fraction of the most likely one, in [0, 1]
    repetition_penalty: float = 1.0  # > 0; divides positive and multiplies negative logits of seen tokens (CTRL)
    presence_penalty: float = 0.0  # [-2, 2]; subtracted once from every generated token's logit
    frequency_penalty: float = 0.0  # [-2, 2]; subtracted per occurrence in the generated text
    logit_bias: Mapping[int, float] | None = None  # token id -> [-100, 100], added to the logit
    seed: int | None = None  # 0 <= seed < 2**64; None = drawn at admission
    max_tokens: int | None = 64  # generated tokens; None = up to the model's length
    min_tokens: int = 0  # no end before this many tokens
    stop: Sequence[str] | str = ()  # texts that end the answer; never part of it
    stop_token_ids: Sequence[int] = ()  # ids that end the answer, besides the model's own
    ignore_eos: bool = False  # go on after the model's end-of-sequence ids
    logprobs: int | None = None  # also return the log-probability of each token and of the top n
    prompt_logprobs: int | None = None  # the same for the prompt's tokens

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 100)
        if type(self.top_k) is int and self.top_k == -1:  # vLLM's spelling of `all`
            object.__setattr__(self, "top_k", 0)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                hint="lower min_tokens or raise max_tokens",
            )
        _boolean("ignore_eos", self.ignore_eos)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    def changed(self) -> frozenset[str]:
        """Names of the fields that differ from their default."""
        return frozenset(f.name for f in fields(self) if getattr(self, f.name) != f.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and everything that goes with it. Raises RequestError for a value out of range, naming it."""

    prompt: Prompt  # text, token ids (a list, or a NumPy array of whole numbers), or chat messages
    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1  # completions of this prompt, sampled independently; at most 128
    priority: int = 0  # lower runs first; first come, first served inside one priority
    cache_salt: str | None = None  # prefixes are shared only between requests with the same salt
    parse_special: bool = False  # may text in the prompt become special tokens?

    def __post_init__(self) -> None:
        if not isinstance(self.params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(self.params).__name__}")
        _integer("n", self.n, 1, MAX_N)
        _integer("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _boolean("parse_special", self.parse_special)
        if self.cache_salt is not None and not (
            isinstance(self.cache_salt, str) and 0 < len(self.cache_salt) <= MAX_SALT_CHARS
        ):
            raise RequestError(f"cache_salt must be a text of 1 to {MAX_SALT_CHARS} characters")
        if self.cache_salt is not None and _has_surrogate(self.cache_salt):
            raise RequestError("cache_salt contains a lone surrogate, which no text encoding can carry")


@dataclass(frozen=True, slots=True, kw_only=True)
class PacedRequest(Request):
    """One sequence that its caller leads: it gets no further than `Engine.grant` lets it, and rests in between.

    `prompt` is token ids: the prompt, and behind it what was generated before, here or elsewhere. What is drawn next
    is what it would be without the interruption. The caller turns tokens into text and looks for stop strings.
    """

    num_prompt: int  # prompt[:num_prompt] is the prompt
    completion_index: int = 0  # which completion of the caller's request
    eos_ids: tuple[int, ...] = ()  # the caller's end-of-sequence ids, in place of the engine's

    def __post_init__(self) -> None:
        Request.__post_init__(self)  # a class with slots has no zero-argument super()
        _integer("num_prompt", self.num_prompt, 1, len(self.prompt))
        _integer("completion_index", self.completion_index, 0, 2**32 - 1)
        object.__setattr__(self, "eos_ids", _ids("eos_ids", self.eos_ids, MAX_STOP_TOKEN_IDS))
        if self.n != 1 or self.params.stop or isinstance(self.prompt, str):
            raise RequestError("a paced request is one sequence of token ids without stop strings")


class RequestOptions(TypedDict, total=False):
    """The fields of a Request that calls take as keywords."""

    n: int
    priority: int
    cache_salt: str | None
    parse_special: bool


class Delta(NamedTuple):
    """What one step, or several that a slow reader let pass, added to one completion."""

    request_id: int  # 1, 2, ... in one engine
    completion_index: int  # 0 <= completion_index < n
    text: str  # new text, whole characters only; never a part of a stop string
    token_ids: tuple[int, ...]  # new tokens
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per new token, where asked for
    finish: Finish | None = None  # set once, in the last delta of a completion
    error: str | None = None  # set when finish is ERROR
    output: Completion | None = None  # set in the last delta: the whole completion
    prompt_index: int = 0  # which prompt of the call, for `LLM.stream` of several


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Times in seconds, counted from the request's arrival; None where it never came to that."""

    num_prompt_tokens: int
    num_cached_tokens: int  # prompt tokens taken from the prefix cache at first admission
    num_output_tokens: int
    num_preemptions: int  # how often its KV was given to another and computed again
    queue_time: float | None  # arrival -> first scheduled
    ttft: float | None  # arrival -> first token
    tpot: float | None  # mean time per output token after the first
    total_time: float  # arrival -> end

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens over the time from first scheduled to first token."""
        if self.ttft is None or self.queue_time is None or self.ttft <= self.queue_time:
            return None
        return self.num_prompt_tokens / (self.ttft - self.queue_time)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Output tokens after the first, over the time that they took."""
        return 1 / self.tpot if self.tpot else None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer."""

    index: int  # 0 <= index < n
    text: str  # without the stop string, if one ended it
    token_ids: tuple[int, ...]  # generated tokens, the one that ended it included
    finish: Finish
    stats: RequestStats
    stop_reason: str | int | None = None  # the stop string or id that ended it
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per token, where asked for
    error: str | None = None  # set when finish is ERROR


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to one request. `output.text` is `output.completions[0].text`, and so on.

    `output["text"]` and `output["token_ids"]` work as in nano-vllm.
    """

    request_id: int  # 1, 2, ... in one engine
    prompt_token_ids: tuple[int, ...]  # empty where the runner tokenizes
    completions: tuple[Completion, ...]  # `n` of them, by index
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # first entry None: nothing precedes it

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first completion's tokens."""
        return list(self.completions[0].token_ids)

    @property
    def finish(self) -> Finish:
        """Why the first completion ended."""
        return self.completions[0].finish

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """The first completion's log-probabilities, one per token, where asked for."""
        return self.completions[0].logprobs

    @property
    def stats(self) -> RequestStats:
        """The first completion's times and counts."""
        return self.completions[0].stats

    @property
    def error(self) -> str | None:
        """The first completion's error that is set, if any."""
        return next((c.error for c in self.completions if c.error is not None), None)

    def __getitem__(self, key: str) -> Any:
        if key in ("text", "token_ids"):
            return getattr(self, key)
        raise KeyError(key)


# ----------------------------------------------------------------------------------- field checks


def _boolean(name: str, value: object) -> None:
    if type(value) is not bool:
        raise RequestError(f"{name} must be true or false, not {show(value)}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:  # True is an int to Python, not to us
        raise RequestError(f"{name} must be a whole number, not {show(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low} and {high}, not {show(value)}")


def _number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    if type(value) not in (int, float) or value in (math.inf, -math.inf) or value != value:
        raise RequestError(f"{name} must be a finite number, not {show(value)}")
    if not low <= value <= high or (above and value == low):  # type: ignore[operator]
        raise RequestError(f"{name} must be {'above' if above else 'from'} {low} and at most {high}, not {show(value)}")


def _stops(value: object) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
        raise RequestError(f"stop must be a text or a list of texts, not {show(value)}")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} texts; at most {MAX_STOPS} are allowed")
    for s in stops:
        if not 0 < len(s) <= MAX_STOP_CHARS:
            raise RequestError(f"every stop text must have 1 to {MAX_STOP_CHARS} characters; one has {len(s)}")
    return tuple(dict.fromkeys(stops))


def _ids(name: str, value: object, most: int) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise RequestError(f"{name} must be a list of token ids, not {show(value)}")
    if len(value) > most:
        raise RequestError(f"{name} has {len(value)} ids; at most {most} are allowed")
    for i in value:
        _integer(f"every id in {name}", i, 0, 2**31 - 1)
    return tuple(dict.fromkeys(value))


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, not {show(value)}")
    if len(value) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    for k, v in value.items():
        _integer("every id in logit_bias", k, 0, 2**31 - 1)
        _number(f"logit_bias[{k}]", v, -100, 100)
    return dict(value)


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def show(value: object) -> str:
    """A short repr for error messages: 10**18 and long texts stay readable, secrets in an address do not."""
    try:
        text = without_secrets(repr(value))
    except Exception:  # an int too long to print, or nested too deeply; a foreign __repr__ may raise anything
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."
