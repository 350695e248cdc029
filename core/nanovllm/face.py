"""What `LLM` and `AsyncLLM` share: how an engine comes to be, and its facts.

Knows the configuration and the engine; how calls are made and answered is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

    from .batch import RunnerInfo
    from .components import Components
    from .config import Loaded
    from .runner import ModelRunner
    from .stats import EngineStats, Health
    from .tokenizer import Tokenizer


class EngineFace:
    """An engine with a loaded model: what is the same for callers that wait and for asyncio."""

    engine: Engine  # scheduling, KV blocks and sampling; for what neither class offers
    components: Components | None  # what the configuration led to; None if built from components

    def __init__(self, model: str | Path | None = None, **overrides: Any) -> None:
        """Load the configuration with `model` and `overrides` on top (see docs/configuration.md), then the model.

        Raises ConfigError, PluginError, ModelError or TokenizerError.
        """
        if model is not None:
            overrides["model"] = str(model)
        self._start(*engine_from_config(None, overrides))

    @classmethod
    def from_config(cls, config: str | Path | Loaded | None = None, **overrides: Any) -> Self:
        """From a YAML file, with `overrides` on top, or from an already loaded configuration, without.

        Raises ConfigError, PluginError, ModelError or TokenizerError.
        """
        face = cls.__new__(cls)
        face._start(*engine_from_config(config, overrides))
        return face

    @classmethod
    def from_components(cls, runner: ModelRunner, tokenizer: Tokenizer | None = None, **engine_options: Any) -> Self:
        """From parts that you built; the runner is owned here from then on, and closed by `close`.

        Options: `sampler`, `max_num_seqs` and `max_num_batched_tokens` (whole numbers), `prefix_caching`, `eos_ids`,
        `observers`, `stall_seconds`. Raises ConfigError where the parts do not fit each other.
        """
        face = cls.__new__(cls)
        face._start(Engine(runner, tokenizer, **engine_options), None)
        return face

    def _start(self, engine: Engine, components: Components | None) -> None:
        """The one beginning of all three ways to construct; subclasses add their own state."""
        self.engine = engine
        self.components = components

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where the runner takes text itself."""
        return self.engine.tokenizer

    @property
    def info(self) -> RunnerInfo:
        """The facts of the loaded runner: vocabulary, lengths, KV layout, what it can do."""
        return self.engine.info

    def stats(self) -> EngineStats:
        """Sums since the engine started. From any thread; `a.since(b)` is what came between two of them."""
        return self.engine.stats()

    def health(self) -> Health:
        """Whether the engine takes requests and gets on with them. From any thread."""
        return self.engine.health()


def engine_from_config(config: str | Path | Loaded | None, overrides: Mapping[str, Any]) -> tuple[Engine, Components]:
    """Load a configuration, build what it names, and put an engine around it."""
    from .components import build
    from .config import Loaded, load

    if isinstance(config, Loaded):
        if overrides:
            raise ConfigError("overrides cannot be applied to a configuration that is loaded already")
        loaded = config
    else:
        loaded = load(config, overrides=overrides)
    parts = build(loaded)
    return engine_from_parts(parts), parts


def engine_from_parts(parts: Components) -> Engine:
    """An engine around loaded parts, with the options of their configuration. The runner is closed if there is none."""
    options = parts.loaded.config
    try:
        return Engine(
            parts.runner,
            parts.tokenizer,
            sampler=parts.sampler,
            max_num_seqs=options.scheduler.max_num_seqs,
            max_num_batched_tokens=options.scheduler.max_num_batched_tokens,
            prefix_caching=options.cache.prefix_caching,
            eos_ids=options.eos,
            stall_seconds=options.scheduler.stall_seconds,
            observers=parts.observers,
        )
    except BaseException:
        parts.runner.close()
        raise
