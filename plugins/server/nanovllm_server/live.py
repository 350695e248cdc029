"""LiveView: what an engine is doing, for people to look at. LiveStream: the same, several times a second.

The engine pays one append a step, whoever looks; all else is read on the event loop. Each number is exact, but the
engine goes on while they are read, so that two of them may be a step apart. No text, no token and no name of a
request, a file or a host is in them. Knows no route.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import Response

from nanovllm.batch import Paged
from nanovllm.errors import NanoVLLMError, TokenizerError

from .sse import STREAM_HEADERS, event

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

    from nanovllm.aio import AsyncLLM
    from nanovllm.stats import StepStats

NUM_STEPS = 60  # the last ones that are told
INTERVAL = 0.25  # seconds between two looks
SILENCE = 1.0  # seconds after which is told that nothing has changed
# A page asks anew after that. A server that is told to end may wait for its open answers, and a key may be revoked.
STREAM_SECONDS = 20.0
# What a runner says about itself and anybody with a key may know.
_FACTS = {
    "architecture": "Architecture",
    "parameters": "Parameters",
    "dtype": "Numbers",
    "device": "Device",
    "dialect": "Dialect",
    "mode": "Mode",
}


class LiveView:
    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._steps: deque[StepStats] = deque(maxlen=NUM_STEPS)
        self.num_watching = 0  # streams
        llm.engine.observe(self)

    def on_step(self, stats: StepStats) -> None:
        """On the engine's thread."""
        self._steps.append(stats)

    def model(self, name: str, runner: str) -> dict[str, Any]:
        """What does not change."""
        llm, info = self._llm, self._llm.info
        return {
            "name": name,
            "runner": runner,
            "has_chat": _has_chat(llm),
            "max_model_len": llm.engine.max_len,
            "max_num_seqs": llm.engine.scheduler.max_num_seqs,
            "block_size": info.kv.block_size if isinstance(info.kv, Paged) else None,
            "facts": {shown: info.description[key] for key, shown in _FACTS.items() if key in info.description},
        }

    def sample(self, after: int) -> dict[str, Any]:
        """What is so now, and the steps behind number `after`."""
        health, totals, blocks = self._llm.health(), self._llm.stats(), self._llm.engine.kv_blocks()
        return {
            "is_live": health.is_live,
            "is_ready": health.is_ready,
            "running": health.num_running,
            "waiting": health.num_waiting,
            "blocks": None if blocks is None else blocks._asdict(),
            "totals": {
                "requests": totals.num_requests,
                "steps": totals.num_steps,
                "failed_steps": totals.num_failed_steps,
                "prefill_tokens": totals.num_prefill_tokens,
                "decode_tokens": totals.num_decode_tokens,
                "cached_tokens": totals.num_cached_tokens,
                "preemptions": totals.num_preemptions,
            },
            "steps": [
                {
                    "step": s.step,
                    "seqs": s.num_seqs,
                    "prefill": s.num_prefill_tokens,
                    "decode": s.num_decode_tokens,
                    "seconds": s.schedule_seconds + s.forward_seconds + s.sample_seconds + s.advance_seconds,
                    "failed": s.error is not None,
                }
                for s in self._steps.copy()
                if s.step > after
            ],
        }


def _has_chat(llm: AsyncLLM) -> bool:
    """Can it answer a conversation? Otherwise it continues texts."""
    if llm.tokenizer is None:
        return True  # the runner's server has the template
    try:
        llm.tokenizer.chat([{"role": "user", "content": "?"}])
    except TokenizerError:
        return False
    except NanoVLLMError:  # it has one that wants another beginning, or its server cannot be asked now
        pass
    return True


class LiveStream(Response):
    """Server-sent events for STREAM_SECONDS, or until the server ends or the reader goes away or takes nothing."""

    def __init__(
        self, view: LiveView, model: dict[str, Any], is_over: Callable[[], bool], reader_seconds: float
    ) -> None:
        self.status_code = 200
        self.background = None
        self._view = view
        self._model = model
        self._is_over = is_over
        self._reader_seconds = reader_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        self._view.num_watching += 1
        telling = asyncio.ensure_future(self._tell(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((telling, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._view.num_watching -= 1
            leaving.cancel()
            telling.cancel()
            with suppress(asyncio.CancelledError, asyncio.TimeoutError):
                await telling

    async def _tell(self, send: Send) -> None:
        async def write(data: str, is_last: bool = False) -> None:
            message = {"type": "http.response.body", "body": data.encode(), "more_body": not is_last}
            await asyncio.wait_for(send(message), self._reader_seconds)

        clock = asyncio.get_running_loop().time
        first, last_step = {"model": self._model}, 0
        told, when = None, clock()
        end = when + STREAM_SECONDS
        while clock() < end and not self._is_over():
            data, now = self._view.sample(last_step), clock()
            if data != told or now - when >= SILENCE:
                await write(event({"at": now, **first, **data}))
                first, when = {}, now
                last_step = data["steps"][-1]["step"] if data["steps"] else last_step
                told = {**data, "steps": []}
            await asyncio.sleep(INTERVAL)
        await write("", is_last=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
