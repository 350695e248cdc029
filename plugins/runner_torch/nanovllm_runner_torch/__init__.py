"""The plugins `runner: torch` and `sampler: torch`. Importing this is cheap; `create_*` imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.hookspecs import Context, hookimpl

if TYPE_CHECKING:
    from nanovllm.runner import LogitsRunner

    from .options import TorchOptions
    from .sampler import TorchSampler

__all__ = ["plugin", "sampler_plugin"]


class TorchRunnerPlugin:
    api_version = 1

    @hookimpl
    def runner_config(self) -> type[TorchOptions]:
        from .options import TorchOptions

        return TorchOptions

    @hookimpl
    def create_runner(self, ctx: Context) -> LogitsRunner:
        """Of a checkpoint, or of an exported model, told apart by what the files hold."""
        from .archive import find_archive

        archive = None if ctx.path is None else find_archive(ctx.path)
        if archive is not None:
            from .foreign.runner import ForeignRunner

            return ForeignRunner(ctx, archive)
        from .runner import TorchRunner

        return TorchRunner(ctx)


class TorchSamplerPlugin:
    """Takes no options. For runners whose logits are torch tensors, wherever these lie."""

    api_version = 1

    @hookimpl
    def create_sampler(self, ctx: Context) -> TorchSampler:
        from .sampler import TorchSampler

        return TorchSampler()


plugin = TorchRunnerPlugin()
sampler_plugin = TorchSamplerPlugin()
