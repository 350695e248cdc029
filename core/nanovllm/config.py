"""The configuration: what may be set, and where each value came from.

Layers, lowest first: default, YAML file, the chosen one of its profiles, environment, call (`--set`,
flags and Python overrides). A layer that changes a plugin section's `type` replaces the whole section.
Values are checked here but for a plugin's own options, which its pydantic model checks when it is loaded
(components.py). This file knows no plugin.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from . import sources
from .errors import ConfigError
from .sources import PLUGIN_SECTIONS, KeyPath, Values

# ------------------------------------------------------------------------------------- the values

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kKmMgGtT][iI]?[bB]|[bB])?")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _bytes(value: object) -> object:
    """'1GiB' -> 1073741824; numbers pass."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError("must be a size such as 512MiB or 1.5GB")
    return int(float(match[1]) * _UNITS[(match[2] or "B").lower()])


def _ids(value: object) -> object:
    """nano-vllm's `eos`: one id, -1 for the model's own; ours: a list."""
    if type(value) is int:
        return None if value == -1 else (value,)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _blocks(value: object) -> object:
    """nano-vllm's -1 = as many as fit."""
    return None if type(value) is int and value == -1 else value


def _names(value: object) -> object:
    return tuple(value) if isinstance(value, (list, tuple)) else value


_SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "title": "bytes"},
        {"type": "string", "pattern": _SIZE.pattern, "title": "size such as `1GiB`"},
        {"type": "null"},
    ]
}
Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunnerSection(Section):
    """Which runtime computes the logits. Further keys belong to the chosen runner."""

    type: Text = Field(default="numpy", description="an installed runner: `nanovllm plugins list` names them")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null = all that this process may use")
    options: dict[str, Any] = Field(default={}, description="the plugin's own keys, checked by the plugin's model")


class TokenizerSection(Section):
    """How text becomes token ids. Further keys belong to the chosen tokenizer."""

    type: Text = Field(
        default="auto",
        description="an installed tokenizer; `auto` = `simple` for the runner `mock`, else what fits the model's "
        "files, or none where the runner tokenizes by itself and the model has no files",
    )
    path: Text | None = Field(
        default=None, description="the tokenizer's file or directory, if not the model's directory"
    )
    options: dict[str, Any] = Field(default={}, description="the plugin's own keys")


class SamplerSection(Section):
    """What draws the next token. Further keys belong to the chosen sampler."""

    type: Text = Field(default="auto", description="a sampler that the runner can take; `auto` = the runner's own kind")
    options: dict[str, Any] = Field(default={}, description="the plugin's own keys")


class SchedulerSection(Section):
    """How much runs at once."""

    max_num_seqs: int = Field(default=32, ge=1, le=65536, description="sequences in one step")
    max_num_batched_tokens: int = Field(
        default=2048, ge=1, le=2**24, description="tokens in one step; longer prompts are computed in chunks of it"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="prompt + answer, in tokens; null = the model's own length"
    )
    stall_seconds: float = Field(
        default=120, gt=0, allow_inf_nan=False, description="a step that takes longer makes the engine report not ready"
    )


class CacheSection(Section):
    """The KV cache."""

    block_size: int = Field(default=16, ge=1, le=65536, description="tokens per block")
    memory: Annotated[int | None, BeforeValidator(_bytes), WithJsonSchema(_SIZE_SCHEMA)] = Field(
        default=None, ge=1, description="size of the block pool, such as 1GiB; null = the runner decides"
    )
    num_blocks: Annotated[int | None, BeforeValidator(_blocks)] = Field(
        default=None, ge=1, description="exact number of blocks; wins over `memory`"
    )
    gpu_share: float = Field(
        default=0.9, gt=0, le=1, allow_inf_nan=False,
        description="share of a GPU's free memory for a pool that lies on it, where `memory` and `num_blocks` are null",
    )  # fmt: skip
    prefix_caching: bool = Field(default=True, description="reuse the blocks of an equal beginning")


