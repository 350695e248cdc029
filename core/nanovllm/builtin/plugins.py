"""The plugin objects of what the core brings itself: runner `mock`, tokenizer `simple`, sampler `numpy`.

They are found through the core's own entry points, like everybody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..hookspecs import Context, hookimpl

if TYPE_CHECKING:
    from ..sampler import NumpySampler
    from .mock import MockRunner
    from .simple_bpe import SimpleBPETokenizer


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MockScript(_Options):
    """What goes wrong, and when; the fields of `mock.Script`."""

    tokens: list[int] = Field(default=[], description="the first generated tokens of every sequence")
    nan_token: int | None = Field(default=None, description="a sequence with this token in its context gets NaN")
    nan_steps: list[int] = Field(default=[], description="all logits of these steps are NaN")
    fail_steps: list[int] = Field(default=[], description="these steps fail")
    dead_step: int | None = Field(default=None, description="the runner is dead from this step on")
    short_steps: list[int] = Field(default=[], description="these steps return one row of logits too few")
    hang_step: int | None = Field(default=None, description="this step blocks until the engine is closed")
    delay: float = Field(default=0, ge=0, allow_inf_nan=False, description="seconds that each step takes")


class MockOptions(_Options):
    vocab_size: int | None = Field(default=None, ge=1, description="width of the logits; null = the tokenizer's")
    layout: Literal["paged", "lanes"] = Field(default="paged", description="how it keeps its KV cache")
    seed: int = Field(default=0, ge=0, lt=2**64, description="another seed, another model")
    script: MockScript = Field(default=MockScript(), description="faults on purpose, for tests; steps count from 1")


class _Mock:
    api_version = 1

    @hookimpl
    def runner_config(self) -> type[MockOptions]:
        return MockOptions

    @hookimpl
    def create_runner(self, ctx: Context) -> MockRunner:
        from .mock import MockRunner, Script

        options: MockOptions = ctx.options
        vocab_size = options.vocab_size or (ctx.tokenizer.vocab_size if ctx.tokenizer else None)
        given: dict[str, Any] = {
            "vocab_size": vocab_size,
            "max_model_len": ctx.max_model_len,
            "num_blocks": ctx.cache.num_blocks,
        }
        return MockRunner(
            **{name: value for name, value in given.items() if value is not None},
            max_num_seqs=ctx.max_num_seqs,
            block_size=ctx.cache.block_size,
            layout=options.layout,
            seed=options.seed,
            script=Script(**options.script.model_dump()),
        )


class _Simple:
    api_version = 1

    @hookimpl
    def create_tokenizer(self, ctx: Context) -> SimpleBPETokenizer:
        from .simple_bpe import SimpleBPETokenizer

        return SimpleBPETokenizer()


class _NumpySampler:
    api_version = 1

    @hookimpl
    def create_sampler(self, ctx: Context) -> NumpySampler:
        from ..sampler import NumpySampler

        return NumpySampler()


mock = _Mock()
simple = _Simple()
numpy_sampler = _NumpySampler()
