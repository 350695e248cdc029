"""POST /v1/tokenize and /v1/detokenize: between text and ids, by the model's tokenizer and template."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .body import check_text, read_json
from .errors import ApiError
from .openai_answers import DetokenizeAnswer, TokenizeAnswer
from .openai_schema import DetokenizeRequest, TokenizeRequest, checked
from .openapi import Operation
from .routing import as_json, post, tokenizer_of

if TYPE_CHECKING:
    from fastapi import Request, Response
    from starlette.routing import BaseRoute

    from .state import State

OPERATIONS = tuple(
    Operation(
        method="post", path=prefix + path, summary=summary, body=body, answer=answer, statuses={501: "no tokenizer"}
    )
    for prefix in ("/v1", "")
    for path, summary, body, answer in (
        ("/tokenize", "Text or a conversation to token ids", TokenizeRequest, TokenizeAnswer),
        ("/detokenize", "Token ids to text", DetokenizeRequest, DetokenizeAnswer),
    )
)


def routes(state: State) -> list[BaseRoute]:
    async def tokenize(http: Request) -> Response:
        body, found = checked(TokenizeRequest, await read_json(http, state.options)), tokenizer_of(state.llm)
        messages = [message.plain() for message in body.messages or ()]
        check_text(len(body.text or "") + sum(len(message["content"]) for message in messages), state.options)
        if body.text is None:
            ids = await asyncio.to_thread(found.chat, messages)
        else:
            ids = await asyncio.to_thread(found.encode, body.text, body.parse_special)
        return as_json({"token_ids": list(ids)})

    async def detokenize(http: Request) -> Response:
        body, found = checked(DetokenizeRequest, await read_json(http, state.options)), tokenizer_of(state.llm)
        ids = body.token_ids
        if len(ids) > state.options.max_ids:
            raise ApiError(400, f"token_ids holds {len(ids)} ids; at most {state.options.max_ids} are taken")
        if wrong := [i for i in ids if i >= found.vocab_size]:
            raise ApiError(400, f"token_ids holds {wrong[0]}; the vocabulary has {found.vocab_size} entries")
        return as_json({"text": await asyncio.to_thread(found.decode, ids)})

    return [
        post(prefix + path, endpoint)
        for prefix in ("/v1", "")
        for path, endpoint in (("/tokenize", tokenize), ("/detokenize", detokenize))
    ]
