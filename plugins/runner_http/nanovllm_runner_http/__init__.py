"""The plugins `runner: http` and `tokenizer: http`. Importing this is cheap; `create_*` imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.hookspecs import Context, hookimpl

if TYPE_CHECKING:
    from nanovllm.runner import ModelRunner

    from .options import HttpOptions, TokenizerOptions
    from .tokenizer import HttpTokenizer

__all__ = ["plugin", "tokenizer_plugin"]


class HttpRunnerPlugin:
    api_version = 1

    @hookimpl
    def runner_config(self) -> type[HttpOptions]:
        from .options import HttpOptions

        return HttpOptions

    @hookimpl
    def create_runner(self, ctx: Context) -> ModelRunner:
        from .create import create_runner

        return create_runner(ctx)


class HttpTokenizerPlugin:
    api_version = 1

    @hookimpl
    def tokenizer_config(self) -> type[TokenizerOptions]:
        from .options import TokenizerOptions

        return TokenizerOptions

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> HttpTokenizer:
        from .tokenizer import HttpTokenizer

        return HttpTokenizer(ctx)


plugin = HttpRunnerPlugin()
tokenizer_plugin = HttpTokenizerPlugin()
