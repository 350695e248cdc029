"""The plugin `runner: onnx`. Importing this is cheap; `create_runner` imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.hookspecs import Context, hookimpl

if TYPE_CHECKING:
    from .options import OnnxOptions
    from .runner import OnnxRunner

__all__ = ["plugin"]


class OnnxPlugin:
    api_version = 1

    @hookimpl
    def runner_config(self) -> type[OnnxOptions]:
        from .options import OnnxOptions

        return OnnxOptions

    @hookimpl
    def create_runner(self, ctx: Context) -> OnnxRunner:
        from .runner import OnnxRunner

        return OnnxRunner(ctx)


plugin = OnnxPlugin()
