"""POST /v1/chat/completions: a conversation, answered by the model's own template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nanovllm.request import Request

from .answer import REASONS, Answer, TokenText, answered, check_call, finite, most_tokens
from .body import read_json
from .openai_answers import ChatAnswered, ChatChunk
from .openai_schema import ChatRequest, checked
from .openapi import Operation
from .routing import post

if TYPE_CHECKING:
    from fastapi import Request as HTTPRequest
    from fastapi import Response
    from starlette.routing import BaseRoute

    from nanovllm.batch import TokenLogprob
    from nanovllm.request import Completion, Delta

    from .state import State

OPERATIONS = (
    Operation(
        method="post",
        path="/v1/chat/completions",
        summary="Answer a conversation",
        body=ChatRequest,
        answer=ChatAnswered,
        event=ChatChunk,
        statuses={404: "no such model"},
    ),
)


def routes(state: State) -> list[BaseRoute]:
    async def chat(http: HTTPRequest) -> Response:
        body = checked(ChatRequest, await read_json(http, state.options))
        answer = ChatAnswer(state, body)
        return await answered(state, http, [_request(state, body)], answer, is_stream=body.stream)

    return [post("/v1/chat/completions", chat)]


def _request(state: State, body: ChatRequest) -> Request:
    """Raises ApiError, RequestError."""
    check_call(state, body, 1)
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    params = body.params(
        most_tokens(state, getattr(body, field), field),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=None,
    )
    messages = [message.plain() for message in body.messages]
    return Request(prompt=messages, params=params, n=body.n, cache_salt=body.cache_salt, priority=body.priority)


class ChatAnswer(Answer):
    prefix = "chatcmpl"
    kind = "chat.completion"
    event_kind = "chat.completion.chunk"

    def __init__(self, state: State, body: ChatRequest) -> None:
        super().__init__(state, body)
        self._token_text = TokenText(self.tokenizer)
        self._begun: set[int] = set()  # choices

    def step(self, choice: int, delta: Delta) -> str:
        text, finish = delta.text, delta.finish
        if not (text or finish or delta.logprobs):
            return ""
        content = f'"content": {json.dumps(text)}' if text or choice not in self._begun else ""
        if choice not in self._begun:
            self._begun.add(choice)
            content = '"role": "assistant", ' + content
        return self.event(
            f'{{"index": {choice}, "delta": {{{content}}}, "logprobs": {self._logprobs(delta.logprobs)}, '
            f'"finish_reason": {REASONS[finish]}}}'
        )

    def whole_choice(self, choice: int, completion: Completion) -> str:
        message = json.dumps({"role": "assistant", "content": completion.text, "refusal": None})
        return (
            f'{{"index": {choice}, "message": {message}, "logprobs": {self._logprobs(completion.logprobs)}, '
            f'"finish_reason": {REASONS[completion.finish]}}}'
        )

    def _logprobs(self, logprobs: tuple[TokenLogprob, ...] | None) -> str:
        if logprobs is None:
            return "null"
        content = []
        for entry in logprobs:
            top = [self._token(token, logprob) for token, logprob in entry.top]
            content.append({**self._token(entry.token_id, entry.logprob), "top_logprobs": top})
        return json.dumps({"content": content, "refusal": None})

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token_text(token_id),
            "logprob": finite(logprob),
            "bytes": list(self._token_text.bytes(token_id)) or None,
        }
