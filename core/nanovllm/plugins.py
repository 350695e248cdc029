"""Finding and loading plugins: entry points choose, pluggy connects.

Finding reads the metadata of installed distributions and imports nothing. Loading imports the ONE plugin
that was asked for, into a `Plugins` made per engine. This file knows no configuration and calls no
`create_*` by itself (components.py does).
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError, NanoVLLMError, PluginError

if TYPE_CHECKING:
    from .intake import Ticket
    from .request import Completion
    from .stats import StepStats

# Group -> one thing in it, in words. The entry-point group is "nanovllm." + the name.
KINDS = {
    "runners": "runner",
    "tokenizers": "tokenizer",
    "samplers": "sampler",
    "models": "model family",
    "observers": "observer",
    "commands": "command",
    "checkpoints": "checkpoint",
}

# What pip installs for the names that this project itself offers.
_OFFICIAL = {
    ("runners", "numpy"): "nanovllm[numpy]",
    ("runners", "onnx"): "nanovllm[onnx]",
    ("runners", "torch"): "nanovllm[torch]",
    ("runners", "http"): "nanovllm[http]",
    ("samplers", "torch"): "nanovllm[torch]",
    ("tokenizers", "hf"): "nanovllm[tokenizers]",
    ("tokenizers", "sentencepiece"): "nanovllm-tokenizers[sentencepiece]",
    ("tokenizers", "tiktoken"): "nanovllm-tokenizers[tiktoken]",
    ("tokenizers", "http"): "nanovllm[http]",
    ("checkpoints", "demo"): "nanovllm-models",
    ("commands", "demo"): "nanovllm-models",
    ("commands", "inspect"): "nanovllm-models",
    ("commands", "pull"): "nanovllm-models",
    ("commands", "serve"): "nanovllm[server]",
}


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """One entry point of an installed distribution, not imported."""

    group: str  # a key of KINDS
    name: str  # what the configuration writes
    distribution: str
    version: str  # of the distribution
    value: str  # "module:attribute", or a package for a checkpoint

    def __str__(self) -> str:
        return f"{self.group}:{self.name}@{self.distribution}"


def discover(group: str | None = None) -> list[Found]:
    """Every plugin of one group, or of all, sorted. Reads metadata only."""
    found = []
    for kind in KINDS if group is None else (group,):
        for entry in importlib.metadata.entry_points(group=f"nanovllm.{kind}"):
            name, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "unknown")
            found.append(Found(kind, entry.name, name, version, entry.value))
    return sorted(found)


def pip_hint(group: str, name: str) -> str | None:
    """The pip line that brings a name of this project; None for anybody else's."""
    target = _OFFICIAL.get((group, name))
    return f"try: pip install '{target}'" if target else None


def find(group: str, name: str) -> Found:
    """The one plugin of that name; `name@distribution` chooses between several. Raises PluginError."""
    kind = KINDS[group]
    bare, _, distribution = name.partition("@")
    installed = discover(group)
    named = [f for f in installed if f.name == bare]
    if not named:
        have = list(dict.fromkeys(f.name for f in installed))
        near = difflib.get_close_matches(bare, have, 1)
        hint = pip_hint(group, bare) or (f"did you mean '{near[0]}'?" if near else None)
        raise PluginError(f"no {kind} named '{bare}' is installed (have: {', '.join(have) or 'none'})", hint=hint)
    matches = [f for f in named if not distribution or _normal(f.distribution) == _normal(distribution)]
    if not matches:
        offers = ", ".join(f.distribution for f in named)
        raise PluginError(f"distribution '{distribution}' offers no {kind} named '{bare}' (offered by: {offers})")
    if len(matches) > 1:
        offers = " and ".join(f"{f.distribution} {f.version}" for f in matches)
        raise PluginError(
            f"{kind} '{bare}' is offered by {offers}", hint=f"write {bare}@{matches[0].distribution} to choose"
        )
    return matches[0]


