"""State: what all routes of one server share. One engine, its options and its facts; no globals.

Knows no route and no HTTP.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from .admission import Admission
from .errors import ApiError
from .metrics import Metrics
from .ratelimit import RateLimits

if TYPE_CHECKING:
    from nanovllm.aio import AsyncLLM

    from .keys import Keys
    from .options import ServerOptions


class State:
    def __init__(self, options: ServerOptions, keys: Keys, llm: AsyncLLM | None = None) -> None:
        self.options = options
        self.keys = keys
        self.rates = RateLimits(options, keys)
        self.admission = Admission(options, self.rates)
        self.metrics = Metrics()
        self.created = int(time.time())  # what the API says of the model
        self._llm: AsyncLLM | None = None
        if llm is not None:
            self.load(llm)

    @property
    def llm(self) -> AsyncLLM:
        """Raises ApiError (503) until it is loaded."""
        if self._llm is None:
            raise ApiError(503, "the model is loading", code="loading", retry_after=5)
        return self._llm

    def load(self, llm: AsyncLLM) -> None:
        """Once."""
        self.admission.num_slots = llm.engine.scheduler.max_num_seqs
        self.metrics.watch(self, llm)
        self._llm = llm

    async def close(self) -> None:
        if self._llm is not None:
            await self._llm.close()

    @property
    def status(self) -> str:
        """In one word: `ready`, `loading`, `draining`, `stalled` (work waits and no step completes) or `dead`."""
        if self._llm is None:
            return "loading"
        health = self._llm.health()
        if self.admission.is_draining:
            return "draining"
        if not health.is_live:
            return "dead"
        return "ready" if health.is_ready else "stalled"

    @property
    def model_name(self) -> str:
        """The last part of `model:`, unless named: where a model lies on this machine is nobody's business."""
        parts = self.llm.components
        model = "model" if parts is None else parts.loaded.config.model
        return self.options.model_name or model.replace("\\", "/").rstrip("/").rpartition("/")[2] or model

    @property
    def runner_name(self) -> str:
        """The runner's type in the configuration, or its class where there is none."""
        parts = self.llm.components
        return type(self.llm.engine.runner).__name__ if parts is None else parts.loaded.config.runner.type

    @property
    def fingerprint(self) -> str:
        """OpenAI's system_fingerprint: changes with whatever may change the answer to the same seed."""
        from nanovllm import __version__

        parts = self.llm.components
        config = "" if parts is None else parts.loaded.config.model_dump_json(exclude={"server"})
        facts = f"{__version__} {self.llm.info!r} {config}"
        return "fp_" + hashlib.sha256(facts.encode()).hexdigest()[:10]
