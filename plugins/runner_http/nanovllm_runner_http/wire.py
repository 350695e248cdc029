"""The messages of the `nanovllm` dialect, both directions: as values, as JSON, and read strictly.

Three ways to ask for a step. The words of nano-vllm-go's guide, in its two shapes, carry whole contexts and a
temperature. Version 1 of our extension names sequences, sends only what is new of those that the server knows, and
carries everything that a token depends on. docs/wire-protocol.md has each message.

The client (step.py) and the server (nanovllm-server) share this file. It knows no socket, no engine and no HTTP.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nanovllm.batch import ALL_PARAMETERS, Sampling, TokenLogprob
from nanovllm.errors import NanoVLLMError, RequestError
from nanovllm.request import SamplingParams, show

PROTOCOL = "nanovllm"  # what /info names
VERSION = 1  # of the extension
STEP_PATH = "/v1/inference"  # the extension's and the seeds' second shape
BATCH_PATH = "/inference"  # the seeds' first shape
MAX_CLIENT_CHARS = 64
MAX_ID = 2**63 - 1  # of sequences and calls
# What is no parameter of a token: texts are looked for by the client; the two others have fields of their own.
_NOT_SENT = frozenset(["stop", "temperature", "seed"])

_START_FIELDS = (
    "id", "at", "token_ids", "temperature", "num_prompt", "index", "seed", "eos_token_ids", "params", "cache_salt",
)  # fmt: skip


class WireError(NanoVLLMError):
    """A message that is not what the protocol says, in one sentence that names the field."""


# ---------------------------------------------------------------------------- version 1: what is asked


class Start(NamedTuple):
    """What the server must know of a sequence before its first token."""

    num_prompt: int  # token_ids[:num_prompt] is the prompt, the rest was generated before
    completion_index: int  # which completion of its request
    seed: int  # 0 <= seed < 2**64
    eos_ids: tuple[int, ...]
    temperature: float
    params: Mapping[str, Any]  # the other fields of SamplingParams, as JSON
    cache_salt: str | None = None  # its prefixes are shared with no other salt's

    def sampling_params(self) -> SamplingParams:
        """Raises RequestError for what this version of nanovllm does not take."""
        if unknown := [name for name in self.params if name not in ALL_PARAMETERS - _NOT_SENT]:
            raise RequestError(f"params holds {unknown[0]!r}, which this server does not know")
        given = dict(self.params)
        if isinstance(bias := given.get("logit_bias"), Mapping):  # names in JSON are texts
            given["logit_bias"] = {int(i) if re.fullmatch("[0-9]{1,19}", i) else i: v for i, v in bias.items()}
        return SamplingParams(temperature=self.temperature, seed=self.seed, **given)


class Ask(NamedTuple):
    """One sequence of a step: advance it from length `at`."""

    seq_id: int  # of the client's
    at: int  # tokens: prompt and generated; the token wanted is the one behind them
    token_ids: Sequence[int]  # the last ones of these; all of them with a `start`
    start: Start | None  # None: the server knows it
    unscored: Sequence[
        int
    ] = ()  # not sent: prompt tokens whose log-probabilities a server that knows it may answer with


class Step(NamedTuple):
    client: str  # whose sequence ids these are
    call: int  # a retry has the same number
    asks: Sequence[Ask]
    release: Sequence[int]  # sequence ids that the client is done with


def start_of(sampling: Sampling, num_prompt: int, cache_salt: str | None = None, *, is_resumed: bool) -> Start:
    """`is_resumed`: its prompt was computed before, so it is not scored again."""
    params = sampling.params
    names = (params.changed() | {"max_tokens"}) - _NOT_SENT - ({"prompt_logprobs"} if is_resumed else set())
    return Start(
        num_prompt,
        sampling.completion_index,
        sampling.seed,
        sampling.eos_ids,
        params.temperature,
        {name: getattr(params, name) for name in sorted(names)},
        cache_salt,
    )


def step_json(step: Step) -> dict[str, Any]:
    sequences = []
    for ask in step.asks:
        item: dict[str, Any] = {"id": ask.seq_id, "at": ask.at, "token_ids": ask.token_ids}
        if (start := ask.start) is not None:
            item |= {
                "temperature": start.temperature,
                "num_prompt": start.num_prompt,
                "index": start.completion_index,
                "seed": start.seed,
                "eos_token_ids": start.eos_ids,
                "params": start.params,
            }
            if start.cache_salt is not None:
                item["cache_salt"] = start.cache_salt
        sequences.append(item)
    body = {
        "version": VERSION,
        "client": step.client,
        "call": step.call,
        "sequences": sequences,
        "is_prefill": any(ask.start is not None for ask in step.asks),
    }
    return {**body, "release": step.release} if step.release else body


def read_step(data: Mapping[str, Any], max_sequences: int) -> Step:
    """The server's reading of `step_json`. Raises WireError."""
    if (version := data.get("version")) != VERSION or type(version) is not int:
        raise WireError(f"version {_show(version)} is not spoken here; the versions are [{VERSION}]")
    client = data.get("client")
    if not (isinstance(client, str) and 0 < len(client) <= MAX_CLIENT_CHARS and client.isascii()):
        raise WireError(f"client must be a text of 1 to {MAX_CLIENT_CHARS} ASCII characters")
    _known(data, "the call", ("version", "client", "call", "sequences", "is_prefill", "release"))
    items = _list(data.get("sequences"), "sequences", max_sequences)
    asks = [_read_ask(item, f"sequences[{i}]") for i, item in enumerate(items)]
    if len({ask.seq_id for ask in asks}) != len(asks):
        raise WireError("sequences names an id twice")
    _flag(data)
    release = _ids(data.get("release", []), "release", highest=MAX_ID)
    return Step(client, _int(data.get("call"), "call", 0, MAX_ID), asks, release)