class Config(Section):
    """The whole configuration. `plugins` names observers."""

    model: Text = Field(
        default="demo", description="a directory, a file, `demo`, or a name that the runner understands"
    )
    runner: RunnerSection = RunnerSection()
    tokenizer: TokenizerSection = TokenizerSection()
    sampler: SamplerSection = SamplerSection()
    scheduler: SchedulerSection = SchedulerSection()
    cache: CacheSection = CacheSection()
    eos: Annotated[tuple[TokenId, ...] | None, BeforeValidator(_ids)] = Field(
        default=None, description="token ids that end an answer, instead of the model's own; null = the model's own"
    )
    plugins: Annotated[tuple[Text, ...], BeforeValidator(_names)] = Field(
        default=(), description="observers to load, by name"
    )
    server: dict[str, Any] = Field(
        default={}, description="options of `nanovllm serve`, which checks them: docs/server/operations.md lists them"
    )


_SECTIONS: Mapping[str, type[Section]] = {
    "runner": RunnerSection,
    "tokenizer": TokenizerSection,
    "sampler": SamplerSection,
    "scheduler": SchedulerSection,
    "cache": CacheSection,
}
# The keys of a plugin section that are ours; the others belong to the plugin.
COMMON_KEYS = {s: tuple(k for k in _SECTIONS[s].model_fields if k != "options") for s in PLUGIN_SECTIONS}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checked configuration and where its values came from."""

    config: Config
    origins: Mapping[str, str]  # 'scheduler.max_num_seqs' -> 'configs/x.yaml'; keys not in it have their default
    notes: tuple[str, ...] = ()  # accepted options of nano-vllm that have no effect here, one sentence each
    profiles: tuple[str, ...] = ()  # the names of those that the file has


# --------------------------------------------------------------------------------------- loading


def load(
    path: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    environ_aliases: Mapping[str, str] = MappingProxyType({}),
    override_origin: str = "argument",
) -> Loaded:
    """Merge every source and check the result. Raises ConfigError, which names the value and its origin.

    `overrides` may be nested, dotted (`{"runner.threads": 2}`) or use nano-vllm's names; they win over `sets`.
    `environ` is `os.environ` unless given; `environ_aliases`: further variables and the dotted keys that they set,
    over the file's, whichever plugins are chosen.
    """
    file, profiles = sources.from_yaml(Path(path)) if path is not None else ({}, {})
    environ = os.environ if environ is None else environ
    environment = sources.from_environment(environ)
    call = _put(sources.from_sets(sets), sources.from_mapping(overrides, override_origin))
    values: Values = {}
    for layer in (file, _take_profile((file, environment, call), profiles), environment, call):
        values = _merge(values, layer)
    # Not a layer: they choose no plugin, so they are for whichever is chosen.
    named = sources.from_environment({k: environ[k] for k in environ_aliases if k in environ}, environ_aliases)
    values = _put(values, {k: v for k, v in named.items() if k not in environment and k not in call})
    notes = sources.take_no_effect(values)
    _check_keys(values)
    origins = MappingProxyType({".".join(k): v.origin for k, v in values.items()})
    try:
        config = Config.model_validate(_tree(values))
    except ValidationError as e:
        raise config_error(e, origins) from None
    scheduler = config.scheduler
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs:
        raise ConfigError(
            f"scheduler.max_num_batched_tokens ({scheduler.max_num_batched_tokens}) is smaller than "
            f"scheduler.max_num_seqs ({scheduler.max_num_seqs})",
            hint="every running sequence needs one token per step: raise the first or lower the second",
        )
    return Loaded(config, origins, notes, tuple(profiles))


def unknown_key(key: KeyPath, known: Sequence[str], origin: str) -> ConfigError:
    """`key`'s last part is none of `known`."""
    near = difflib.get_close_matches(key[-1], known, 1)
    return ConfigError(
        f"unknown key '{'.'.join(key)}' ({origin})",
        hint=f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known) or 'none'}",
    )


