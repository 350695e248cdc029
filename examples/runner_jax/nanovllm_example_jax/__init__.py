"""The plugin `runner: example-jax`.

Importing this is cheap: whatever is heavy is imported inside `create_runner`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nanovllm.hookspecs import Context, hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from .runner import ExampleJaxRunner

__all__ = ["plugin"]


class Options(BaseModel):
    """The keys of the `runner:` section that are this plugin's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    device: Literal["cpu", "gpu", "tpu"] = Field(default="cpu", description="where to compute; never anywhere else")


class ExampleJaxPlugin:
    api_version = 1  # of the contract in nanovllm.hookspecs

    @hookimpl
    def runner_config(self) -> type[Options]:
        return Options

    @hookimpl
    def create_runner(self, ctx: Context) -> ExampleJaxRunner:
        from .runner import ExampleJaxRunner

        return ExampleJaxRunner(ctx)


plugin = ExampleJaxPlugin()
