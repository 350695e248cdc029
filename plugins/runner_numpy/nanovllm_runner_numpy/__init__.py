"""The plugin `runner: numpy`. Importing this is cheap; `create_runner` imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.hookspecs import Context, hookimpl

if TYPE_CHECKING:
    from .runner import NumpyRunner

__all__ = ["plugin"]


class NumpyPlugin:
    """Takes no options: `threads` belongs to every runner."""

    api_version = 1

    @hookimpl
    def create_runner(self, ctx: Context) -> NumpyRunner:
        from .runner import NumpyRunner

        return NumpyRunner(ctx)


plugin = NumpyPlugin()
