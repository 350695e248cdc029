"""How many threads the BLAS under NumPy takes, for a while. Knows nothing of what is computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]


class Blas:
    """Finding the loaded library takes milliseconds, limiting it microseconds: keep one of these."""

    def __init__(self) -> None:
        self._controller = ThreadpoolController().select(user_api="blas")

    def limit(self, threads: int | None) -> AbstractContextManager[Any]:
        """At most so many threads inside; None = as before."""
        return nullcontext() if threads is None else self._controller.limit(limits=threads)

    @property
    def name(self) -> str:
        return ", ".join(f"{lib['internal_api']} {lib['version']}" for lib in self._controller.info()) or "unknown"

    @property
    def threads(self) -> int:
        return max((lib["num_threads"] for lib in self._controller.info()), default=1)
