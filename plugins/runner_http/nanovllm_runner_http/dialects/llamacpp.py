"""Dialect `llamacpp`: llama.cpp's own API, as llama-server and llamafile speak it.

https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md

Two ages of it. Since the end of 2024 events carry token ids and `stop_type`; before (llamafile 0.8) they carry text
only and `stopped_eos`, `stopped_word`, `stopped_limit`: such a server is spoken to in text. Knows no socket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.batch import ALL_PARAMETERS, ScheduledSeq, TokenLogprob
from nanovllm.errors import RequestError
from nanovllm.request import Finish, SamplingParams
from nanovllm.tokenizer import Tokenizer

from ..errors import UpstreamError, one_line
from . import Exchange, Facts, Piece, upstream_seed
from .openai import ChatReader
from .shared import (
    asked,
    check_same_vocabulary,
    complaint,
    conversation,
    count,
    field,
    found,
    ids,
    logprob,
    parsed,
    served_models,
)
from .utf8_gaps import Gaps

if TYPE_CHECKING:
    from ..sse import Event
    from ..transport import Transport

NUM_SEEDS = 2**32 - 1  # 2**32 - 1 itself asks for a random one

# llama.cpp's samplers, in an order that gives what ours gives: temperature comes before top-p and min-p (theirs has it
# last). Whether it comes before top-k makes no difference to the result, and after it there is less to compute. A
# server that does not know a name leaves it out.
SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "temperature", "top_p", "min_p", "xtc")

# What the parameters cannot say, switched off: a server's own defaults come from its command line.
NEUTRAL: Mapping[str, Any] = {
    "samplers": list(SAMPLERS), "dry_multiplier": 0.0, "xtc_probability": 0.0, "typical_p": 1.0, "mirostat": 0,
    "dynatemp_range": 0.0, "top_n_sigma": -1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "n_keep": 0,
    "cache_prompt": True,
}  # fmt: skip

EXTRA_FIELDS = frozenset(
    [*NEUTRAL, "grammar", "json_schema", "id_slot", "min_keep", "lora", "t_max_predict_ms", "dry_base",
     "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold", "mirostat_tau",
     "mirostat_eta", "dynatemp_exponent"]
)  # fmt: skip

# It counts the tokens of the prompt in presence and frequency penalties; ours count the answer's. It cannot hold
# back an end, nor score a prompt.
SUPPORTS = ALL_PARAMETERS - {"presence_penalty", "frequency_penalty", "min_tokens", "prompt_logprobs"}
NEEDS_IDS = frozenset(["logprobs", "stop_token_ids"])

# How an answer ended, in new words and in old ones.
_STOP_TYPES = {"eos": Finish.STOP, "word": Finish.STOP, "limit": Finish.LENGTH}
_STOPPED = {"stopped_eos": Finish.STOP, "stopped_word": Finish.STOP, "stopped_limit": Finish.LENGTH}


class LlamaCpp:
    name = "llamacpp"
    supports = SUPPORTS
    extra_fields = EXTRA_FIELDS

    def __init__(self, tokenizer: Tokenizer | None = None, model: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._gaps = None if tokenizer is None else Gaps(tokenizer)
        self._model = model  # as configured

    # ------------------------------------------------------------------------------------ probing

    def probe(self, transport: Transport) -> Facts | None:
        props = found(transport, "/props")
        if props is None or not isinstance(settings := props.get("default_generation_settings"), dict):
            return None
        name, listed = next(iter((served_models(transport) or {}).items()), (None, {}))
        meta = listed["meta"] if isinstance(listed.get("meta"), dict) else {}
        vocab_size, length = count(meta.get("n_vocab")), count(settings.get("n_ctx"))
        # The one answer that tells the age for certain. Token 0 exists in every vocabulary.
        tiny = {"prompt": [0], "n_predict": 1, "temperature": 0, "return_tokens": True}
        has_ids = isinstance(asked(transport, "/completion", tiny).get("tokens"), list)
        facts = Facts(
            dialect=self.name,
            model=self._model or name,
            vocab_size=vocab_size,
            max_model_len=length,
            num_slots=count(props.get("total_slots")),
            eos_ids=special_ids(transport, props.get("eos_token")) if has_ids else (),
            takes_ids=has_ids,
            lacks=(frozenset() if has_ids else NEEDS_IDS) | (frozenset() if length else {"repetition_penalty"}),
            description={
                "server": one_line(f"llama.cpp {props.get('build_info') or ('' if has_ids else 'before 2025')}"),
                "path": props.get("model_path") and one_line(props["model_path"]),
                "has_chat_template": bool(props.get("chat_template")) if "chat_template" in props else None,
            },
        )
        if has_ids and self._tokenizer is not None:
            check_same_vocabulary(
                transport.url,
                self._tokenizer,
                vocab_size,
                lambda sample: field(asked(transport, "/detokenize", {"tokens": sample}), "content", str),
            )
        return facts

    # ---------------------------------------------------------------------------------- answering

    def exchange(self, seq: ScheduledSeq, facts: Facts, extra: Mapping[str, Any]) -> Exchange:
        body = {**_body(seq, facts), **NEUTRAL, **extra}
        if seq.cache_salt is not None:  # it cannot keep caches apart
            body["cache_prompt"] = False
        if (messages := conversation(seq.prompt)) is not None:
            # By the server's template. What it streams then is OpenAI's, without token ids.
            if refused := NEEDS_IDS & seq.sampling.params.changed():
                raise RequestError(
                    f"{', '.join(sorted(refused))} needs token ids, which a conversation's answer does not carry",
                    hint="set tokenizer: http, or one of your own",
                )
            chat = {"messages": messages, "max_tokens": body.get("n_predict")}
            return Exchange("/v1/chat/completions", body | chat, ChatReader())
        body |= {"prompt": seq.prompt if isinstance(seq.prompt, str) else seq.context.tolist(), "return_tokens": True}
        if seq.prompt is not None:
            # In ids mode the engine needs every token's own text, in text mode the stop is given back below.
            body["stop"] = list(seq.sampling.params.stop)
        read = _Reader(
            num_logprobs=seq.sampling.params.logprobs,
            gives_text=seq.prompt is not None,
            has_ids=facts.takes_ids,
            gaps=None if seq.prompt is not None else self._gaps,
        )
        return Exchange("/completion", body, read)


def _body(seq: ScheduledSeq, facts: Facts) -> dict[str, Any]:
    params: SamplingParams = seq.sampling.params
    room = None if facts.max_model_len is None else max(1, facts.max_model_len - len(seq.context))
    limits = [n for n in (params.max_tokens, room) if n is not None]
    body: dict[str, Any] = {
        "model": facts.model,
        "stream": True,
        "temperature": params.temperature,
        # The most likely token is the same among all and alone; among all, it takes a softmax of the whole vocabulary.
        "top_k": params.top_k if params.temperature > 0 else 1,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repeat_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
    }
    if params.temperature > 0:
        body["seed"] = upstream_seed(seq.sampling, NUM_SEEDS)
    if limits:
        body["n_predict"] = min(limits)
    if facts.max_model_len is not None:
        # All of the context; the server sets memory aside for as many tokens as it is told.
        body["repeat_last_n"] = facts.max_model_len
    if params.logit_bias:
        body["logit_bias"] = [[token, bias] for token, bias in params.logit_bias.items()]
    if params.logprobs is not None:
        body["n_probs"] = max(1, params.logprobs)
    return body


class _Reader:
    """Reads one stream of `/completion`."""

    def __init__(self, *, num_logprobs: int | None, gives_text: bool, has_ids: bool, gaps: Gaps | None) -> None:
        self._num_logprobs = num_logprobs
        self._gives_text = gives_text
        self._has_ids = has_ids
        self._gaps = gaps
        self._num_tokens = 0  # that the server had generated by the last event

    def __call__(self, event: Event) -> Piece | None:
        if event.data == "[DONE]":
            return None
        data = parsed(event)
        if event.type == "error" or "error" in data:
            raise complaint(data)
        if data.get("index", 0) != 0:
            raise UpstreamError(f"it answered for sequence {data['index']}, where there is only 0")
        if "prompt_progress" in data:
            return None
        text: str = field(data, "content", str)
        if field(data, "stop", bool):
            return self._end(data, text)
        if not self._has_ids:
            return Piece(text=text) if text else None
        return self._tokens(data, text)

    def _tokens(self, data: dict[str, Any], text: str) -> Piece | None:
        tokens = ids(data.get("tokens"))
        if not tokens and not text:
            return None
        expected = self._num_tokens + len(tokens)
        self._num_tokens = field(data, "tokens_predicted", int) if "tokens_predicted" in data else expected
        num_missing = self._num_tokens - expected
        logprobs = None if self._num_logprobs is None else self._logprobs(data, tokens)
        if num_missing > 0 and self._gaps is not None and len(tokens) == 1 and logprobs is None:
            filled = self._gaps.fill(text, tokens[0], num_missing)
            if filled is not None:
                return Piece((*filled, *tokens))
        # Of tokens that cannot be told there is the server's text.
        return Piece(tokens, text if self._gives_text or num_missing > 0 else None, logprobs)

    def _end(self, data: dict[str, Any], text: str) -> Piece:
        if "stop_type" in data:
            finish = _STOP_TYPES.get(str(data["stop_type"]))
        else:
            finish = next((finish for name, finish in _STOPPED.items() if data.get(name)), None)
        if finish is None:
            finish = Finish.LENGTH if data.get("truncated") else None
        if finish is None:
            raise UpstreamError("it ended the answer without a reason")
        if not self._gives_text:
            return Piece(finish=finish)
        # The stop that it found is no part of its text. The engine looks for it there, and takes it out again.
        word = data.get("stopping_word")
        return Piece(text=text + (word if isinstance(word, str) else ""), finish=finish)

    def _logprobs(self, data: dict[str, Any], tokens: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
        entries = data.get("completion_probabilities")
        if not isinstance(entries, list) or len(entries) != len(tokens):
            raise UpstreamError(f"it sent no log-probabilities for {len(tokens)} tokens")
        assert self._num_logprobs is not None, "asked for"
        read = []
        for token, entry in zip(tokens, entries, strict=True):
            if not isinstance(entry, dict) or not isinstance(top := entry.get("top_logprobs"), list):
                raise UpstreamError(f"it sent log-probabilities without 'top_logprobs' for token {token}")
            pairs = [(e.get("id"), e.get("logprob")) for e in top if isinstance(e, dict)]
            read.append(logprob(token, entry.get("logprob"), pairs, self._num_logprobs))
        return tuple(read)


def special_ids(transport: Transport, text: object) -> tuple[int, ...]:
    """The id of a special token of llama-server's by its name; nothing if that is no single token."""
    if not isinstance(text, str) or not text:
        return ()
    body = {"content": text, "add_special": False, "parse_special": True}
    tokens = ids(asked(transport, "/tokenize", body).get("tokens"))
    return tokens if len(tokens) == 1 else ()
