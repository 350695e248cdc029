"""Intake: the engine's door. Turns a Request into sequences, or refuses it with the numbers.

Everything is checked here, before any state changes, so that an accepted request can always run.
Thread-safe: `prepare` reads facts that never change. Knows no runner and no scheduler.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batch import Remote, RunnerInfo, Sampling
from .blocks import salt_bytes
from .errors import ConfigError, PromptTooLong, RequestError
from .request import Completion, Output, PacedRequest, Request, SamplingParams
from .sequence import Sequence
from .stats import Phase
from .tokenizer import Tokenizer, TokenStream

# What changes logits before a token is chosen, so that the largest of the raw ones says nothing.
ADJUSTING = frozenset(["repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens"])
# What makes a sample more than the argmax of the raw logits, besides a temperature.
_NOT_PLAIN = ADJUSTING | {"logprobs"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold, in tokens."""

    max_len: int  # prompt + generated of one sequence: the model's length or the KV pool's
    max_num_batched_tokens: int  # per step
    is_preemptible: bool  # may a sequence have to be recomputed from the start?
    can_share: bool  # is prefix caching on?


class Ticket:
    """An accepted request: its sequences, and its output once all have ended."""

    __slots__ = ("prompt_ids", "request", "request_id", "sequences", "tokenize")

    def __init__(self, request_id: int, request: Request, prompt_ids: tuple[int, ...], tokenize: Phase) -> None:
        self.request_id = request_id
        self.request = request
        self.prompt_ids = prompt_ids
        self.tokenize = tokenize  # the first of the pipeline's five phases; StepStats.phases has the others
        self.sequences: list[Sequence] = []

    def output(self, completions: Iterable[Completion]) -> Output:
        leader = self.sequences[0]
        return Output(
            self.request_id,
            self.prompt_ids,
            tuple(sorted(completions, key=lambda c: c.index)),
            (None, *leader.prompt_logprobs) if leader.scores_prompt else None,
        )


