"""Dialect `openai`: `/v1/completions` and `/v1/chat/completions`, as many servers speak them.

The API takes text and gives text. vLLM also takes and gives token ids, and knows all of our parameters; what others
know besides OpenAI's own is in KINDS. Stops are left to the engine: the API does not say which one it found, and
takes four at most. Knows no socket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.batch import ALL_PARAMETERS, ScheduledSeq, TokenLogprob
from nanovllm.errors import ConfigError, RequestError
from nanovllm.request import Finish, SamplingParams
from nanovllm.tokenizer import Tokenizer

from ..errors import UpstreamError, one_line
from . import Exchange, Facts, Piece, upstream_seed
from .shared import (
    asked,
    check_same_vocabulary,
    complaint,
    conversation,
    count,
    field,
    ids,
    logprob,
    parsed,
    served_models,
)

if TYPE_CHECKING:
    from ..sse import Event
    from ..transport import Transport

NUM_SEEDS = 2**31  # what every server takes

STANDARD = frozenset(
    ["temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "max_tokens", "stop"]
)
NEEDS_IDS = frozenset(["logprobs", "stop_token_ids"])

# Parameters besides the standard ones: ours -> what the server calls it. They are always sent, because a server's
# defaults are its own (llama-cpp-python: top_k 40, min_p 0.05, repeat_penalty 1.1).
KINDS: Mapping[str, Mapping[str, str]] = {
    "vllm": {
        "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty", "min_tokens": "min_tokens",
        "ignore_eos": "ignore_eos", "stop_token_ids": "stop_token_ids",
    },
    "llama.cpp": {"top_k": "top_k", "min_p": "min_p", "ignore_eos": "ignore_eos"},
    "llama-cpp-python": {"top_k": "top_k", "min_p": "min_p", "min_tokens": "min_tokens"},
    "unknown": {},
}  # fmt: skip
# Their repetition penalty looks at a window of their own, so it is switched off.
NEUTRAL: Mapping[str, Mapping[str, Any]] = {
    "llama.cpp": {"repeat_penalty": 1.0},
    "llama-cpp-python": {"repeat_penalty": 1.0},
}
OWNERS = {"vllm": "vllm", "llamacpp": "llama.cpp", "me": "llama-cpp-python"}  # `owned_by` of a model

EXTRA_FIELDS = frozenset(
    ["user", "response_format", "reasoning_effort", "chat_template_kwargs", "priority", "cache_salt", "guided_json",
     "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar", "top_k", "min_p",
     "repeat_penalty", "repetition_penalty", "service_tier", "keep_alive", "options"]
)  # fmt: skip

_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH}


class OpenAI:
    name = "openai"
    supports = ALL_PARAMETERS - {"prompt_logprobs"}
    extra_fields = EXTRA_FIELDS

    def __init__(self, tokenizer: Tokenizer | None = None, model: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._model = model  # as configured

    # ------------------------------------------------------------------------------------ probing

    def probe(self, transport: Transport) -> Facts | None:
        models = served_models(transport)
        if models is None:
            return None
        name = self._model
        if name is None:
            if len(models) != 1:
                shown = ", ".join(one_line(model, 60) for model in list(models)[:10]) or "none"
                raise ConfigError(f"{transport.url} has {len(models)} models ({shown})", hint="set runner.model")
            (name,) = models
        model = models.get(name, {})
        length = count(model.get("max_model_len"))
        kind = "vllm" if length is not None else OWNERS.get(str(model.get("owned_by")), "unknown")
        takes_ids = kind == "vllm" and self._answers_in_ids(transport, name)
        if takes_ids and self._tokenizer is not None:
            check_same_vocabulary(
                transport.url, self._tokenizer, None, lambda sample: _detokenized(transport, name, sample)
            )
        honoured = STANDARD | KINDS[kind].keys()
        return Facts(
            dialect=self.name,
            model=name,
            max_model_len=length,
            takes_ids=takes_ids,
            kind=kind,
            lacks=self.supports - (honoured | NEEDS_IDS if takes_ids else honoured - NEEDS_IDS),
            description={"server": kind, "models": [one_line(name, 60) for name in sorted(models)[:10]]},
        )

    @staticmethod
    def _answers_in_ids(transport: Transport, model: str) -> bool:
        """Does it know `return_token_ids`? Token 0 exists in every vocabulary."""
        body = {"model": model, "prompt": [0], "max_tokens": 1, "temperature": 0, "return_token_ids": True}
        try:
            answer = asked(transport, "/v1/completions", body)
        except UpstreamError as e:
            if e.status in (400, 404, 422):  # a model for chats only, or one that takes no ids
                return False
            raise
        choices = answer.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        return isinstance(first, dict) and isinstance(first.get("token_ids"), list)

    # ---------------------------------------------------------------------------------- answering

    def exchange(self, seq: ScheduledSeq, facts: Facts, extra: Mapping[str, Any]) -> Exchange:
        params, prompt = seq.sampling.params, seq.prompt
        kind = facts.kind or "unknown"
        body = {**_body(seq, facts), **NEUTRAL.get(kind, {})}
        body |= {theirs: getattr(params, ours) for ours, theirs in KINDS[kind].items()}
        if kind == "vllm":
            body["top_k"] = params.top_k or -1  # 0 means all only to newer ones
            body["stop_token_ids"] = list(params.stop_token_ids)
        body |= dict(extra)
        if kind == "vllm" and seq.cache_salt is not None:
            body["cache_salt"] = seq.cache_salt
        if (messages := conversation(prompt)) is not None:
            if refused := NEEDS_IDS & params.changed():
                raise RequestError(
                    f"{', '.join(sorted(refused))} needs token ids, which a conversation's answer does not carry",
                    hint="set a tokenizer of your own",
                )
            return Exchange("/v1/chat/completions", body | {"messages": messages}, ChatReader())
        if not facts.takes_ids and not isinstance(prompt, str):
            raise RequestError(
                f"a server of dialect openai ({kind}) takes text, not token ids", hint="give the prompt as text"
            )
        body["prompt"] = prompt if isinstance(prompt, str) else seq.context.tolist()
        if not facts.takes_ids:
            return Exchange("/v1/completions", body, TextReader())
        body["return_token_ids"] = True
        if params.logprobs is not None:
            body |= {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}
        return Exchange("/v1/completions", body, IdsReader(params.logprobs, gives_text=prompt is not None))


def _body(seq: ScheduledSeq, facts: Facts) -> dict[str, Any]:
    params: SamplingParams = seq.sampling.params
    limit = params.max_tokens
    if limit is None and facts.max_model_len is not None and len(seq.context):
        limit = max(1, facts.max_model_len - len(seq.context))
    body: dict[str, Any] = {
        "model": facts.model,
        "stream": True,
        "max_tokens": limit,  # null: what there is room for; left out, it would be 16
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    if params.temperature > 0:
        body["seed"] = upstream_seed(seq.sampling, NUM_SEEDS)
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(params, name):
            body[name] = value
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    return body


def _detokenized(transport: Transport, model: str, sample: list[int]) -> str:
    text: str = field(asked(transport, "/detokenize", {"model": model, "tokens": sample}), "prompt", str)
    return text


# --------------------------------------------------------------------------------------------- reading


def _choice(event: Event) -> dict[str, Any] | None:
    """The one choice of an event; None for no news (usage, the end mark). Raises UpstreamError."""
    if event.data == "[DONE]":
        return None
    data = parsed(event)
    if event.type == "error" or data.get("error") or data.get("object") == "error":
        raise complaint(data)
    choices = data.get("choices")
    if choices == []:  # usage
        return None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UpstreamError(f"it sent an event with choices {one_line(repr(choices), 60)} where there is one")
    choice: dict[str, Any] = choices[0]
    if choice.get("index", 0) != 0:
        raise UpstreamError(f"it answered for sequence {one_line(choice['index'], 20)}, where there is only 0")
    return choice


def _piece(choice: dict[str, Any], text: object, tokens: tuple[int, ...] = (),
           logprobs: tuple[TokenLogprob, ...] | None = None) -> Piece | None:  # fmt: skip
    if text is not None and not isinstance(text, str):
        raise UpstreamError(f"it sent a text that is none: {one_line(repr(text), 40)}")
    reason = choice.get("finish_reason")
    if reason is None:
        return Piece(tokens, text, logprobs) if tokens or text else None
    if not isinstance(reason, str) or reason not in _FINISHES:
        raise UpstreamError(f"it ended the answer with {one_line(repr(reason), 40)}")
    return Piece(tokens, text, logprobs, _FINISHES[reason])


class TextReader:
    """Reads one stream of `/v1/completions` as text."""

    def __call__(self, event: Event) -> Piece | None:
        choice = _choice(event)
        return None if choice is None else _piece(choice, choice.get("text") or "")


class ChatReader:
    """Reads one stream of `/v1/chat/completions`. A model's `reasoning` is no part of its answer."""

    def __call__(self, event: Event) -> Piece | None:
        choice = _choice(event)
        if choice is None:
            return None
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise UpstreamError(f"it sent a delta that is none: {one_line(repr(delta), 40)}")
        return _piece(choice, delta.get("content") or "")


