"""Finding plugins and checkpoints by name, in the metadata of installed distributions.

Nothing of a plugin is imported here (loader.py does that), so listing is cheap and a broken plugin harms
nobody who did not choose it. This file knows no configuration and no hooks.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelError, PluginError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

# Group -> one thing in it, in words. The entry-point group is "nanovllm." + the name.
KINDS = {
    "runners": "runner",
    "tokenizers": "tokenizer",
    "samplers": "sampler",
    "models": "model family",
    "observers": "observer",
    "commands": "command",
    "inspectors": "inspector",
    "exporters": "export format",
    "checkpoints": "checkpoint",
    "doctors": "health check",
    "conformance": "conformance suite",
}

# What pip installs for the names that this project itself offers.
_OFFICIAL = {
    ("runners", "numpy"): "nanovllm[numpy]",
    ("runners", "onnx"): "nanovllm[onnx]",
    ("runners", "torch"): "nanovllm[torch]",
    ("runners", "http"): "nanovllm[http]",
    ("samplers", "torch"): "nanovllm[torch]",
    ("tokenizers", "auto"): "nanovllm[tokenizers]",
    ("tokenizers", "hf"): "nanovllm[tokenizers]",
    ("tokenizers", "sentencepiece"): "nanovllm-tokenizers[sentencepiece]",
    ("tokenizers", "tiktoken"): "nanovllm-tokenizers[tiktoken]",
    ("tokenizers", "http"): "nanovllm[http]",
    ("checkpoints", "demo"): "nanovllm-models",
    ("conformance", "models"): "nanovllm-models",
    ("inspectors", "onnx"): "nanovllm[onnx]",
    ("commands", "demo"): "nanovllm-models",
    ("commands", "export"): "nanovllm-models",
    ("commands", "inspect"): "nanovllm-models",
    ("commands", "pull"): "nanovllm-models",
    ("commands", "runner-serve"): "nanovllm[server]",
    ("commands", "serve"): "nanovllm[server]",
    ("exporters", "onnx"): "nanovllm[onnx]",
    ("exporters", "pt2"): "nanovllm[torch]",
    ("exporters", "safetensors"): "nanovllm[torch]",
    ("exporters", "torchscript"): "nanovllm[torch]",
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


def absent(group: str) -> dict[str, list[str]]:
    """Pip lines -> the names of this project that each would bring, and nothing installed offers."""
    have = {found.name for found in discover(group)}
    lines: dict[str, list[str]] = {}
    for (kind, name), target in _OFFICIAL.items():
        if kind == group and name not in have:
            lines.setdefault(f"pip install '{target}'", []).append(name)
    return lines


def requirements(distribution: str) -> Iterator[Requirement]:
    """What a distribution needs here, those of its extras left out; nothing if it is not installed."""
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        with suppress(InvalidRequirement):  # pip refuses such a line too
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield requirement


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
    matches = [f for f in named if not distribution or normal_name(f.distribution) == normal_name(distribution)]
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
        if path.is_file():  # itself not followed: in a hub's cache it is a link to a file without name or neighbours
            return name, path.parent.resolve() / path.name
        return name, path.resolve() if path.exists() else None
    except (OSError, ValueError, RuntimeError) as e:  # no permission; a NUL byte; no such user's home
        raise ModelError(f"model path {name!r} cannot be read: {e}") from None


def model_directory(path: Path) -> Path:
    """Where the files that describe a model are: the directory, or of a graph's file the one it lies in.

    Hubs keep graphs in `onnx/` below the tokenizer's and configuration files.
    """
    if path.is_dir():
        return path
    above = path.parent.parent
    is_below = path.parent.name == "onnx" and not (path.parent / "tokenizer.json").exists()
    return above if is_below and (above / "tokenizer.json").exists() else path.parent


def package_directory(found: Found) -> Path:
    """Where a checkpoint package lies; only its parent package is imported."""
    try:
        spec = importlib.util.find_spec(found.value)
    except Exception as e:
        raise broken(found, e) from e
    if spec is None or not spec.submodule_search_locations:
        raise PluginError(f"checkpoint '{found.name}' of {found.distribution} names no package: {found.value}")
    return Path(next(iter(spec.submodule_search_locations)))


def normal_name(distribution: str) -> str:
    """Acme_A and acme-a are one distribution."""
    from packaging.utils import canonicalize_name

    return canonicalize_name(distribution)


def broken(found: Found, cause: BaseException) -> PluginError:
    """What to raise when importing `found` fails."""
    return PluginError(
        f"{KINDS[found.group]} '{found.name}' of {found.distribution} {found.version} cannot be imported: "
        f"{in_words(cause)}",
        hint=f"repair it with: pip install --force-reinstall {found.distribution}",
    )


def in_words(e: BaseException) -> str:
    """An exception as one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())}"
