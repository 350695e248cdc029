"""Where configuration values come from: YAML text, environment variables, `key=value` texts, Python.

Each reader returns flat `{("scheduler", "max_num_seqs"): Value(16, "configs/x.yaml")}`. The alias tables
are here too. This file knows no defaults and checks no value; config.py does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ConfigError

if TYPE_CHECKING:
    import yaml

KeyPath = tuple[str, ...]  # ("scheduler", "max_num_seqs")

MAX_YAML_BYTES = 1 << 20

# Sections whose `type` names a plugin; `runner: numpy` is short for `runner: {type: numpy}`.
PLUGIN_SECTIONS = ("runner", "tokenizer", "sampler")

# Other names that are understood, and what they mean. nano-vllm's options first.
OPTION_ALIASES: Mapping[str, str] = {
    "max_num_batched_tokens": "scheduler.max_num_batched_tokens",
    "max_num_seqs": "scheduler.max_num_seqs",
    "max_model_len": "scheduler.max_model_len",
    "kvcache_block_size": "cache.block_size",
    "num_kvcache_blocks": "cache.num_blocks",
    "gpu_memory_utilization": "cache.gpu_share",
}
# nano-vllm's options that are accepted and do nothing: (is the value allowed?, in words, why it does nothing).
NO_EFFECT_OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "enforce_eager": (lambda v: type(v) is bool, "true or false", "a runner decides by itself what it compiles"),
    "tensor_parallel_size": (
        lambda v: type(v) is int and v == 1,
        "1",
        "one process runs the model; tensor parallelism is not implemented",
    ),
}
# The build tags of nano-vllm-go.
RUNNER_ALIASES: Mapping[str, str] = {"purego": "onnx", "pytorch": "torch"}
# Environment variables without our prefix.
ENVIRONMENT_ALIASES: Mapping[str, str] = {"MODEL_PATH": "model", "TOKENIZER_PATH": "tokenizer.path"}

ENVIRONMENT_PREFIX = "NANOVLLM_"
# Variables with our prefix that are no configuration: secrets, which nothing here may show.
_SECRETS = frozenset({"NANOVLLM_API_KEY"})

# Keys whose values are text, so that `--set model=123` stays a text.
_TEXT_KEYS = {("model",), ("profile",), ("tokenizer", "path")}
_TEXT_KEYS |= {(section, *rest) for section in PLUGIN_SECTIONS for rest in ((), ("type",))}


class Value(NamedTuple):
    value: Any
    origin: str  # a file, an environment variable, a flag


Values = dict[KeyPath, Value]


# ------------------------------------------------------------------------------------ the readers


def from_yaml(path: Path) -> tuple[Values, dict[str, Values]]:
    """The values of one YAML file, and those of each of its profiles.

    `./x` and `../x` in `model`, and a relative `tokenizer.path`, start at the file. Raises ConfigError: no such
    file, not UTF-8, not YAML, a key given twice, an alias, not a mapping.
    """
    origin = str(path)
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_YAML_BYTES + 1)
    except OSError as e:
        raise ConfigError(f"configuration file {origin} cannot be read: {e.strerror or e}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"configuration file {origin} is larger than {MAX_YAML_BYTES} bytes")
    try:
        tree = _parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise ConfigError(f"configuration file {origin} is not UTF-8 text (byte {e.start})") from None
    except _BadYAML as e:
        raise ConfigError(f"configuration file {origin}{e.place} {e.problem}") from None
    if tree is None:  # an empty file
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"configuration file {origin} must hold `key: value` lines, not a {type(tree).__name__}")
    profiles = tree.pop("profiles", None) or {}
    if not isinstance(profiles, Mapping):
        raise ConfigError(f"'profiles' must hold a name and `key: value` lines below it, not {profiles!r} ({origin})")
    for name, profile in profiles.items():
        if not isinstance(name, str):
            raise ConfigError(f"a profile's name must be a text, not {name!r} ({origin})", hint="put it in quotes")
        if not isinstance(profile, Mapping):
            raise ConfigError(f"the profile {name!r} must hold `key: value` lines, not {profile!r} ({origin})")
    directory = path.absolute().parent
    return _of_file(tree, origin, directory), {
        name: _of_file(profile, f"{origin}, profile {name}", directory) for name, profile in profiles.items()
    }


def from_environment(environ: Mapping[str, str], aliases: Mapping[str, str] = ENVIRONMENT_ALIASES) -> Values:
    """NANOVLLM_RUNNER__TYPE=mock and the aliases; an empty variable counts as not set."""
    values: Values = {}
    # The aliases first: a variable with our own prefix wins.
    names = [n for n in aliases if n in environ]
    names += sorted(n for n in environ if n.upper().startswith(ENVIRONMENT_PREFIX) and n.upper() not in _SECRETS)
    for name in names:
        if environ[name]:
            key = aliases.get(name) or name[len(ENVIRONMENT_PREFIX) :].lower().replace("__", ".")
            values.update(_from_text(key, environ[name], f"environment variable {name}"))
    return values


def from_sets(sets: Sequence[str]) -> Values:
    """`scheduler.max_num_seqs=4` texts of the command line; of two with the same key the last counts."""
    values: Values = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {text!r} is not of the form key=value", hint="for example: --set runner.threads=4"
            )
        values.update(_from_text(key.strip(), value, "--set"))
    return values


def from_mapping(tree: Mapping[str, Any], origin: str) -> Values:
    """Python's keyword arguments: nested mappings, dotted keys, aliases."""
    return _flatten(tree, origin)


