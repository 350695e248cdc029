"""POST /v1/completions: texts or token ids, continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanovllm.request import Request
from nanovllm.tokenizer import TokenStream

from .answer import REASONS, Answer, TokenText, answered, best, check_call, finite, most_tokens
from .body import read_json
from .errors import ApiError
from .openai_answers import CompletionAnswered
from .openai_schema import CompletionRequest, checked
from .openapi import Operation
from .routing import post

if TYPE_CHECKING:
    from fastapi import Request as HTTPRequest
    from fastapi import Response
    from starlette.routing import BaseRoute

    from nanovllm.batch import TokenLogprob
    from nanovllm.request import Completion, Delta, Finish

    from .call import Usage
    from .state import State

OPERATIONS = (
    Operation(
        method="post",
        path="/v1/completions",
        summary="Continue texts or token ids",
        body=CompletionRequest,
        answer=CompletionAnswered,
        event=CompletionAnswered,
        statuses={404: "no such model"},
    ),
)


def routes(state: State) -> list[BaseRoute]:
    async def completions(http: HTTPRequest) -> Response:
        body = checked(CompletionRequest, await read_json(http, state.options))
        answer = CompletionAnswer(state, body)
        return await answered(state, http, _requests(state, body), answer, is_stream=body.stream)

    return [post("/v1/completions", completions)]


def _requests(state: State, body: CompletionRequest) -> list[Request]:
    """Raises ApiError, RequestError."""
    prompts = body.prompts
    check_call(state, body, len(prompts))
    if body.echo and not isinstance(prompts[0], str) and state.llm.tokenizer is None:
        raise ApiError(400, "echo: this server has no tokenizer to turn ids into text", param="echo")
    if "max_tokens" in body.model_fields_set:
        # 0: the prompt's scores come with the first token, which is not shown.
        max_tokens = most_tokens(state, body.max_tokens or 1, "max_tokens")
    else:
        max_tokens = min(body.max_tokens, state.options.max_tokens or body.max_tokens)
    params = body.params(max_tokens, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None)
    return [
        Request(prompt=prompt, params=params, n=body.n, cache_salt=body.cache_salt, priority=body.priority)
        for prompt in prompts
    ]


class CompletionAnswer(Answer):
    prefix = "cmpl"
    kind = event_kind = "text_completion"

    def __init__(self, state: State, body: CompletionRequest) -> None:
        super().__init__(state, body)
        self._body = body
        self._token_text = TokenText(self.tokenizer)
        self._begun: dict[int, TokenStream] = {}  # choice -> what counts the characters of its tokens
        self._offsets: dict[int, int] = {}  # choice -> characters of its tokens so far

    def step(self, choice: int, delta: Delta) -> str:
        found = self._choice(choice, delta.text, delta.logprobs or (), delta.finish)
        return found and self.event(found)

    def whole_choice(self, choice: int, completion: Completion) -> str:
        return self._choice(choice, completion.text, completion.logprobs or (), completion.finish)

    def usage(self) -> Usage:
        usage = super().usage()
        return replace(usage, num_output=0) if self._body.is_prompt_only else usage

    def _choice(self, choice: int, text: str, logprobs: tuple[TokenLogprob, ...], finish: Finish | None) -> str:
        """What is new of a choice, as JSON; "" if that is nothing."""
        body = self._body
        scored: list[tuple[int, TokenLogprob | None]] = [(entry.token_id, entry) for entry in logprobs]
        if body.is_prompt_only:
            text, scored = "", []
        if choice not in self._begun:
            self._begun[choice] = TokenStream(self._token_text.bytes)
            self._offsets[choice] = 0
            if body.echo:
                text = self._echoed(choice) + text
                scored = self._prompt_scores(choice) + scored
        if not (text or scored or finish):
            return ""
        shown = "null" if body.logprobs is None else json.dumps(self._logprobs(choice, scored))
        return (
            f'{{"index": {choice}, "text": {json.dumps(text)}, "logprobs": {shown}, '
            f'"finish_reason": {REASONS[finish]}}}'
        )

    def _echoed(self, choice: int) -> str:
        prompt = self._body.prompts[choice // self._body.n]
        if isinstance(prompt, str):
            return prompt
        assert self.tokenizer is not None, "refused at the door"
        return self.tokenizer.decode(prompt)

    def _prompt_scores(self, choice: int) -> list[tuple[int, TokenLogprob | None]]:
        ticket = self.call.tickets[choice // self._body.n]
        return list(zip(ticket.prompt_ids, ticket.output(()).prompt_logprobs or (), strict=False))

    def _logprobs(self, choice: int, scored: Sequence[tuple[int, TokenLogprob | None]]) -> dict[str, list[Any]]:
        """`scored`: tokens and their scores, which the prompt's first has not."""
        text, stream = self._token_text, self._begun[choice]
        offsets = []
        for token, _ in scored:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(stream.feed((token,)))
        return {
            "text_offset": offsets,
            "token_logprobs": [entry and finite(entry.logprob) for _, entry in scored],
            "tokens": [text(token) for token, _ in scored],
            "top_logprobs": [
                entry and {text(token): finite(logprob) for token, logprob in best(entry).items()}
                for _, entry in scored
            ],
        }