def _read_ask(item: Any, where: str) -> Ask:
    if not isinstance(item, dict):
        raise WireError(f"{where} must be an object")
    seq_id = _int(item.get("id"), f"{where}.id", 0, MAX_ID)
    at = _int(item.get("at"), f"{where}.at", 1, MAX_ID)
    token_ids = _ids(item.get("token_ids"), f"{where}.token_ids")
    if len(item) == 3:
        if len(token_ids) > at:
            raise WireError(f"{where}.token_ids holds {len(token_ids)} ids of a sequence of {at}")
        return Ask(seq_id, at, token_ids, None)
    _known(item, where, _START_FIELDS)
    if len(token_ids) != at:
        raise WireError(f"{where} begins, so token_ids must hold all of its {at} tokens; it holds {len(token_ids)}")
    params = item.get("params", {})
    if not isinstance(params, dict):
        raise WireError(f"{where}.params must be an object")
    start = Start(
        _int(item.get("num_prompt"), f"{where}.num_prompt", 1, at),
        _int(item.get("index"), f"{where}.index", 0, 2**32 - 1),
        _int(item.get("seed"), f"{where}.seed", 0, 2**64 - 1),
        tuple(_ids(item.get("eos_token_ids", []), f"{where}.eos_token_ids")),
        _number(item.get("temperature"), f"{where}.temperature"),
        params,
        item.get("cache_salt"),  # what it must be, the request checks
    )
    return Ask(seq_id, at, token_ids, start)


# -------------------------------------------------------------------------- version 1: what is answered


class Answer(NamedTuple):
    """What a step gave one sequence. Nothing at all: it is still being computed, ask again."""

    token: int | None = None
    is_unknown: bool = False  # the server does not know it (any more): send all of it
    error: str | None = None  # ends this sequence only
    logprob: TokenLogprob | None = None
    prompt_logprobs: Sequence[TokenLogprob] | None = None  # with the first token


def answers_json(step: Step, answers: Sequence[Answer]) -> dict[str, Any]:
    body: dict[str, Any] = {
        "version": VERSION,
        "call": step.call,
        "ids": [ask.seq_id for ask in step.asks],
        "token_ids": [answer.token for answer in answers],
    }
    pairs = [(str(ask.seq_id), answer) for ask, answer in zip(step.asks, answers, strict=True)]
    if unknown := [ask.seq_id for ask, answer in zip(step.asks, answers, strict=True) if answer.is_unknown]:
        body["unknown"] = unknown
    for name, found in (
        ("errors", {i: a.error for i, a in pairs if a.error is not None}),
        ("logprobs", {i: _logprob_json(a.logprob) for i, a in pairs if a.logprob is not None}),
        (
            "prompt_logprobs",
            {i: [_logprob_json(lp) for lp in a.prompt_logprobs] for i, a in pairs if a.prompt_logprobs is not None},
        ),
    ):
        if found:
            body[name] = found
    return body