def config_error(e: ValidationError, origins: Mapping[str, str], prefix: KeyPath = ()) -> ConfigError:
    """One sentence for the first thing that pydantic found wrong."""
    from .request import show

    first, *others = e.errors(include_url=False)
    path = prefix + tuple(str(part) for part in first["loc"])
    keys = (".".join(path[:n]) for n in range(len(path), 0, -1))
    origin = next((f" ({origins[k]})" for k in keys if k in origins), "")
    what = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    more = f" (and {len(others)} more)" if others else ""
    # What is wrong with a section as a whole is no one value; and a plugin says `secret` where the value may be one.
    given = f", not {show(first['input'])}" if first["loc"] and first["type"] != "secret" else ""
    return ConfigError(f"{'.'.join(path)}: {what}{given}{origin}{more}")


def _take_profile(layers: Sequence[Values], profiles: Mapping[str, Values]) -> Values:
    """Remove `profile` from the layers; the values of the profile that the highest of them names."""
    named = [layer.pop(("profile",)) for layer in layers if ("profile",) in layer]
    if not named or named[-1].value is None:
        return {}
    name, origin = named[-1]
    if not isinstance(name, str) or name not in profiles:
        raise ConfigError(
            f"there is no profile {name!r} ({origin})",
            hint=f"the file has {', '.join(profiles)}" if profiles else "a YAML file (--config) defines profiles",
        )
    return profiles[name]


def _merge(lower: Values, layer: Values) -> Values:
    """`layer` over `lower`; a layer that changes a plugin section's `type` replaces that section."""
    for section in PLUGIN_SECTIONS:
        key = (section, "type")
        before = lower[key].value if key in lower else _SECTIONS[section].model_fields["type"].default
        if key in layer and before not in ("auto", layer[key].value):  # `auto` named no plugin yet
            lower = {k: v for k, v in lower.items() if k[0] != section}
    return _put(lower, layer)


def _put(lower: Values, upper: Values) -> Values:
    """The union; a value of `upper` removes the one it replaces, those below it and the one it lies in."""
    merged = dict(lower)
    for path, value in upper.items():
        if len(path) == 1 and path[0] in _SECTIONS and (value.value is None or value.value == {}):
            continue  # a section with nothing below it says nothing
        merged = {k: v for k, v in merged.items() if k[: len(path)] != path and path[: len(k)] != k}
        merged[path] = value
    return merged


def _check_keys(values: Values) -> None:
    """Every key must exist; what lies below a plugin section is the plugin's to judge."""
    for path, (value, origin) in values.items():
        if path[0] not in Config.model_fields:
            raise unknown_key(path[:1], list(Config.model_fields), origin)
        section = _SECTIONS.get(path[0])
        if section is None:
            continue
        if len(path) == 1:
            raise ConfigError(f"'{path[0]}' must hold `key: value` lines, not {value!r} ({origin})")
        if path[0] not in PLUGIN_SECTIONS and path[1] not in section.model_fields:
            raise unknown_key(path[:2], list(section.model_fields), origin)


def _tree(values: Values) -> dict[str, Any]:
    """Nested again, with a plugin section's own keys under `options`."""
    tree: dict[str, Any] = {}
    for path, (value, _) in values.items():
        if path[0] in PLUGIN_SECTIONS and path[1] not in COMMON_KEYS[path[0]]:
            path = (path[0], "options", *path[1:])
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def leaves(config: Config) -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of the whole configuration, as `load` would take it again."""
    for name, value in config.model_dump(mode="json").items():
        if name not in _SECTIONS:
            yield from _dotted({name: value})
            continue
        options = value.pop("options", {})
        for key, item in (*value.items(), *_dotted(options)):
            yield f"{name}.{key}", item


def _dotted(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{rest}", item) for rest, item in _dotted(value))
        else:
            yield key, value
