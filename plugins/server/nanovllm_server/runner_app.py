"""The routes of `nanovllm runner-serve`: the `nanovllm` dialect over HTTP. docs/wire-protocol.md has the messages.

The path of a step is plain Starlette and plain JSON, no model validation by reflection: it is called for every token.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from nanovllm.errors import EngineClosed, EngineDead
from nanovllm_runner_http import wire

from .body import read_body
from .errors import ApiError
from .keys import OWNER, Gate, Keys
from .limits import Limits
from .routing import get, post, tokenizer_of
from .stepper import Stepper

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from nanovllm.aio import AsyncLLM
    from nanovllm.tokenizer import Tokenizer

OPEN_PATHS = ("/health", "/livez")  # they say whether, never what
BIG = 1 << 18  # bytes: longer ones are not parsed on the event loop
Body = dict[str, Any]


def runner_app(llm: AsyncLLM, keys: Keys, limits: Limits, stepper: Stepper | None = None) -> ASGIApp:
    """The app for an engine, which it closes when it shuts down."""
    routes = _Routes(llm, limits, stepper or Stepper(llm, limits))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tidying = asyncio.create_task(routes.tidy())
        try:
            yield
        finally:
            tidying.cancel()
            await llm.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    for path, call in {
        wire.STEP_PATH: routes.step,
        wire.BATCH_PATH: routes.batch,
        "/v1/tokenize": routes.tokenize,
        "/v1/detokenize": routes.detokenize,
        "/tokenize": routes.tokenize,
        "/detokenize": routes.detokenize,
    }.items():
        app.router.routes.append(post(path, _taking_json(call, limits)))
    for path, answer in {
        "/info": routes.info,
        "/v1/vocabulary": routes.vocabulary,
        "/health": routes.health,
        "/livez": routes.alive,
    }.items():
        app.router.routes.append(get(path, answer))
    return Gate(app, keys, OPEN_PATHS)


class _Routes:
    def __init__(self, llm: AsyncLLM, limits: Limits, stepper: Stepper) -> None:
        self.llm = llm
        self.limits = limits
        self.stepper = stepper
        self._vocabulary: Response | None = None

    # ---------------------------------------------------------------------------------------- steps

    async def step(self, data: Body, owner: str) -> Body:
        if "version" not in data:
            return await self._plain(wire.read_sequences(data, self.limits.max_sequences), owner)
        step = wire.read_step(data, self.limits.max_sequences)
        return wire.answers_json(step, await self.stepper.step(owner, step))

    async def batch(self, data: Body, owner: str) -> Body:
        return await self._plain(wire.read_batch(data, self.limits.max_sequences), owner)

    async def _plain(self, plain: list[wire.Plain], owner: str) -> Body:
        return wire.tokens_json(await self.stepper.step_plain(owner, plain))

    async def tidy(self) -> None:
        """For as long as the server runs."""
        while True:
            await asyncio.sleep(self.limits.idle_seconds / 4)
            try:
                self.stepper.free_idle()
            except (EngineDead, EngineClosed):
                return

    # --------------------------------------------------------------------------------------- tokens

    async def tokenize(self, data: Body, owner: str) -> Body:
        tokenizer = tokenizer_of(self.llm)
        if "messages" in data:
            messages = _messages(data["messages"], self.limits.max_text_chars)
            ids = await asyncio.to_thread(tokenizer.chat, messages)
        else:
            text, parse_special = data.get("text"), data.get("parse_special", False)
            if not isinstance(text, str) or len(text) > self.limits.max_text_chars or type(parse_special) is not bool:
                raise ApiError(
                    400,
                    f"text must be a text of at most {self.limits.max_text_chars} characters, parse_special a boolean",
                )
            ids = await asyncio.to_thread(tokenizer.encode, text, parse_special)
        return {"token_ids": list(ids)}

    async def detokenize(self, data: Body, owner: str) -> Body:
        tokenizer, ids = tokenizer_of(self.llm), data.get("token_ids")
        if not isinstance(ids, list) or len(ids) > self.limits.max_ids:
            raise ApiError(400, f"token_ids must be a list of at most {self.limits.max_ids} ids")
        for i in ids:
            if type(i) is not int or not 0 <= i < tokenizer.vocab_size:
                raise ApiError(400, f"every id must be below {tokenizer.vocab_size}, the size of the vocabulary")
        return {"text": await asyncio.to_thread(tokenizer.decode, ids)}

    async def vocabulary(self, request: Request) -> Response:
        """The bytes of every token, so that a client turns tokens into text by itself."""
        if self._vocabulary is None:
            tokenizer = tokenizer_of(self.llm)
            self._vocabulary = await asyncio.to_thread(_vocabulary, tokenizer, self.llm.engine.eos_ids)
        return self._vocabulary

    # ---------------------------------------------------------------------------------------- facts

    async def info(self, request: Request) -> Response:
        engine, facts, parts = self.llm.engine, self.llm.info, self.llm.components
        tokenizer = self.llm.tokenizer
        model = None if parts is None else parts.loaded.config.model
        return _json(
            {
                "protocol": wire.PROTOCOL,
                "versions": [wire.VERSION],
                # The last part: where a model lies on this machine is nobody's business.
                "model": None if model is None else model.replace("\\", "/").rstrip("/").rpartition("/")[2],
                "vocab_size": facts.vocab_size,
                "tokenizer_vocab_size": None if tokenizer is None else tokenizer.vocab_size,
                "max_model_len": engine.max_len,
                "max_num_seqs": engine.scheduler.max_num_seqs,
                "eos_token_ids": list(engine.eos_ids),
                "supports": sorted(facts.supports),
                "batch_invariant": facts.batch_invariant,
            }
        )

    async def health(self, request: Request) -> Response:
        """May work be sent here?"""
        is_ready = self.llm.health().is_ready
        return _json({"status": "ok" if is_ready else "unavailable"}, 200 if is_ready else 503)

    async def alive(self, request: Request) -> Response:
        is_live = self.llm.health().is_live
        return _json({"status": "ok" if is_live else "dead"}, 200 if is_live else 503)


def _taking_json(
    call: Callable[[Body, str], Awaitable[Body]], limits: Limits
) -> Callable[[Request], Awaitable[Response]]:
    """Bodies in and out."""

    async def endpoint(request: Request) -> Response:
        try:
            raw = await read_body(request, limits.max_body_bytes, limits.body_seconds)
            data = wire.loads(raw) if len(raw) < BIG else await asyncio.to_thread(wire.loads, raw)
            return _json(await call(data, request.scope[OWNER]))
        except wire.WireError as e:
            raise ApiError(400, e.message) from None

    return endpoint


def _json(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(wire.dumps(body), status, media_type="application/json")


def _messages(value: Any, max_chars: int) -> list[dict[str, str]]:
    if not (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and all(isinstance(text, str) for text in m.values()) for m in value)
        and sum(len(text) for m in value for text in m.values()) <= max_chars
    ):
        raise ApiError(400, f"messages must be a list of objects with texts, of at most {max_chars} characters in all")
    return value


def _vocabulary(tokenizer: Tokenizer, eos_ids: tuple[int, ...]) -> Response:
    pieces = [base64.b64encode(tokenizer.token_bytes(i)).decode() for i in range(tokenizer.vocab_size)]
    return _json({"vocab_size": tokenizer.vocab_size, "eos_ids": list(eos_ids), "token_bytes": pieces})
