"""Loading the ONE plugin that was asked for: import, version checks, and a pluggy manager per engine.

This file knows how a plugin is checked and called, not where its name came from (plugins.py finds it,
components.py calls `create_*`).
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from . import __version__, hookspecs
from .errors import NanoVLLMError, PluginError
from .plugins import Found, broken, find, in_words, normal_name, requirements

if TYPE_CHECKING:
    from .intake import Ticket
    from .request import Completion
    from .stats import StepStats


class Plugins:
    """The plugins that one engine loaded, in one pluggy manager of its own."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager("nanovllm")
        self.manager.add_hookspecs(hookspecs.Specs)

    def load(self, group: str, name: str) -> LoadedPlugin:
        """Import and register the plugin of that name. Raises PluginError."""
        # 1. Find it and check what its metadata and its object say about versions.
        found = find(group, name)
        _check_requirement(found)
        plugin = _import(found)
        _check_api_version(found, plugin)
        # 2. Register it; pluggy ignores a misspelt hook unless it is asked.
        try:
            self.manager.register(plugin, name=str(found))
        except pluggy.PluginValidationError as e:
            raise PluginError(f"plugin {found} has a wrong hook: {in_words(e)}") from e
        except ValueError as e:
            raise PluginError(
                f"plugin {found} cannot be registered: {in_words(e)}", hint="each entry point needs its own object"
            ) from e
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as e:
            known = [name for name in vars(hookspecs.Specs) if not name.startswith("_")]
            unknown = [c.name for c in self.manager.get_hookcallers(plugin) or [] if c.name not in known]
            near = difflib.get_close_matches(unknown[0], known, 1)
            raise PluginError(
                f"plugin {found} implements an unknown hook '{', '.join(unknown)}'",
                hint=f"did you mean '{near[0]}'?" if near else f"the hooks are: {', '.join(known)}",
            ) from e
        return LoadedPlugin(self, found, plugin)


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """One registered plugin; `call` reaches it and no other."""

    owner: Plugins
    found: Found
    plugin: Any

    @property
    def hooks(self) -> list[str]:
        """Names of the hooks that it implements."""
        return sorted(caller.name for caller in self.owner.manager.get_hookcallers(self.plugin) or [])

    def caller(self, hook: str) -> Callable[..., Any]:
        """Calls that hook of this plugin alone; gives None where the plugin does not implement it.

        Good until the next `load`: pluggy takes the plugins to leave out, not the one to call.
        """
        others = [p for p in self.owner.manager.get_plugins() if p is not self.plugin]
        return self.owner.manager.subset_hook_caller(hook, others)

    def call(self, hook: str, **arguments: Any) -> Any:
        """A NanoVLLMError passes through; any other exception becomes a PluginError that names the plugin."""
        try:
            return self.caller(hook)(**arguments)
        except NanoVLLMError:
            raise
        except Exception as e:
            raise PluginError(f"plugin {self.found} failed in {hook}: {in_words(e)}") from e


class Observer:
    """One loaded observer, as the engine calls it. Exceptions pass: the engine logs and detaches."""

    def __init__(self, plugin: LoadedPlugin) -> None:
        self._plugin = plugin

    def __repr__(self) -> str:
        return str(self._plugin.found)

    def on_request(self, event: Ticket) -> None:
        self._plugin.caller("on_request")(event=event)

    def on_step(self, stats: StepStats) -> None:
        self._plugin.caller("on_step")(stats=stats)

    def on_output(self, output: Completion) -> None:
        self._plugin.caller("on_output")(output=output)


def _import(found: Found) -> object:
    entry = importlib.metadata.EntryPoint(found.name, found.value, f"nanovllm.{found.group}")
    try:
        return entry.load()
    except (Exception, SystemExit) as e:
        raise broken(found, e) from e


def load_object(found: Found) -> object:
    """Import what an entry point names, for groups whose objects are not pluggy plugins (commands, models)."""
    _check_requirement(found)
    return _import(found)


def _check_api_version(found: Found, plugin: object) -> None:
    version = getattr(plugin, "api_version", None)
    if type(version) is not int:
        raise PluginError(
            f"plugin {found} does not say for which plugin API it was written",
            hint=f"its author declares it with `api_version = {hookspecs.API_VERSION}` on the plugin object",
        )
    newest = hookspecs.API_VERSION
    oldest = max(1, newest - 1)
    if not oldest <= version <= newest:
        offered = f"{oldest} and {newest}" if oldest < newest else str(newest)
        raise PluginError(
            f"plugin {found} was written for plugin API {version}, and nanovllm {__version__} runs those for {offered}",
            hint=f"try: pip install --upgrade {'nanovllm' if version > newest else found.distribution}",
        )


def _check_requirement(found: Found) -> None:
    """pip only warns when core and a plugin disagree, so the plugin's own Requires-Dist is read here."""
    for requirement in requirements(found.distribution):
        if normal_name(requirement.name) != "nanovllm":
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise PluginError(
                f"{found.distribution} {found.version} needs nanovllm{requirement.specifier}, "
                f"but nanovllm {__version__} is installed",
                hint=f"try: pip install --upgrade nanovllm {found.distribution}",
            )
