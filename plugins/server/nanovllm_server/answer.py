"""What the answers of completions and chat share: their head and usage, how they end, tokens shown as text.

Events are put together from ready JSON: this is called for every token. Knows no field of a choice.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nanovllm.request import Finish

from .call import open_call
from .errors import ApiError
from .routing import as_json
from .sse import DONE, EventStream

if TYPE_CHECKING:
    from fastapi import Request as HTTPRequest
    from fastapi import Response

    from nanovllm.batch import TokenLogprob
    from nanovllm.request import Completion, Delta, Request
    from nanovllm.tokenizer import Tokenizer

    from .call import Call, Usage
    from .openai_schema import Sampling
    from .state import State

LEAST_LOGPROB = -9999.0  # OpenAI's number for minus infinity, which JSON cannot say
REASONS = {None: "null", Finish.STOP: '"stop"', Finish.LENGTH: '"length"'}  # as JSON; a Call raises for the others


class Answer(ABC):
    """One call's answer, whole or (an sse.Format) as events."""

    prefix: str  # of its id
    kind: str  # `object` of a whole answer
    event_kind: str  # of an event

    def __init__(self, state: State, body: Sampling) -> None:
        self.tokenizer = state.llm.tokenizer
        self._includes_usage = body.includes_usage
        self._facts = {"created": int(time.time()), "model": state.model_name, "system_fingerprint": state.fingerprint}

    @abstractmethod
    def whole_choice(self, choice: int, completion: Completion) -> str:
        """As JSON."""

    @abstractmethod
    def step(self, choice: int, delta: Delta) -> str: ...

    def begin(self, call: Call) -> None:
        self.call = call
        self._before = f'data: {self._head(self.event_kind)}, "choices": ['
        self._behind = '], "usage": null}\n\n' if self._includes_usage else "]}\n\n"

    def event(self, choice: str) -> str:
        """Of one choice, as JSON."""
        return self._before + choice + self._behind

    def last(self) -> str:
        if not self._includes_usage:
            return DONE
        return f'data: {self._head(self.event_kind)}, "choices": [], "usage": {self._usage()}}}\n\n' + DONE

    def whole(self, call: Call) -> str:
        """As JSON, once the call is over."""
        self.call = call
        choices = ", ".join([self.whole_choice(i, call.completions[i]) for i in range(call.num_choices)])
        return f'{self._head(self.kind)}, "choices": [{choices}], "usage": {self._usage()}}}'

    def usage(self) -> Usage:
        return self.call.usage()

    def _usage(self) -> str:
        usage = self.usage()
        return json.dumps(
            {
                "prompt_tokens": usage.num_prompt,
                "completion_tokens": usage.num_output,
                "total_tokens": usage.num_prompt + usage.num_output,
                "prompt_tokens_details": {"cached_tokens": usage.num_cached},
            }
        )

    def _head(self, kind: str) -> str:
        """A JSON object without its end."""
        return json.dumps({"id": f"{self.prefix}-{self.call.request_id}", "object": kind, **self._facts})[:-1]


async def answered(
    state: State, http: HTTPRequest, requests: Sequence[Request], answer: Answer, *, is_stream: bool
) -> Response:
    """Have the requests generated, and answer with events or, once that is over, as a whole. Raises as `open_call`."""
    opened = open_call(state, http, requests, is_stream=is_stream)
    if is_stream:
        return EventStream(opened, answer, state.options)
    async with opened as call:
        await call.finish()
        return as_json(answer.whole(call))


class TokenText:
    """Tokens as logprobs show them."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.bytes: Callable[[int], bytes] = (lambda _: b"") if tokenizer is None else tokenizer.token_bytes

    def __call__(self, token_id: int) -> str:
        """Its text; its bytes where they are no whole characters; its number where it has none."""
        data = self.bytes(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def check_call(state: State, body: Sampling, num_prompts: int) -> None:
    """What the server, not the model, has to say against it. Raises ApiError."""
    options = state.options
    if body.model not in (None, state.model_name):
        raise ApiError(
            404,
            f"there is no model {body.model!r} here; it is {state.model_name!r}",
            param="model",
            code="model_not_found",
        )
    if not 0 < num_prompts <= options.max_prompts:
        raise ApiError(400, f"prompt holds {num_prompts} prompts, not 1 to {options.max_prompts}", param="prompt")
    if num_prompts * body.n > options.max_choices:
        raise ApiError(400, f"{num_prompts} prompts times n = {body.n} is more than {options.max_choices}", param="n")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if body.priority < 0 and not options.allow_priority:
        raise ApiError(400, "priority: this server lets nobody run ahead of others", param="priority")


def most_tokens(state: State, asked: int | None, param: str) -> int | None:
    """What was asked for, or else the server's cap. Raises ApiError for more than that."""
    most = state.options.max_tokens
    if asked is not None and most is not None and asked > most:
        raise ApiError(400, f"{param} is {asked}; this server gives at most {most}", param=param)
    return most if asked is None else asked


def best(entry: TokenLogprob) -> dict[int, float]:
    """The asked-for most likely tokens, and the one that was taken."""
    return dict(entry.top) | {entry.token_id: entry.logprob}
