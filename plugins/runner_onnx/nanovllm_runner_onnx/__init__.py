"""The plugin `runner: onnx`, and `export`. Importing this is cheap; both import what they need when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.hookspecs import Context, hookimpl

if TYPE_CHECKING:
    from nanovllm.runner import LogitsRunner

    from .exporter import export
    from .options import OnnxOptions

__all__ = ["export", "plugin"]


class OnnxPlugin:
    api_version = 1

    @hookimpl
    def runner_config(self) -> type[OnnxOptions]:
        from .options import OnnxOptions

        return OnnxOptions

    @hookimpl
    def create_runner(self, ctx: Context) -> LogitsRunner:
        """Of a checkpoint, of one that we exported, or of anybody's ONNX model, told apart by what the files hold."""
        from .install import require_onnx
        from .model_files import find_onnx_model
        from .session import settings_of

        require_onnx()
        settings = settings_of(ctx.options, ctx.threads)
        model = find_onnx_model(ctx.path or Path(ctx.model))
        if model is not None:
            from .exported import is_exported
            from .onnx_file import check_runnable

            if not is_exported(model):
                from .foreign.runner import ForeignRunner

                check_runnable(model.header, settings.device, has_custom_ops=bool(settings.custom_ops))
                return ForeignRunner(ctx, model, settings)
        from .paged_model import from_checkpoint, from_file
        from .runner import OnnxRunner

        paged = from_checkpoint(ctx, settings) if model is None else from_file(ctx, model, settings)
        return OnnxRunner(ctx, paged, settings)


plugin = OnnxPlugin()


def __getattr__(name: str) -> object:
    if name == "export":
        from .exporter import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