def take_no_effect(values: Values) -> tuple[str, ...]:
    """Remove nano-vllm's options that mean nothing here; a note for each."""
    notes = []
    for name, (is_allowed, allowed, why) in NO_EFFECT_OPTIONS.items():
        if (name,) in values:
            value, origin = values.pop((name,))
            if not is_allowed(value):
                raise ConfigError(f"{name} must be {allowed}, not {value!r} ({origin}): {why}")
            notes.append(f"{name} ({origin}) has no effect: {why}")
    return tuple(notes)


# ---------------------------------------------------------------------------------- their helpers


def _of_file(tree: Mapping[Any, Any], origin: str, directory: Path) -> Values:
    values = _flatten(tree, origin)
    for key, relative in ((("model",), r"\.\.?([/\\]|$)"), (("tokenizer", "path"), r"[^~]")):
        text = values[key].value if key in values else None
        if isinstance(text, str) and re.match(relative, text):
            values[key] = Value(str(directory / text), origin)
    return values


def _from_text(key: str, text: str, origin: str) -> Values:
    path = _path(key)
    value: Any = text
    if path not in _TEXT_KEYS or text.lstrip().startswith("{"):
        try:
            value = _parse_yaml(text)
        except _BadYAML as e:
            raise ConfigError(f"the value of '{key}' ({origin}) {e.problem}") from None
    return _flatten({key: value}, origin)


def _path(key: str) -> KeyPath:
    return tuple(OPTION_ALIASES.get(key, key).split("."))


def _flatten(tree: Mapping[Any, Any], origin: str) -> Values:
    values: Values = {}
    for path, value in _leaves(tree, (), origin):
        if len(path) == 1 and path[0] in PLUGIN_SECTIONS and not isinstance(value, Mapping):
            path = (path[0], "type")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if path == ("runner", "type") and isinstance(value, str):
            bare, at, distribution = value.partition("@")
            value = RUNNER_ALIASES.get(bare, bare) + at + distribution
        if path in values:
            raise ConfigError(f"'{'.'.join(path)}' is given twice ({origin})", hint="remove one of the two")
        values[path] = Value(value, origin)
    return values


def _leaves(tree: Mapping[Any, Any], prefix: KeyPath, origin: str) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str) or not key:
            where = f" in '{'.'.join(prefix)}'" if prefix else ""
            raise ConfigError(f"the key {key!r}{where} ({origin}) must be a text", hint="quote it")
        path = prefix + (_path(key) if not prefix else tuple(key.split(".")))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path, origin)
        else:
            yield path, value


class _BadYAML(Exception):
    def __init__(self, problem: str, place: str = "") -> None:
        self.problem = problem  # a phrase: "is not YAML: ..."
        self.place = place  # ", line 3" or nothing


def _parse_yaml(text: str) -> Any:
    """Plain data of one YAML document: no tags, no aliases (they can grow without bound), no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        problem = f"the key '{key.value}' is given twice"
                        raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as e:
        place = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        what = ", ".join(part for part in (e.context, e.problem) if part)
        raise _BadYAML(f"is not accepted: {what}", place) from None
    except yaml.YAMLError as e:
        raise _BadYAML(f"is not YAML: {' '.join(str(e).split())}") from None
    except (ValueError, OverflowError) as e:  # an impossible date, a number of thousands of digits
        raise _BadYAML(f"has a value that cannot be read: {' '.join(str(e).split())}") from None
    except RecursionError:
        raise _BadYAML("is nested too deeply") from None
