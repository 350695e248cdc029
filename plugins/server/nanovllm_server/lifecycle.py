"""Lifecycle: from loading to the last answer of a server that is a process of its own.

    loading -> ready -> draining -> over
                  \\-> dead, if the engine dies: everybody is told, then the process ends with an error

While it loads and while it drains, /livez and /readyz answer. Draining means: what runs may end by itself for
`drain_seconds`, what is left is aborted, so that its streams end with an error event; new calls get 503. Knows no
signal and no route.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from nanovllm.errors import EngineDead

if TYPE_CHECKING:
    from nanovllm.aio import AsyncLLM

    from .state import State

log = logging.getLogger("nanovllm.server")

POLL = 0.05  # seconds between two looks at what still runs
LOOK = 0.5  # seconds between two looks at whether the engine lives
FLUSH = 5.0  # seconds for aborted calls to take their last event


class Lifecycle:
    def __init__(self, on_loaded: Callable[[], None], on_end: Callable[[], None]) -> None:
        """Both are called on the event loop: `on_end` once nothing is left to do but to end the process."""
        self.error: Exception | None = None  # why it ended, if not because it was told to
        self.is_loading = False
        self.is_stopping = False
        self._on_loaded = on_loaded
        self._on_end = on_end
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Begin to drain. From any thread, or a signal handler; also before it runs."""
        self.is_stopping = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    @asynccontextmanager
    async def running(self, state: State, load: Callable[[], AsyncLLM]) -> AsyncIterator[None]:
        """Loads while the body runs, and watches over what is loaded."""
        self._loop = asyncio.get_running_loop()
        if self.is_stopping:
            self._stop.set()
        task = asyncio.create_task(self._run(state, load))
        try:
            yield
        finally:
            task.cancel()

    async def _run(self, state: State, load: Callable[[], AsyncLLM]) -> None:
        try:
            if await self._load(state, load):
                self._on_loaded()
                await self._watch(state)
                await self._drain(state)
        except Exception as e:
            self.error = e
        finally:
            self._on_end()

    async def _load(self, state: State, load: Callable[[], AsyncLLM]) -> bool:
        """In a thread that nobody waits for if the process shall end first. False: it shall."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[AsyncLLM] = loop.create_future()

        def work() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                try:
                    llm = load()
                except BaseException as e:
                    loop.call_soon_threadsafe(loaded.set_exception, e)
                else:
                    loop.call_soon_threadsafe(loaded.set_result, llm)

        self.is_loading = True
        threading.Thread(target=work, name="nanovllm-load", daemon=True).start()
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((loaded, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not loaded.done():
            return False
        self.is_loading = False
        state.load(loaded.result())
        return True

    async def _watch(self, state: State) -> None:
        """Until it is told to stop. Raises EngineDead when everybody has been told."""
        while not self._stop.is_set():
            health = state.llm.health()
            if not health.is_live:
                log.error("the engine is dead: %s", health.reason)
                await self._wait_for_calls(state, FLUSH)
                raise EngineDead(f"the engine is dead: {health.reason}", hint="restart the server")
            try:
                await asyncio.wait_for(self._stop.wait(), LOOK)
            except asyncio.TimeoutError:
                continue

    async def _drain(self, state: State) -> None:
        admission, seconds = state.admission, state.options.drain_seconds
        admission.is_draining = True
        log.info("draining: %d calls have %g s to end", admission.num_calls, seconds)
        await self._wait_for_calls(state, seconds)
        num_aborted = admission.num_calls
        await state.llm.close()
        if num_aborted:
            await self._wait_for_calls(state, FLUSH)
            log.warning("%d calls were aborted", num_aborted)

    async def _wait_for_calls(self, state: State, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while state.admission.num_calls and loop.time() < deadline:
            await asyncio.sleep(POLL)
