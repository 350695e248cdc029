"""A plugin in a process of its own: what importing it and making it does, seen from outside.

`make` builds the part that a configuration names, and `fresh` does the same in a child that may hang, crash
or print without harm. This file knows no tests.
"""

from __future__ import annotations

import importlib.machinery
import json
import locale
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..child import run_child
from ..components import build, build_tokenizer, context, create, plugin_options
from ..config import load
from ..errors import NanoVLLMError, PluginError
from ..loader import Plugins, load_object
from ..plugins import find, in_words


@dataclass(frozen=True, slots=True)
class Fresh:
    """What happened in the child."""

    problem: str | None  # why it could not be made, in one sentence
    exit_code: int | None  # where the problem is no matter of conformance: it cannot be imported, or refuses `config`
    extensions: (
        tuple[str, ...] | None
    )  # compiled packages that importing it brought, but the core's; None: not imported
    api_version: int | None  # of the plugin object
    printed: str  # what came on stdout
    changed: tuple[str, ...] = ()  # what all of the process shares, and making it changed, in words


def make(group: str, config: Mapping[str, Any]) -> Any:
    """What `config` names: Components for "runners", else the tokenizer, the sampler or the family's module.

    Raises NanoVLLMError, and whatever else a plugin raises.
    """
    if group == "models":
        return load_object(find(group, config["model_type"]))
    loaded = load(overrides=config, environ={})
    if group == "runners":
        return build(loaded)
    if group == "tokenizers":
        return build_tokenizer(loaded)
    section = loaded.config.sampler
    plugin = Plugins().load(group, section.type)
    options = plugin_options(plugin, "sampler", section.options, loaded.origins)
    return create(plugin, "sampler", replace(context(loaded), options=options))


def plugin_name(group: str, config: Mapping[str, Any]) -> str:
    """The plugin's name in its group, perhaps with `@distribution`."""
    if group == "models":
        return str(config["model_type"])
    chosen = load(overrides=config, environ={}).config
    return {"runners": chosen.runner.type, "tokenizers": chosen.tokenizer.type, "samplers": chosen.sampler.type}[group]


def fresh(group: str, config: Mapping[str, Any], seconds: float) -> Fresh:
    """Import and make the plugin in a child process, which is killed after that time."""
    ended = run_child("nanovllm.testing.fresh", [group, dict(config)], seconds)
    found: dict[str, Any] = json.loads(ended.report) if ended.report else {}
    extensions, exit_code = found.get("extensions"), found.get("exit_code")
    if "problem" in found:
        problem: str | None = found["problem"]
    else:
        problem = f"{'importing' if extensions is None else 'making'} it {ended.in_words(seconds)}"
        exit_code = PluginError.exit_code if extensions is None else None
    return Fresh(
        problem=problem,
        exit_code=exit_code,
        extensions=None if extensions is None else tuple(extensions),
        api_version=found.get("api_version"),
        printed=ended.stdout,
        changed=tuple(found.get("changed", ())),
    )


# -------------------------------------------------------------------------------------- the child's side


def _main(report: Path) -> None:
    group, config = json.load(sys.stdin)
    found: dict[str, Any] = {}
    try:
        before, shared = set(sys.modules), _shared()
        plugin = load_object(find(group, plugin_name(group, config)))
        known = {name.partition(".")[0] for name in before}  # the core's own requirements among them
        found["extensions"] = sorted(_compiled(set(sys.modules) - before) - known)
        version = getattr(plugin, "api_version", None)
        found["api_version"] = version if type(version) is int else None
        report.write_text(json.dumps(found), "utf-8")
        part = make(group, config)
        found["changed"] = sorted(what for what, value in _shared().items() if value != shared[what])
        if group == "runners":
            part.runner.close()
        found["problem"] = None
    except NanoVLLMError as e:
        found |= {"problem": str(e), "exit_code": e.exit_code}
    except Exception as e:
        found["problem"] = f"making it raised {in_words(e)}"
    report.write_text(json.dumps(found), "utf-8")
    sys.stdout.flush()
    os._exit(0)  # a thread that it left behind is not looked at here


def _shared() -> dict[str, object]:
    """What all of a process shares and whoever uses the library relies on, by the words for it."""
    names = (signal.Signals(number).name for number in signal.valid_signals() if number in set(signal.Signals))
    handlers = {f"the handler of {name}": signal.getsignal(signal.Signals[name]) for name in names}
    log = logging.getLogger()
    return handlers | {
        "the working directory": Path.cwd(),
        "the locale": locale.setlocale(locale.LC_ALL),
        "the error state of NumPy": np.geterr(),
        "the root logger": (log.level, *log.handlers),
        "sys.excepthook": sys.excepthook,
        "sys.stdout": sys.stdout,
    }


def _compiled(modules: set[str]) -> set[str]:
    """The top-level packages of those modules that are machine code, the standard library's aside."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    files = {name: str(getattr(sys.modules.get(name), "__file__", None)) for name in modules}
    tops = {name.partition(".")[0] for name, file in files.items() if file.endswith(suffixes)}
    return tops - sys.stdlib_module_names


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