class Intake:
    def __init__(
        self,
        info: RunnerInfo,
        tokenizer: Tokenizer | None,
        limits: Limits,
        *,
        eos_ids: Iterable[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if tokenizer is None and not info.tokenizes:
            raise ConfigError("this runner takes token ids, not text, so it needs a tokenizer", hint="set `tokenizer:`")
        if tokenizer is not None and info.vocab_size is not None and tokenizer.vocab_size > info.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} entries but the model only {info.vocab_size}: "
                "they do not belong together",
                hint="point tokenizer.path at the tokenizer that came with the model",
            )
        self.info = info
        self.limits = limits
        self.tokenizer = tokenizer
        # What ends an answer: the user's ids if given, else all that the model's and the tokenizer's files name.
        width = info.vocab_size
        if eos_ids is None:
            named = dict.fromkeys((*info.eos_ids, *(tokenizer.eos_ids if tokenizer is not None else ())))
            self.eos_ids = tuple(i for i in named if width is None or i < width)
        else:
            self.eos_ids = tuple(dict.fromkeys(eos_ids))
            if width is not None and any(not 0 <= i < width for i in self.eos_ids):
                raise ConfigError(f"eos {list(self.eos_ids)} lies outside the model's vocabulary of {width} entries")
        self._clock = clock
        self._request_ids = itertools.count(1)
        self._seq_ids = itertools.count(1)

    def prepare(self, request: Request) -> Ticket:
        """Check, tokenize and resolve a request. Raises RequestError (and TokenizerError from templates)."""
        if not isinstance(request, Request):
            raise RequestError(f"a request is a nanovllm.Request, not {type(request).__name__}")
        started = self._clock()
        params, info = request.params, self.info
        if unsupported := params.changed() - info.supports - {"max_tokens"}:
            raise RequestError(f"this runner does not support {', '.join(sorted(unsupported))}")
        ids = self._encode(request)
        if info.vocab_size is not None:
            for what, some in (
                ("the prompt", ids),
                ("stop_token_ids", params.stop_token_ids),
                ("logit_bias", params.logit_bias or ()),
            ):
                wrong = next((i for i in some if i >= info.vocab_size), None)
                if wrong is not None:
                    raise RequestError(
                        f"{what} holds the token id {wrong}, but the model's vocabulary has {info.vocab_size} entries"
                    )
        num_prompt = request.num_prompt if isinstance(request, PacedRequest) else len(ids)
        self._check_length(len(ids), num_prompt, params)
        tokenize = Phase("tokenize", started, self._clock() - started, len(ids))
        ticket = Ticket(next(self._request_ids), request, tuple(ids), tokenize)
        ticket.sequences = self._sequences(ticket, started)
        return ticket

    def _encode(self, request: Request) -> list[int]:
        prompt: Any = request.prompt
        is_array = isinstance(prompt, np.ndarray)
        if (is_array and prompt.size == 0) or (isinstance(prompt, (str, list, tuple)) and not prompt):
            raise RequestError("the prompt is empty", hint="give it at least one character or token")
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise RequestError("the prompt contains a lone surrogate, which no text encoding can carry") from None
            if self.tokenizer is None:  # the runner tokenizes
                return []
            ids = self.tokenizer.encode(prompt, request.parse_special)
        elif isinstance(prompt, (list, tuple)) and isinstance(prompt[0], Mapping):
            if self.tokenizer is None:
                return []
            ids = self.tokenizer.chat(prompt)
        elif is_array and prompt.ndim == 1 and prompt.dtype.kind in "iu":
            ids = prompt.tolist()
        elif isinstance(prompt, (list, tuple)):
            if set(map(type, prompt)) != {int}:  # the long way says where, and takes NumPy's integers
                for i, token in enumerate(prompt):
                    if type(token) is not int and not isinstance(token, np.integer):
                        raise RequestError(
                            f"a prompt of token ids holds whole numbers only; prompt[{i}] is a {type(token).__name__}"
                        )
            ids = [int(t) for t in prompt]
        else:
            raise RequestError(f"a prompt is text, token ids or chat messages, not {type(prompt).__name__}")
        if not ids:
            raise RequestError("the prompt has no tokens", hint="give it at least one character or token")
        if not (min(ids) >= 0 and max(ids) < 2**31):
            wrong = next(i for i, token in enumerate(ids) if not 0 <= token < 2**31)
            raise RequestError(f"prompt[{wrong}] is negative or at least 2**31, so it is no vocabulary's token id")
        return ids

    def _check_length(self, num_tokens: int, num_prompt: int, params: SamplingParams) -> None:
        limits, model_len = self.limits, self.info.max_model_len
        if num_tokens >= model_len:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens, but the model's length is {model_len}, "
                "which must also hold the answer",
                hint="shorten the prompt",
            )
        if num_tokens >= limits.max_len:
            raise PromptTooLong(
                f"the prompt has {num_tokens} tokens, but the whole KV cache holds {limits.max_len - 1}",
                hint="shorten the prompt or raise cache.memory",
            )
        if not self.info.can_chunk and not isinstance(self.info.kv, Remote):
            longest = num_tokens
            if limits.is_preemptible:  # with all it has generated, it must fit one step again
                room = limits.max_len - num_prompt
                answer = room if params.max_tokens is None else min(room, params.max_tokens)
                longest = max(longest, num_prompt + answer - 1)
            if longest > limits.max_num_batched_tokens:
                raise RequestError(
                    f"this runner computes a prompt in one step, and {longest} tokens do not fit "
                    f"max_num_batched_tokens ({limits.max_num_batched_tokens})",
                    hint="raise scheduler.max_num_batched_tokens",
                )

    def _sequences(self, ticket: Ticket, arrival: float) -> list[Sequence]:
        request, params, limits = ticket.request, ticket.request.params, self.limits
        paced = request if isinstance(request, PacedRequest) else None
        eos_ids = () if params.ignore_eos else self.eos_ids if paced is None else paced.eos_ids
        stop_ids = frozenset(eos_ids).union(params.stop_token_ids)
        is_greedy = params.temperature == 0 and params.changed().isdisjoint(_NOT_PLAIN)
        salt: bytes | None = None
        if limits.can_share:
            salt = salt_bytes("prefix", request.cache_salt)
        elif request.n > 1 and limits.is_preemptible and self.info.can_resume_prefix:
            # Without prefix caching the siblings of one request still share its prompt, and nobody else does.
            salt = salt_bytes("siblings", str(ticket.request_id))
        seed = secrets.randbits(64) if params.seed is None else params.seed
        prompt = np.array(ticket.prompt_ids, np.int32)
        token_bytes = _no_bytes if self.tokenizer is None or paced is not None else self.tokenizer.token_bytes
        sequences: list[Sequence] = []
        for index in range(request.n) if paced is None else (paced.completion_index,):
            sequences.append(
                Sequence(
                    next(self._seq_ids),
                    ticket.request_id,
                    prompt,
                    Sampling(params, eos_ids, stop_ids, seed, index, is_greedy),
                    TokenStream(token_bytes),
                    order=(request.priority, 0, index),  # the engine fills in the arrival number
                    max_len=limits.max_len,
                    num_prompt=None if paced is None else paced.num_prompt,
                    granted=None if paced is None else 0,
                    cache_salt=salt,
                    arrival=arrival,
                    leader=sequences[0] if sequences and salt is not None else None,
                    prompt=request.prompt if self.info.tokenizes else None,
                    salt=request.cache_salt,
                )
            )
        return sequences


def _no_bytes(token_id: int) -> bytes:
    """For runners that return text themselves, and for callers that do."""
    return b""
