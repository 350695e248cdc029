"""From a checked configuration to loaded parts: tokenizer, runner, sampler and observers.

The one place that calls `create_*`. This file knows no engine; `LLM.from_config` hands the parts to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from .batch import RunnerInfo
from .config import COMMON_KEYS, Loaded, config_error, unknown_key
from .errors import ConfigError, PluginError
from .hookspecs import CacheOptions, Context
from .loader import LoadedPlugin, Observer, Plugins
from .plugins import resolve_model
from .runner import LogitsRunner, ModelRunner, Sampler

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What an engine is made of."""

    loaded: Loaded
    runner: ModelRunner  # the caller owns it and closes it
    tokenizer: Tokenizer | None  # None only where the runner tokenizes by itself
    sampler: Sampler | None  # None where the runner draws tokens by itself
    observers: tuple[Observer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The plugins that a configuration names, loaded, with their checked options; nothing created yet."""

    plugins: Plugins
    runner: LoadedPlugin
    runner_options: BaseModel | None
    tokenizer: LoadedPlugin | None
    tokenizer_options: BaseModel | None
    observers: tuple[Observer, ...]


def choose(loaded: Loaded, path: Path | None) -> Chosen:
    """Load the chosen plugins and check their sections; `path` is where the model's files are.

    Raises ConfigError for a section its plugin refuses, PluginError for a plugin that is missing or broken.
    """
    config, plugins = loaded.config, Plugins()
    runner = plugins.load("runners", config.runner.type)
    tokenizer_type = _tokenizer_type(loaded, path)
    tokenizer = None if tokenizer_type is None else plugins.load("tokenizers", tokenizer_type)
    return Chosen(
        plugins=plugins,
        runner=runner,
        runner_options=plugin_options(runner, "runner", config.runner.options, loaded.origins),
        tokenizer=tokenizer,
        tokenizer_options=None
        if tokenizer is None
        else plugin_options(tokenizer, "tokenizer", config.tokenizer.options, loaded.origins),
        observers=tuple(Observer(plugins.load("observers", name)) for name in config.plugins),
    )


def build(loaded: Loaded) -> Components:
    """Choose, then create; a failure closes what was already created.

    Raises what `choose` raises, and whatever NanoVLLMError a plugin's `create_*` raises.
    """
    config = loaded.config
    chosen, ctx = _chosen(loaded)
    # The tokenizer first: the mock runner takes its vocabulary's size from it.
    ctx = replace(ctx, tokenizer=_tokenizer(chosen, ctx))
    with ExitStack() as undo:
        runner = create(chosen.runner, "runner", replace(ctx, options=chosen.runner_options))
        undo.callback(runner.close)
        if ctx.tokenizer is None and not runner.info.tokenizes:
            raise ConfigError(
                f"runner '{config.runner.type}' needs a tokenizer, and model '{config.model}' has no files to take one "
                "from",
                hint="set tokenizer.type and tokenizer.path",
            )
        sampler = _sampler(chosen.plugins, loaded, runner, ctx)
        undo.pop_all()
    return Components(
        loaded=loaded, runner=runner, tokenizer=ctx.tokenizer, sampler=sampler, observers=chosen.observers
    )


def build_tokenizer(loaded: Loaded) -> Tokenizer | None:
    """The tokenizer alone; None where the runner tokenizes by itself. Raises as `build` does."""
    return _tokenizer(*_chosen(loaded))


def context(loaded: Loaded) -> Context:
    """What every plugin gets, without its own options and without the tokenizer. Raises as `resolve_model` does."""
    config = loaded.config
    model, path = resolve_model(config.model)
    return Context(
        options=None,
        model=model,
        path=path,
        tokenizer_path=Path(config.tokenizer.path).expanduser() if config.tokenizer.path else None,
        cache=CacheOptions(
            block_size=config.cache.block_size,
            memory=config.cache.memory,
            num_blocks=config.cache.num_blocks,
            gpu_share=config.cache.gpu_share,
        ),
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=config.scheduler.max_model_len,
        threads=config.runner.threads,
    )


def _chosen(loaded: Loaded) -> tuple[Chosen, Context]:
    ctx = context(loaded)
    return choose(loaded, ctx.path), ctx


def _tokenizer(chosen: Chosen, ctx: Context) -> Tokenizer | None:
    if chosen.tokenizer is None:
        return None
    tokenizer: Tokenizer = create(chosen.tokenizer, "tokenizer", replace(ctx, options=chosen.tokenizer_options))
    return tokenizer


def plugin_options(
    plugin: LoadedPlugin, section: str, options: Mapping[str, Any], origins: Mapping[str, str]
) -> BaseModel | None:
    """The plugin's own keys of its section, checked by its own model. Raises ConfigError: `runner.seed: ...`."""
    model = options_model(plugin, section)
    known = () if model is None else tuple(f.alias or name for name, f in model.model_fields.items())
    for key in options:
        if key not in known and (model is None or model.model_config.get("extra") != "allow"):
            origin = next((o for k, o in origins.items() if f"{k}.".startswith(f"{section}.{key}.")), "?")
            raise unknown_key((section, key), (*COMMON_KEYS[section], *known), origin)
    if model is None:
        return None
    try:
        return model.model_validate(options)
    except ValidationError as e:
        raise config_error(e, origins, (section,)) from None


def options_model(plugin: LoadedPlugin, section: str) -> type[BaseModel] | None:
    """What the plugin's `*_config` hook returns; None where it has no options."""
    model = plugin.call(f"{section}_config")
    if model is not None and not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise PluginError(f"plugin {plugin.found}: {section}_config returned {model!r}, not a pydantic model class")
    return model


def _tokenizer_type(loaded: Loaded, path: Path | None) -> str | None:
    section = loaded.config.tokenizer
    if section.type != "auto":
        return section.type
    if loaded.config.runner.type.partition("@")[0] == "mock":
        return "simple"
    return "auto" if path is not None or section.path is not None else None


def _sampler(plugins: Plugins, loaded: Loaded, runner: ModelRunner, ctx: Context) -> Sampler | None:
    """A sampler's name is the kind of logits that it takes, so it must be the runner's native kind."""
    section, runner_type, kind = loaded.config.sampler, loaded.config.runner.type, runner.info.sampler
    if not isinstance(runner, LogitsRunner):
        if section.type != "auto":
            raise ConfigError(
                f"runner '{runner_type}' draws tokens by itself and takes no sampler '{section.type}'",
                hint="set sampler: auto",
            )
        return None
    if section.type != "auto" and section.type.partition("@")[0] != kind:
        raise ConfigError(
            f"runner '{runner_type}' cannot take sampler '{section.type}'",
            hint=f"set sampler: auto, or sampler: {kind}",
        )
    # Another provider of `numpy` must be asked for by name, so that `auto` never clashes.
    automatic = "numpy@nanovllm" if kind == "numpy" else kind
    plugin = plugins.load("samplers", automatic if section.type == "auto" else section.type)
    options = plugin_options(plugin, "sampler", section.options, loaded.origins)
    sampler: Sampler = create(plugin, "sampler", replace(ctx, options=options))
    return sampler


_TOKENIZER_MEMBERS = ("vocab_size", "eos_ids", "encode", "decode", "token_bytes", "chat")


def create(plugin: LoadedPlugin, kind: str, ctx: Context) -> Any:
    """Call `create_<kind>` and check what came back. Raises PluginError."""
    hook = f"create_{kind}"
    if hook not in plugin.hooks:
        raise PluginError(f"plugin {plugin.found} does not implement {hook}")
    part = plugin.call(hook, ctx=ctx)
    match kind:
        case "runner" if isinstance(part, ModelRunner):
            lacks = None if isinstance(part.info, RunnerInfo) else "whose info is a RunnerInfo"
        case "runner":
            lacks = "that derives from nanovllm.runner.ModelRunner"
        case "tokenizer":
            missing = [m for m in _TOKENIZER_MEMBERS if not hasattr(part, m)]
            lacks = f"with {', '.join(missing)}" if missing else None
        case _:
            lacks = None if hasattr(part, "sample") else "with a sample method"
    if lacks:
        raise PluginError(f"plugin {plugin.found}: {hook} returned a {type(part).__name__}, not a {kind} {lacks}")
    return part
