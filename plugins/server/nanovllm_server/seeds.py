"""GET /healthz, POST /v1/chat and /v1/chat/stream: the API of the founding documents, with their exact keys.

A stream's events are `{"token": text}`, and the last is `{"done": true, "token": "[DONE]", "metrics": {...}}`: it is
`done` that ends it, so that a model may write "[DONE]" like any other text. Knows nothing of OpenAI's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from nanovllm.request import MAX_TOKENS, Request, SamplingParams

from .answer import most_tokens
from .body import read_json
from .call import open_call
from .errors import ApiError
from .openai_answers import Answered
from .openai_schema import Body, Label, Messages, checked
from .openapi import Operation
from .routing import as_json, get, post
from .sse import EventStream, event

if TYPE_CHECKING:
    from fastapi import Request as HTTPRequest
    from fastapi import Response
    from starlette.routing import BaseRoute

    from nanovllm.request import Delta

    from .call import Call
    from .state import State


class SeedsChat(Body):
    """POST /v1/chat and /v1/chat/stream"""

    model: Label | None = Field(default=None, description="a label: `metrics.model` says which model has answered")
    messages: Messages
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 = always the most likely token")
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS, description="null = to the model's length")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=2**31, description="only the k most likely tokens; 0 or -1 = all")


class SeedsMetrics(Answered):
    """Seconds, unrounded, from the arrival of the request; a figure that there is none of is null."""

    ttft: float | None = Field(description="to the first token; null when the answer is not streamed")
    total_latency: float
    tokens_per_second: float | None = Field(description="(input_tokens + output_tokens) / total_latency")
    output_tokens_per_second: float | None = Field(description="output_tokens / total_latency")
    input_tokens: int
    output_tokens: int
    tpot: float | None = Field(description="mean time per token after the first; null for a single one")
    model: str


class SeedsAnswer(Answered):
    content: str
    metrics: SeedsMetrics


class Health(Answered):
    status: Literal["ok"]
    backend: str = Field(description="the runner")
    device: str | None = Field(description="null where the runner does not know, as when another server computes")
    model_dir: str | None = Field(description="the configuration's `model:`; null with server.hide_model_dir")


OPERATIONS = (
    Operation(
        method="get",
        path="/healthz",
        summary="Is it well, and what is it?",
        answer=Health,
        statuses={503: "it is not: `code` is loading, draining, stalled or dead"},
    ),
    Operation(method="post", path="/v1/chat", summary="Answer a conversation", body=SeedsChat, answer=SeedsAnswer),
    Operation(
        method="post",
        path="/v1/chat/stream",
        summary="Answer a conversation, token by token",
        body=SeedsChat,
        content_type="text/event-stream",
    ),
)


def routes(state: State) -> list[BaseRoute]:
    async def healthz(http: HTTPRequest) -> Response:
        if (status := state.status) != "ready":
            raise ApiError(503, f"the server is {status}", code=status)
        parts = state.llm.components
        return as_json(
            {
                "status": "ok",
                "backend": state.runner_name,
                "device": state.llm.info.description.get("device"),
                "model_dir": None if state.options.hide_model_dir or parts is None else parts.loaded.config.model,
            }
        )

    async def chat(http: HTTPRequest) -> Response:
        async with open_call(state, http, [await asked(http)], is_stream=False) as call:
            await call.finish()
            return as_json({"content": call.completions[0].text, "metrics": _metrics(state, call, is_stream=False)})

    async def stream(http: HTTPRequest) -> Response:
        opened = open_call(state, http, [await asked(http)], is_stream=True)
        return EventStream(opened, _Events(state), state.options)

    async def asked(http: HTTPRequest) -> Request:
        """Raises ApiError."""
        body = checked(SeedsChat, await read_json(http, state.options))
        params = SamplingParams(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            max_tokens=most_tokens(state, body.max_tokens, "max_tokens"),
        )
        return Request(prompt=[message.plain() for message in body.messages], params=params)

    return [get("/healthz", healthz), post("/v1/chat", chat), post("/v1/chat/stream", stream)]


class _Events:
    """An sse.Format."""

    def __init__(self, state: State) -> None:
        self._state = state

    def begin(self, call: Call) -> None:
        self._call = call

    def step(self, choice: int, delta: Delta) -> str:
        return event({"token": delta.text}) if delta.text else ""

    def last(self) -> str:
        return event({"done": True, "token": "[DONE]", "metrics": _metrics(self._state, self._call, is_stream=True)})


def _metrics(state: State, call: Call, *, is_stream: bool) -> dict[str, Any]:
    """Of a call that is over."""
    stats = call.completions[0].stats
    num_input, num_output, seconds = stats.num_prompt_tokens, stats.num_output_tokens, stats.total_time
    return {
        "ttft": stats.ttft if is_stream else None,
        "total_latency": seconds,
        # A clock may be too coarse for a short answer.
        "tokens_per_second": (num_input + num_output) / seconds if seconds else None,
        "output_tokens_per_second": num_output / seconds if seconds else None,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "tpot": stats.tpot,
        "model": state.model_name,
    }