def read_answers(data: Any, step: Step, vocab_size: int | None) -> list[Answer]:
    """The client's reading of `answers_json`: one per sequence that was asked about, in order.

    Raises WireError where the whole answer is not one to this call; what is wrong with one sequence is its `error`.
    """
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise WireError(f"the answer is none of version {VERSION}")
    if data.get("call") != step.call or data.get("ids") != [ask.seq_id for ask in step.asks]:
        raise WireError("the answer is to another call")
    tokens = _list(data.get("token_ids"), "token_ids", len(step.asks), at_least=len(step.asks))
    if len(data) == 4:  # the common step: a token each
        return [_token_answer(token, vocab_size) for token in tokens]
    unknown = data.get("unknown", [])
    errors, logprobs, prompts = (data.get(name, {}) for name in ("errors", "logprobs", "prompt_logprobs"))
    if not isinstance(unknown, list) or not all(isinstance(part, dict) for part in (errors, logprobs, prompts)):
        raise WireError("unknown must be a list, errors, logprobs and prompt_logprobs objects")
    answers = []
    for ask, token in zip(step.asks, tokens, strict=True):
        key = str(ask.seq_id)
        if key in errors:
            answers.append(Answer(error=_show(errors[key], 500) if isinstance(errors[key], str) else "(no text)"))
        elif ask.seq_id in unknown:
            answers.append(Answer(is_unknown=True))
        else:
            answer = _token_answer(token, vocab_size)
            try:
                if answer.token is not None and key in logprobs:
                    answer = answer._replace(logprob=_read_logprob(logprobs[key], answer.token, f"logprobs.{key}"))
                if key in prompts:
                    answer = answer._replace(prompt_logprobs=_read_prompt_logprobs(prompts[key], ask, key))
            except WireError as e:
                answer = Answer(error=e.message)
            answers.append(answer)
    return answers


def _token_answer(token: Any, vocab_size: int | None) -> Answer:
    if token is None:
        return Answer()
    if type(token) is not int or not 0 <= token < (2**31 if vocab_size is None else vocab_size):
        return Answer(error=f"the token {_show(token)} is none of a vocabulary of {vocab_size or 'any size'}")
    return Answer(token)


def _logprob_json(lp: TokenLogprob) -> list[Any]:
    """[id, logprob, rank, [[id, logprob], ...]]; null is minus infinity, which JSON has no number for."""
    return [lp.token_id, _finite(lp.logprob), lp.rank, [[i, _finite(value)] for i, value in lp.top]]


def _finite(logprob: float) -> float | None:
    return logprob if logprob > -math.inf else None


def _read_logprob(data: Any, token: int, where: str) -> TokenLogprob:
    def value(number: Any) -> float:
        if number is None:
            return -math.inf
        if type(number) not in (int, float) or not -1e300 < number <= 0.001:  # 0 is the most; servers round
            raise WireError(f"{where} holds {_show(number)}, which is no log-probability")
        return float(number)

    match data:
        case [int(token_id), logprob, int(rank), list(top)] if token_id == token and rank >= 1:
            pairs = tuple((_int(i, where, 0, 2**31 - 1), value(lp)) for i, lp in map(_pair, top))
            return TokenLogprob(token, value(logprob), rank, pairs)
    raise WireError(f"{where} is not [{token}, logprob, rank, [[id, logprob], ...]]")