def resolve_model(name: str) -> tuple[str, Path | None]:
    """What `model:` names: (name, its files).

    A registered checkpoint wins over a directory of the same bare name (`./demo` reaches the directory);
    then an existing file or directory; else (name, None), and the runner decides whether it needs files.
    Raises PluginError for a checkpoint that clashes or is broken, ModelError for a path that cannot be read.
    """
    if any(f.name == name.partition("@")[0] for f in discover("checkpoints")):
        return name, package_directory(find("checkpoints", name))
    try:
        path = Path(name).expanduser()
        return name, path.resolve() if path.exists() else None
    except (OSError, ValueError, RuntimeError) as e:  # no permission; a NUL byte; no such user's home
        raise ModelError(f"model path {name!r} cannot be read: {e}") from None


def package_directory(found: Found) -> Path:
    """Where a checkpoint package lies; only its parent package is imported."""
    try:
        spec = importlib.util.find_spec(found.value)
    except Exception as e:
        raise _broken(found, e) from e
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(f"checkpoint '{found.name}' of {found.distribution} names no package: {found.value}")
    return Path(next(iter(spec.submodule_search_locations)))


class Plugins:
    """The plugins that one engine loaded, in one pluggy manager of its own."""

    def __init__(self) -> None:
        import pluggy

        from .hookspecs import Specs

        self.manager = pluggy.PluginManager("nanovllm")
        self.manager.add_hookspecs(Specs)

    def load(self, group: str, name: str) -> LoadedPlugin:
        """Import and register the plugin of that name. Raises PluginError."""
        import pluggy

        from .hookspecs import Specs

        # 1. Find it and check what its metadata and its object say about versions.
        found = find(group, name)
        _check_requirement(found)
        plugin = _import(found)
        _check_api_version(found, plugin)
        # 2. Register it; pluggy ignores a misspelt hook unless it is asked.
        try:
            self.manager.register(plugin, name=str(found))
        except pluggy.PluginValidationError as e:
            raise PluginError(f"plugin {found} has a wrong hook: {_one_line(e)}") from e
        except ValueError as e:
            raise PluginError(
                f"plugin {found} cannot be registered: {_one_line(e)}", hint="each entry point needs its own object"
            ) from e
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as e:
            known = [name for name in vars(Specs) if not name.startswith("_")]
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
            raise PluginError(f"plugin {self.found} failed in {hook}: {_cause(e)}") from e


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
        raise _broken(found, e) from e


def load_object(found: Found) -> object:
    """Import what an entry point names, for groups whose objects are not pluggy plugins (commands, models)."""
    _check_requirement(found)
    return _import(found)


def _broken(found: Found, cause: BaseException) -> PluginError:
    return PluginError(
        f"{KINDS[found.group]} '{found.name}' of {found.distribution} {found.version} cannot be imported: "
        f"{_cause(cause)}",
        hint=f"repair it with: pip install --force-reinstall {found.distribution}",
    )


def _check_api_version(found: Found, plugin: object) -> None:
    from .hookspecs import API_VERSION

    version = getattr(plugin, "api_version", None)
    if type(version) is not int:
        raise PluginError(
            f"plugin {found} does not say for which plugin API it was written",
            hint=f"its author declares it with `api_version = {API_VERSION}` on the plugin object",
        )
    if not max(1, API_VERSION - 1) <= version <= API_VERSION:
        newer = version > API_VERSION
        raise PluginError(
            f"plugin {found} was written for plugin API {version}; this nanovllm offers {API_VERSION}",
            hint=f"upgrade {'nanovllm' if newer else found.distribution}",
        )


def _check_requirement(found: Found) -> None:
    """pip only warns when core and a plugin disagree, so the plugin's own Requires-Dist is read here."""
    from packaging.requirements import InvalidRequirement, Requirement

    from . import __version__

    try:
        lines = importlib.metadata.requires(found.distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # pip's business, and about another distribution
        if _normal(requirement.name) != "nanovllm" or (requirement.marker and not requirement.marker.evaluate()):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise PluginError(
                f"{found.distribution} {found.version} needs nanovllm{requirement.specifier}, "
                f"but nanovllm {__version__} is installed",
                hint=f"try: pip install --upgrade nanovllm {found.distribution}",
            )


def _normal(distribution: str) -> str:
    from packaging.utils import canonicalize_name

    return canonicalize_name(distribution)


def _cause(e: BaseException) -> str:
    return f"{type(e).__name__}: {_one_line(e)}"


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())
