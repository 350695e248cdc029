"""The plugin contract: the hooks a plugin may implement, and what it gets to build its part with.

A plugin is one object (`plugin = MyPlugin()`) that an entry point names. It declares `api_version = 1`
and implements, with `hookimpl` from this file, the two hooks of its kind: `runner_*`, `tokenizer_*`
or `sampler_*`; an observer implements any of `on_*`. Importing the object must be cheap: heavy imports
belong inside `create_*`. This file knows nothing about how plugins are found or called (plugins.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pydantic import BaseModel

    from .intake import Ticket
    from .request import Completion
    from .runner import ModelRunner, Sampler
    from .stats import StepStats
    from .tokenizer import Tokenizer

# The version of this contract. A plugin built for the previous one still loads.
API_VERSION = 1

hookspec = pluggy.HookspecMarker("nanovllm")
hookimpl = pluggy.HookimplMarker("nanovllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """The `cache:` section as a runner sees it."""

    block_size: int = 16  # tokens per KV block
    memory: int | None = None  # bytes for the KV pool; None = the runner decides
    num_blocks: int | None = None  # exact pool size; wins over memory
    gpu_share: float = 0.9  # of a GPU's free memory, for a pool that lies on it; both others win over it


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a plugin gets to build its part with."""

    options: Any  # the plugin's own validated section (its pydantic model); None if it declares none
    model: str  # as configured: a directory, a file, or a name
    path: Path | None  # the existing directory or file that `model` names, else None
    tokenizer_path: Path | None = None  # where the tokenizer's files are, if not in the model's directory
    cache: CacheOptions  # how much memory for keys and values, in which blocks
    max_num_seqs: int  # sequences in one batch, at most
    max_num_batched_tokens: int  # tokens in one batch, at most
    max_model_len: int | None  # the user's limit; None = the model's
    threads: int | None  # None = all that this process may use
    tokenizer: Tokenizer | None = None  # the tokenizer, built before the runner; None while it is being built


class Specs:
    """The hooks. Only the plugin that the configuration chose is called, never all that are installed."""

    @hookspec(firstresult=True)
    def runner_config(self) -> type[BaseModel] | None:
        """The pydantic model of the plugin's options in the `runner:` section, without `type` and `threads`."""

    @hookspec(firstresult=True)
    def create_runner(self, ctx: Context) -> ModelRunner | None:
        """Load the model and return its runner. The engine owns it from then on and closes it."""

    @hookspec(firstresult=True)
    def tokenizer_config(self) -> type[BaseModel] | None:
        """The pydantic model of the plugin's options in the `tokenizer:` section, without `type` and `path`."""

    @hookspec(firstresult=True)
    def create_tokenizer(self, ctx: Context) -> Tokenizer | None:
        """Load and return the tokenizer: from `ctx.tokenizer_path` where given, else from `ctx.path`."""

    @hookspec(firstresult=True)
    def sampler_config(self) -> type[BaseModel] | None:
        """The pydantic model of the plugin's options in the `sampler:` section, without `type`."""

    @hookspec(firstresult=True)
    def create_sampler(self, ctx: Context) -> Sampler | None:
        """Return the sampler, for runners whose native kind (`RunnerInfo.sampler`) has the plugin's name."""

    @hookspec
    def on_request(self, event: Ticket) -> None:
        """A request was accepted."""

    @hookspec
    def on_step(self, stats: StepStats) -> None:
        """A step was completed. All three are called on the engine's thread: be quick."""

    @hookspec
    def on_output(self, output: Completion) -> None:
        """A completion ended, well or not."""