def _pair(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise WireError(f"{_show(value)} is no [id, logprob]")
    return value[0], value[1]


def _read_prompt_logprobs(data: Any, ask: Ask, key: str) -> list[TokenLogprob]:
    where = f"prompt_logprobs.{key}"
    scored = ask.unscored if ask.start is None else ask.token_ids[1 : ask.start.num_prompt]
    if not isinstance(data, list) or len(data) not in (0, len(scored)):
        raise WireError(f"{where} does not hold one for each of {len(scored)} tokens")
    return [_read_logprob(item, token, where) for item, token in zip(data, scored, strict=False)]


# ------------------------------------------------------------------------------------ the seeds' words


class Plain(NamedTuple):
    """A sequence in the seeds' words: all of it, and its temperature."""

    token_ids: Sequence[int]
    temperature: float


def sequences_json(plain: Sequence[Plain], is_prefill: bool) -> dict[str, Any]:
    """For STEP_PATH."""
    return {
        "sequences": [{"token_ids": p.token_ids, "temperature": p.temperature} for p in plain],
        "is_prefill": is_prefill,
    }


def read_sequences(data: Mapping[str, Any], max_sequences: int) -> list[Plain]:
    _known(data, "the call", ("sequences", "is_prefill"))
    _flag(data)
    plain = []
    for i, item in enumerate(_list(data.get("sequences"), "sequences", max_sequences)):
        where = f"sequences[{i}]"
        if not isinstance(item, dict):
            raise WireError(f"{where} must be an object")
        _known(item, where, ("token_ids", "temperature"))
        ids = _ids(item.get("token_ids"), f"{where}.token_ids")
        plain.append(Plain(ids, _number(item.get("temperature", 1.0), f"{where}.temperature")))
    return plain


def batch_json(contexts: Sequence[Sequence[int]], temperature: float, is_prefill: bool) -> dict[str, Any]:
    """For BATCH_PATH: one temperature for all."""
    return {"token_ids": contexts, "is_prefill": is_prefill, "temperature": temperature}


def read_batch(data: Mapping[str, Any], max_sequences: int) -> list[Plain]:
    _known(data, "the call", ("token_ids", "is_prefill", "temperature"))
    _flag(data)
    temperature = _number(data.get("temperature", 1.0), "temperature")
    contexts = _list(data.get("token_ids"), "token_ids", max_sequences)
    return [Plain(_ids(ids, f"token_ids[{i}]"), temperature) for i, ids in enumerate(contexts)]


def tokens_json(tokens: Sequence[int]) -> dict[str, Any]:
    return {"token_ids": tokens}


def read_tokens(data: Any, num: int, vocab_size: int | None) -> list[Answer]:
    """The answer to both shapes. Raises WireError; a token outside of the vocabulary is its sequence's `error`."""
    tokens = data.get("token_ids") if isinstance(data, dict) else None
    if not isinstance(tokens, list) or len(tokens) != num:
        raise WireError(f"the answer does not hold token_ids for {num} sequences")
    return [Answer(error="no token came") if t is None else _token_answer(t, vocab_size) for t in tokens]


# ---------------------------------------------------------------------------------------- as JSON, strictly


def dumps(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def loads(raw: bytes) -> dict[str, Any]:
    """A JSON object: UTF-8, finite numbers. Raises WireError."""
    try:
        data = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise WireError("the body is nested too deeply") from None
    except ValueError as e:  # no JSON, no UTF-8, or a number too long to read
        raise WireError(f"the body is no JSON: {_show(str(e), 100)}") from None
    if not isinstance(data, dict):
        raise WireError("the body must be a JSON object")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _known(data: Mapping[str, Any], where: str, names: Iterable[str]) -> None:
    if unknown := data.keys() - set(names):
        raise WireError(f"{where} holds {_show(min(unknown))}, which is not known")


def _flag(data: Mapping[str, Any]) -> None:
    """Every context is whole, so nothing depends on is_prefill; it must make sense all the same."""
    if type(value := data.get("is_prefill", False)) is not bool:
        raise WireError(f"is_prefill must be true or false, not {_show(value)}")


def _int(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # True is an int to Python, not to us
        raise WireError(f"{where} must be a whole number from {low} to {high}, not {_show(value)}")
    return value


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not -1e300 < value < 1e300:  # no NaN, and no integer that no float can be
        raise WireError(f"{where} must be a number, not {_show(value)}")
    return float(value)


def _list(value: Any, where: str, most: int, at_least: int = 0) -> list[Any]:
    if not isinstance(value, list):
        raise WireError(f"{where} must be a list")
    if not at_least <= len(value) <= most:
        raise WireError(f"{where} holds {len(value)} items where {at_least or 'at most'} {most} are allowed")
    return value


def _ids(value: Any, where: str, highest: int = 2**31 - 1) -> list[int]:
    if not isinstance(value, list):
        raise WireError(f"{where} must be a list of whole numbers")
    if value and not (set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= highest):
        wrong = next(i for i in value if type(i) is not int or not 0 <= i <= highest)
        raise WireError(f"{where} holds {_show(wrong)}, which is no id")
    return value


def _show(value: Any, limit: int = 60) -> str:
    if isinstance(value, str):
        text = "".join(c if c.isprintable() else " " for c in value[: limit + 1])
        return text if len(text) <= limit else text[: limit - 3] + "..."
    return show(value)