class IdsReader:
    """Reads one stream of `/v1/completions` with `return_token_ids`, as vLLM has it."""

    def __init__(self, num_logprobs: int | None, *, gives_text: bool) -> None:
        self._num_logprobs = num_logprobs
        self._gives_text = gives_text

    def __call__(self, event: Event) -> Piece | None:
        choice = _choice(event)
        if choice is None:
            return None
        tokens = ids(choice.get("token_ids") or [])
        logprobs = self._logprobs(choice, tokens) if self._num_logprobs is not None and tokens else None
        text = field(choice, "text", str)
        if text and not tokens and not self._gives_text:
            raise UpstreamError("it sent text without its token ids")
        return _piece(choice, text if self._gives_text else None, tokens, logprobs)

    def _logprobs(self, choice: dict[str, Any], tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        sent = choice.get("logprobs")
        if not isinstance(sent, dict):
            raise UpstreamError("it sent no log-probabilities")
        values, tops = sent.get("token_logprobs"), sent.get("top_logprobs") or [{}] * len(tokens)
        if not isinstance(values, list) or not isinstance(tops, list) or not len(values) == len(tops) == len(tokens):
            raise UpstreamError(f"it sent log-probabilities that do not belong to {len(tokens)} tokens")
        assert self._num_logprobs is not None, "asked for"
        read = []
        for token, value, top in zip(tokens, values, tops, strict=True):
            if not isinstance(top, dict) or any(type(number) not in (int, float) for number in top.values()):
                raise UpstreamError(f"it sent log-probabilities that are no numbers, for token {token}")
            pairs = sorted(((_token_id(name), x) for name, x in top.items()), key=lambda pair: -pair[1])
            read.append(logprob(token, value, pairs[: max(1, self._num_logprobs)], self._num_logprobs))
        return tuple(read)


def _token_id(name: str) -> int:
    """`token_id:123`, which vLLM writes where it was asked to."""
    prefix, _, number = name.partition(":")
    if prefix != "token_id" or not number.isdecimal():
        raise UpstreamError(f"it sent a log-probability for {one_line(repr(name), 40)}, not for a token id")
    return int(number)
